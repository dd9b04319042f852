"""Editing with models that were not trained for it: what stays of a picture, and under which scheduler."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.oracle import (
    CASES,
    DEVIATION,
    MEAN,
    OBJECTIVES,
    GaussianOracle,
    build,
    oracle_pipeline,
    standard_noise,
)
from ldm_pipeline import __main__ as command_line
from ldm_pipeline import editing
from ldm_pipeline.loading import LDMPipeline
from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import fill, noise_levels, set_timesteps
from tests.test_pipeline import FLOW, generators, sample, tiny_pipe, tiny_vae
from tests.test_tasks import hole, photo, task_pipe

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


def test_a_grey_mask_is_a_strength():
    # This scheduler remembers nothing of the steps before.
    pipe = tiny_pipe(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    grey = Image.new("L", (16, 16), 128)
    options = {"image": PICTURE, "num_inference_steps": 10, "output_type": "latent"}
    masked = sample(pipe, mask_image=grey, generator=generators(0), **options)
    by_strength = sample(pipe, strength=128 / 255, generator=generators(0), **options)
    torch.testing.assert_close(masked, by_strength)
    # In pixels it is mixed as much with the picture.
    options["output_type"] = "pt"
    pixels, drawn, picture = (
        sample(pipe, mask_image=grey, generator=generators(0), **options),
        sample(pipe, strength=128 / 255, generator=generators(0), **options),
        torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 255,
    )
    torch.testing.assert_close(pixels, torch.lerp(picture, drawn, 128 / 255))


@pytest.mark.parametrize(
    "name", ["UniPCMultistep", "HeunDiscrete", "EDMEuler", "DDIM", "FlowMatchEulerDiscrete"]
)
def test_the_gradient_leads_to_what_is_known(name):
    """Restored pictures, degraded, are nearer to the given ones than pictures that know nothing of them."""
    pipe = tiny_pipe(scheduler=build_scheduler(FLOW, name))
    small = PICTURE.resize((8, 8))
    wanted = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255

    def error(weight):
        options = {
            "weight": weight,
            "num_inference_steps": 12,
            "generator": generators(0),
            "output_type": "pt",
        }
        restored = editing.restore(pipe, small, "downscale:2", **options)
        return (editing.operator("downscale:2")(restored) - wanted).square().mean()

    assert error(0.1) < 0.8 * error(0.0)
    known, pixels = np.asarray(MASK) == 0, np.asarray(PICTURE)
    options = {
        "method": "gradient",
        "num_inference_steps": 4,
        "output_type": "pil",
        "generator": generators(0),
    }
    painted = np.asarray(sample(pipe, image=PICTURE, mask_image=MASK, **options)[0])
    assert (painted[known] == pixels[known]).all() and (painted[~known] != pixels[~known]).any()


def test_a_gradient_needs_all_networks_at_once_and_offloading_goes_on_afterwards():
    small = PICTURE.resize((8, 8))
    pipes = [tiny_pipe(), tiny_pipe()]
    pipes[1].enable_model_cpu_offload(device="cpu")  # the hooks of an accelerator, without one
    options = {"num_inference_steps": 3, "output_type": "pt"}
    plain, offloaded = (
        editing.restore(pipe, small, "downscale:2", generator=generators(0), **options) for pipe in pipes
    )
    assert torch.equal(plain, offloaded)
    assert all(hasattr(part, "_hf_hook") for part in (pipes[1].unet, pipes[1].vae))


@pytest.mark.parametrize("name", ["PNDM", "LMSDiscrete"])
def test_schedulers_that_a_gradient_leads_astray_are_refused(name):
    pipe = tiny_pipe(scheduler=build_scheduler(FLOW, name))
    with pytest.raises(ValueError, match=f"{name}Scheduler cannot be led by a gradient"):
        editing.restore(pipe, PICTURE, "grey")


def test_operators_are_linear():
    one, two = torch.rand(2, 2, 3, 16, 16)
    for name in ("downscale:2", "downscale:4", "grey", "blur:1.5"):
        measure = editing.operator(name)
        torch.testing.assert_close(
            measure(2 * one - two), 2 * measure(one) - measure(two), rtol=1e-4, atol=1e-5
        )
    assert editing.operator("downscale:4")(one).shape == (2, 3, 4, 4)
    torch.testing.assert_close(
        editing.operator("blur:2")(torch.full((1, 3, 16, 16), 0.7)).mean(), torch.tensor(0.7)
    )


def test_other_sizes_than_that_of_the_training():
    pipe = tiny_pipe()
    assert sample(pipe, height=32, width=24).shape == (1, 3, 32, 24)
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("black", (0, 0, 10, 20))  # a quarter at the left, which the centre of a square lacks
    options = {"image": picture, "strength": 0.05, "num_inference_steps": 40}
    mask = {"mask_image": Image.new("L", picture.size), "strength": None}  # then all pixels are known
    cut = sample(pipe, **options | mask)
    padded = sample(pipe, resize_mode="pad", **options | mask)
    assert cut.shape == padded.shape == (1, 3, 16, 16)
    assert cut.min() > 0.9 and padded[..., :3].max() < 0.1
    torch.testing.assert_close(padded[:, :, 0], padded[:, :, 8])  # above and below, its border goes on
    wide = sample(pipe, height=16, width=32, **options | mask)
    assert (
        wide.shape == (1, 3, 16, 32) and (wide[0, 0, :, :7] < 0.1).all() and (wide[0, 0, :, 9:] > 0.9).all()
    )


def test_a_pixel_and_a_photograph_are_pictures_too():
    pipe = tiny_pipe()
    for size in ((1, 1), (1, 500), (4000, 3000)):
        options = {"image": Image.new("RGB", size, "white"), "mask_image": Image.new("L", size)}
        assert sample(pipe, **options).min() > 0.9  # all is known


# ---- functions of `editing`
PICTURES = [photo(20, 24), photo(16, 16), photo(30, 18)]


def oracle_like(objective, oracle):
    """An oracle's pipeline whose pictures are tiny."""
    return LDMPipeline(
        tiny_vae(), oracle, build_scheduler(objective, "UniPCMultistep"), objective, defaults=None
    )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 5, 30])
def test_an_inversion_returns_exactly(name, steps):
    pipe = oracle_like(OBJECTIVES[name], GaussianOracle(OBJECTIVES[name], 8))
    pipe.set_progress_bar_config(disable=True)
    clean = pipe.to_latents(PICTURES)
    for strength in (1.0, 0.4):
        inverted = editing.invert(pipe, PICTURES, num_inference_steps=steps, strength=strength)
        assert not torch.allclose(inverted.latents, clean, atol=1e-2)
        returned = editing.revert(pipe, inverted, output_type="latent")
        assert (returned - clean).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["flow", "v", "epsilon"])
def test_inverted_data_are_noise(name):
    """Latents of the oracle's Gaussian go to those of standard normal noise that probability flow gives."""
    pipe = oracle_like(OBJECTIVES[name], GaussianOracle(OBJECTIVES[name], 8))
    noise = standard_noise(4, 8)
    pipe.to_latents = lambda image: image
    pipe.set_progress_bar_config(disable=True)
    inverted = editing.invert(pipe, (MEAN + DEVIATION * noise).float(), num_inference_steps=60)
    assert (inverted.latents - noise).square().mean().sqrt() < 0.05


class ClassOracle(GaussianOracle):
    """The best denoiser of three classes, each a Gaussian of its own mean; exact for one label per call."""

    SHIFTS = torch.tensor([-3.0, 0.0, 3.0, 0.0])  # the last is the null class

    def __init__(self):
        super().__init__(OBJECTIVES["flow"], 8)
        self.register_to_config(num_class_embeds=4)
        self.rows = 0

    def forward(self, sample, timestep, class_labels, return_dict=False):
        self.rows += len(sample)
        outputs = []
        for row, label in zip(sample, class_labels, strict=True):
            self.mean = MEAN + self.SHIFTS[label] * DEVIATION
            outputs.append(super().forward(row[None], timestep)[0])
        return (torch.cat(outputs),)


@pytest.fixture
def classes():
    pipe = oracle_like(OBJECTIVES["flow"], ClassOracle())
    pipe.register_to_config(id2label={"0": "low", "1": "middle", "2": "high"})
    pipe.to_latents = lambda image: image
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(label, count=3):
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(label))
    return (MEAN + DEVIATION * (noise + ClassOracle.SHIFTS[label])).float()


def shares(latents):
    """Mean of latents in deviations of the oracle's class in the middle."""
    return ((latents - MEAN) / DEVIATION).mean((1, 2, 3))


@pytest.mark.parametrize("method", ["flowedit", "inversion"])
def test_an_edit_goes_from_class_to_class(classes, method):
    options = {"method": method, "num_inference_steps": 10, "output_type": "latent", "guidance_scale": 1.0}
    same = editing.edit(classes, drawn(0), "low", "low", generator=generators(0, 1, 2), **options)
    assert (same - drawn(0)).abs().max() < 1e-5
    far = [
        editing.edit(classes, drawn(0), 0, "high", strength, generator=generators(0, 1, 2), **options)
        for strength in (0.3, 0.6, 1.0)
    ]
    means = [shares(each).mean().item() for each in far]
    assert -3 < means[0] < means[1] < means[2] and abs(means[2] - 3) < 0.4
    # What both classes have in common stays: the latents around their mean.
    details = [
        ((each - MEAN) / DEVIATION - shares(each).view(-1, 1, 1, 1)).flatten() for each in (far[2], drawn(0))
    ]
    assert torch.corrcoef(torch.stack(details))[0, 1] > 0.95


def test_a_classifier_finds_the_class_in_as_many_evaluations_as_it_says(classes):
    pictures = torch.cat([drawn(2), drawn(0), drawn(1)])
    ranks = editing.classify(classes, pictures, ["low", "middle", 2], samples=(2, 6), keep=(2,))
    assert [rank.candidates[0] for rank in ranks] == [2] * 3 + ["low"] * 3 + ["middle"] * 3
    assert all(
        rank.candidates[2] == {2: "low", "low": 2}.get(rank.candidates[0], rank.candidates[2])
        for rank in ranks
    )
    assert all(rank.errors[0] < rank.errors[1] for rank in ranks)
    assert (
        ranks[0].evaluations == 2 * 3 + 4 * 2
        and classes.denoiser.rows == len(pictures) * ranks[0].evaluations
    )


def test_a_direction_changes_the_class(classes):
    way = editing.direction(classes, drawn(2, 20), drawn(0, 20), num_inference_steps=10, strength=0.5)
    still, moved = (
        editing.shift(classes, drawn(0), way, amount, output_type="latent") for amount in (0.0, 1.0)
    )
    assert (still - drawn(0)).abs().max() < 1e-5
    assert (shares(moved) > 1.5).all()


def test_a_row_of_pictures_begins_and_ends_with_those_that_are_given():
    pipe, ends = tiny_pipe(), PICTURES[:2]
    latents = pipe.to_latents(ends)
    for condition in ("cat", ["cat", "owl"], None):
        options = {"frames": 5, "num_inference_steps": 4, "output_type": "latent"}
        row = editing.interpolate(pipe, ends, condition, **options)
        assert len(row) == 5 and (row[[0, -1]] - latents).abs().max() < 1e-5
        steps = (row[1:] - row[:-1]).flatten(1).norm(dim=1)
        assert steps.max() < 0.9 * (row[0] - row[-1]).norm()
    drawn = editing.interpolate(pipe, condition=["cat", "owl"], generator=generators(3, 4), frames=3)
    assert [picture.size for picture in drawn] == [(16, 16)] * 3


def test_between_noise_and_noise_the_norm_stays():
    first, last = torch.randn(2, 4, 8, 8)
    last = last * first.norm() / last.norm()
    row = editing.slerp(first, last, torch.linspace(0, 1, 7))
    torch.testing.assert_close(row.flatten(1).norm(dim=1), first.norm().expand(7))
    torch.testing.assert_close(row[[0, -1]], torch.stack([first, last]))
    torch.testing.assert_close(editing.slerp(first, first, torch.tensor([0.3]))[0], first)


def test_an_edited_picture_does_not_depend_on_its_batch_nor_much_on_the_precision():
    pipe = tiny_pipe()

    def both(rows, seeds):
        options = {"num_inference_steps": 4, "output_type": "pt"}
        edited = editing.edit(pipe, rows, "cat", "dog", generator=generators(*seeds), **options)
        return torch.cat(
            [edited, editing.restore(pipe, rows, "grey", generator=generators(*seeds), **options)]
        )

    rows = [picture.resize((16, 16)) for picture in PICTURES]
    together = both(rows, (3, 4, 5))
    torch.testing.assert_close(together[[1, 4]], both(rows[1:2], (4,)), rtol=1e-4, atol=1e-4)
    pipe.to(torch.bfloat16)
    assert (both(rows, (3, 4, 5)) - together).abs().mean() < 0.05


def test_the_command_line_draws_and_edits_like_python(tmp_path, capsys, monkeypatch):
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path / "model")
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
    MASK.resize(PICTURES[0].size).save(tmp_path / "mask.png")
    files = [str(tmp_path / f"{number}.png") for number in range(3)]

    def run(command, *options):
        argv = ["ldm", command, str(tmp_path / "model"), *options, "--output", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", argv)
        command_line.main()
        return capsys.readouterr().out.split("\n")[:-1]

    few = ("--num_inference_steps", "3")
    (first, second) = run("sample", "--class_labels", "cat", "2", "--seed", "5", *few)
    with Image.open(second) as picture:
        said = json.loads(picture.info["parameters"])
        wanted = pipe(class_labels=["cat", 2], generator=generators(5, 6), num_inference_steps=3).images[1]
        assert np.array_equal(picture, wanted)
    assert said["seed"] == 6 and said["class_labels"] == ["cat", "2"] and said["command"] == "sample"
    assert run("sample", *few) == [str(tmp_path / "out" / "sample-0002.png")]  # nothing is written over
    assert len(run("sample", *files[:2], "--strength", "0.5", "--num_images_per_prompt", "2", *few)) == 4
    assert len(run("inpaint", files[0], "--mask_image", str(tmp_path / "mask.png"), *few)) == 1
    assert len(run("edit", *files, "--source", "cat", "--target", "dog", "owl", "2", *few)) == 3
    assert len(run("restore", files[1], "--degradation", "grey", *few)) == 1
    assert len(run("interpolate", *files[:2], "--frames", "3", *few)) == 3
    assert (
        run("classify", files[0], "--candidates", "cat", "dog", "--samples", "[2]", "--keep", "[]")[0].count(
            "("
        )
        == 2
    )
    monkeypatch.setattr(
        "sys.argv",
        ["ldm", "interpolate", str(tmp_path / "model"), *few, "--output", str(tmp_path / "row.webp")],
    )
    command_line.main()
    with Image.open(tmp_path / "row.webp") as animation:
        assert animation.n_frames == 14  # eight, and six back
    monkeypatch.setattr("sys.argv", ["ldm", "sample", str(tmp_path / "model"), "--output", "drawn.png"])
    with pytest.raises(SystemExit, match="--output drawn.png; wanted a folder"):
        command_line.main()
    (tmp_path / "text.png").write_text("no picture")
    for options, message in (
        (("edit", str(tmp_path / "text.png"), "--target", "dog"), "text.png cannot be read as a picture"),
        (("edit", str(tmp_path / "none.png"), "--target", "dog"), "none.png cannot be read"),
        (
            ("edit", files[0], "--target", "horse"),
            "class_labels has 'horse'; wanted a number from 0 to 2 or one",
        ),
        (("sample", "--dtype", "int8"), "--dtype int8; wanted float32"),
        (("classify", files[0], "--candidates", "cat"), "1 candidates, .* wanted two candidates or more"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*options)


WRONG_CALLS = {
    "a model of a task": lambda pipe: editing.invert(task_pipe({"kind": "colorize"}), PICTURE),
    "classes for pictures": lambda pipe: editing.invert(pipe, PICTURES, ["cat", "dog"]),
    "strength": lambda pipe: editing.edit(pipe, PICTURE, 0, 1, strength=1.5),
    "no strength": lambda pipe: editing.edit(pipe, PICTURE, 0, 1, strength=0),
    "method": lambda pipe: editing.edit(pipe, PICTURE, 0, 1, method="sdedit"),
    "no picture": lambda pipe: editing.invert(pipe, []),
    "one frame": lambda pipe: editing.interpolate(pipe, frames=1),
    "three ends": lambda pipe: editing.interpolate(pipe, PICTURES),
    "operator": lambda pipe: editing.restore(pipe, PICTURE, "sharpen"),
    "size": lambda pipe: editing.restore(pipe, PICTURE, "downscale:2"),
    "one candidate": lambda pipe: editing.classify(pipe, PICTURE, ["cat"]),
    "rounds": lambda pipe: editing.classify(pipe, PICTURE, ["cat", "dog"], samples=(4, 16), keep=()),
    "prompt": lambda pipe: editing.invert(pipe, PICTURE, {"prompt": "a cat"}),
    "NaN": lambda pipe: editing.invert(pipe, np.full((16, 16, 3), np.nan)),
}
MESSAGES = {
    "a model of a task": "trained for the task colorize.*wanted a model without a task",
    "classes for pictures": "class_labels has 2 entries for 3 pictures",
    "strength": "strength=1.5",
    "no strength": "strength=0",
    "method": "method='sdedit'; wanted 'flowedit' or 'inversion'",
    "no picture": "image is an empty list",
    "one frame": "frames=1",
    "three ends": "3 pictures are given; wanted one or two",
    "operator": "degradation='sharpen'; wanted 'downscale:F'",
    "size": r"shape \(3, 16, 16\), but downscale:2 makes \(3, 8, 8\)",
    "one candidate": "1 candidates",
    "rounds": r"keep=\(\); wanted",
    "prompt": "prompt is given, but this model was trained without text",
    "NaN": "values from nan to nan",
}


@pytest.mark.parametrize("fault", WRONG_CALLS)
def test_what_cannot_be_edited_is_refused(fault):
    with pytest.raises(ValueError, match=MESSAGES[fault]):
        WRONG_CALLS[fault](tiny_pipe())


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
        ({"image": PICTURE, "method": "gradient"}, "'gradient' with an image and a mask_image"),
        ({"image": PICTURE, "resize_mode": "stretch"}, "resize_mode='stretch'; wanted 'crop' or 'pad'"),
        ({"height": 18}, "height=18; wanted a multiple of 4"),
        ({"image": PICTURE, "mask_image": "hole.png"}, "mask_image is str"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_pipe(), **options)
