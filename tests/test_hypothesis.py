"""Inputs that hypothesis invents, and makes small where one breaks through."""

import math

import numpy as np
import torch
from fuzz_images import good_images
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.images import ImageDataset
from training.data.scan import _Inspection

IMAGES = [content for _, content in good_images(np.random.default_rng(0))]
often = settings(max_examples=200, derandomize=True, deadline=None)
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8)


@often
@given(st.sampled_from(IMAGES), edits, st.floats(0, 1), st.sampled_from([1, 3]))
def test_an_image_is_used_or_reported(content, edits, kept, channels):
    content = bytearray(content)
    for place, value in edits:
        content[int(place * len(content))] = value
    stored = [{"image": {"bytes": bytes(content[: math.ceil(kept * len(content))]), "path": None}}]
    split = ImageDataset(stored, "image", None, "train", 8, channels)
    found = _Inspection(split)[0]
    if isinstance(found, str):
        assert found.isprintable() and " at 0x" not in found
    else:
        image = split[0, False]["images"]
        assert image.shape == (channels, 8, 8) and image.dtype == torch.float32
        assert image.isfinite().all() and image.abs().max() <= 1
