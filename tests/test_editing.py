"""Editing with models that were not trained for it: what stays of a picture, and under which scheduler."""

import numpy as np
import pytest
import torch

from benchmarks.oracle import CASES, OBJECTIVES, build, oracle_pipeline
from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import fill, noise_levels, set_timesteps
from tests.test_pipeline import FLOW, generators, sample, tiny_pipe
from tests.test_tasks import hole, photo

PICTURE, MASK = photo(16, 16), hole(16, 16, (3, 5, 9, 12))


def levels_of(pipe, steps):
    set_timesteps(pipe.scheduler, steps)
    return noise_levels(pipe.scheduler, pipe.objective)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("PNDM")])
def test_a_strength_is_the_same_noise_under_every_scheduler(case):
    pipe = oracle_pipeline(OBJECTIVES["flow" if "flow" in case else "epsilon"], build(case))
    levels, order = levels_of(pipe, 12), pipe.scheduler.order
    begin = pipe._begin(0.5)
    assert levels[begin] <= 0.5 < levels[begin - order] and begin % order == 0 and pipe._begin(1.0) == 0
    with pytest.raises(ValueError, match="strength=1e-06 is below the last noise level of the 12 steps"):
        pipe._begin(1e-6)


def test_more_strength_leaves_less_of_the_picture():
    pipe = tiny_pipe()
    latents = pipe.encode(torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 255)
    options = {"image": PICTURE, "num_inference_steps": 20, "output_type": "latent"}
    far = [
        (sample(pipe, strength=strength, generator=generators(0), **options) - latents).square().mean().item()
        for strength in (0.1, 0.3, 0.6, 0.9)
    ]
    assert far == sorted(far) and far[0] < 0.1 * far[-1]
    default, named = (
        sample(pipe, generator=generators(0), **options, **more) for more in ({}, {"strength": 0.6})
    )
    assert torch.equal(default, named)


@pytest.mark.parametrize("name", ["UniPCMultistep", "HeunDiscrete", "EDMEuler", "DDIM", "KDPM2Discrete"])
def test_what_is_known_stays_and_what_is_not_is_painted(name):
    pipe = tiny_pipe(scheduler=build_scheduler(FLOW, name))
    known, pixels = np.asarray(MASK) == 0, np.asarray(PICTURE)
    options = {"num_inference_steps": 5, "output_type": "pil"}
    painted = np.asarray(sample(pipe, image=PICTURE, mask_image=MASK, generator=generators(0), **options)[0])
    assert (painted[known] == pixels[known]).all() and (painted[~known] != pixels[~known]).any()
    everything, nothing = hole(16, 16, (0, 0, 16, 16)), hole(16, 16, (0, 0, 0, 0))
    free = sample(pipe, generator=generators(0), **options)[0]
    for mask, wanted in ((nothing, PICTURE), (everything, free)):
        found = sample(pipe, image=PICTURE, mask_image=mask, generator=generators(0), **options)[0]
        assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_latents_outside_the_hole_end_as_those_of_the_picture():
    pipe = tiny_pipe()
    latents = sample(pipe, image=PICTURE, mask_image=MASK, output_type="latent", generator=generators(0))
    picture = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 255
    mask = torch.from_numpy(np.asarray(MASK) > 0)[None, None]
    free = torch.nn.functional.max_pool2d(mask.float(), 16 // latents.shape[-1]) > 0
    kept = pipe.encode(fill(picture, mask))
    assert torch.allclose(latents.masked_select(~free), kept.masked_select(~free), atol=1e-5)
    assert not torch.allclose(latents.masked_select(free), kept.masked_select(free), atol=1e-2)


def test_a_hole_is_filled_by_what_is_around_it():
    images, mask = torch.rand(2, 3, 20, 20), torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    mask[0, :, 4:15, 3:17], mask[1] = True, True
    images[0, :, :, :10], images[0, :, :, 10:] = 0.25, 0.75
    filled = fill(images, mask)
    assert torch.equal(filled[0][:, ~mask[0, 0]], images[0][:, ~mask[0, 0]])
    inside = filled[0][:, mask[0, 0]]
    assert inside.min() >= 0.25 and inside.max() <= 0.75 and filled[0, 0, 9, 3] == 0.25
    assert (filled[1] == 0.5).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 0.5}, "strength is given, but no image"),
        ({"mask_image": MASK}, "mask_image is given, but no image"),
        ({"image": PICTURE, "strength": 0}, r"strength=0; wanted a noise level above 0 and up to 1"),
        ({"image": PICTURE, "strength": 1.2}, "strength=1.2; wanted"),
        (
            {"image": PICTURE, "strength": 0.01, "num_inference_steps": 4},
            "below the last noise level of the 4",
        ),
        ({"image": PICTURE, "mask_image": hole(8, 16, (0, 0, 4, 4))}, "mask_image has height and width"),
        ({"image": []}, "one positive number of images is wanted"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_pipe(), **options)
