"""Handwritten digits with captions."""

from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = "zero one two three four five six seven eight nine".split()


def captioned_digits(folder: Path, count: int = 300) -> Path:
    """A folder with `count` digits, each with two captions, such as "the digit seven" and "a 7"."""
    digits = load_digits()
    images = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images[:count]]
    texts = [[f"the digit {DIGITS[label]}", f"a {label}"] for label in digits.target[:count]]
    features = Features({"image": ImageFeature(), "text": List(Value("string"))})
    Dataset.from_dict({"image": images, "text": texts}, features).save_to_disk(folder)
    return folder
