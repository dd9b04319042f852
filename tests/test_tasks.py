"""Tasks: what the call makes of an image, what training draws, and that both are the same."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

from ldm_pipeline import LDMPipeline
from ldm_pipeline.pipeline import Condition, Task, denoise, fit, luminance, to_pixels
from tests.test_loading import WITHOUT_THE_PACKAGE, run
from tests.test_pipeline import FLOW, NAMES, generators, sample, tiny_pipe, tiny_unet, tiny_vae

INPAINT, SUPERRES, COLORIZE = {"kind": "inpaint"}, {"kind": "superres", "factor": 4}, {"kind": "colorize"}
COLUMN = {"kind": "column", "column": "map", "nearest": True}


def task_pipe(task, channels=3, size=8):
    """A tiny pipeline of a task, for images of 16 pixels."""
    vae, unet = tiny_vae(channels=channels), tiny_unet(size=size)
    unet.conv_in = torch.nn.Conv2d(4 + Task(task).channels(4), 8, 3, padding=1)
    unet.register_to_config(in_channels=4 + Task(task).channels(4))
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, **FLOW)
    pipe = LDMPipeline(vae, unet.eval(), scheduler, objective=FLOW, id2label=NAMES, task=task)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo(width, height, mode="RGB", seed=0):
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def hole(width, height, box):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def test_a_coloured_picture_keeps_its_brightness():
    grey = 0.4 + 0.2 * torch.rand(2, 1, 16, 16)  # where there is room for colours
    coloured = sample(task_pipe(COLORIZE), image=grey, generator=generators(0, 1))
    assert coloured.shape == (2, 3, 16, 16) and (coloured - grey).abs().max() > 1e-3
    inside = ((coloured > 0) & (coloured < 1)).all(1, keepdim=True)
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(luminance(coloured)[inside], grey[inside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_known_pixels_of_an_inpainted_picture_are_the_given_ones(channels):
    pipe = task_pipe(INPAINT, channels)
    picture, mask = photo(16, 16, "L" if channels == 1 else "RGB"), hole(16, 16, (3, 5, 9, 12))
    known, pixels = np.asarray(mask) == 0, np.asarray(picture)
    options = {"image": picture, "mask_image": mask}
    painted = np.asarray(sample(pipe, output_type="pil", **options)[0])
    assert (painted[known] == pixels[known]).all() and (painted[~known] != pixels[~known]).any()
    exact = torch.rand(2, channels, 16, 16)
    given = {"image": exact, "mask_image": torch.from_numpy(~known), "generator": generators(0, 1)}
    for name in ("pt", "np"):
        result = sample(pipe, output_type=name, **given)
        result = result if name == "pt" else torch.from_numpy(result).permute(0, 3, 1, 2)
        assert torch.equal(result[..., torch.from_numpy(known)], exact[..., torch.from_numpy(known)])
    # Another size and shape: the centre, resized.
    large, mask = photo(80, 50), hole(80, 50, (30, 10, 50, 30))
    found = np.asarray(sample(pipe, output_type="pil", image=large, mask_image=mask)[0])
    resized = fit(to_pixels(large.convert("L") if channels == 1 else large)[0][None], (16, 16))[0]
    resized = (resized.permute(1, 2, 0) * 255).round().byte().numpy().reshape(found.shape)
    covered = np.zeros((16, 16), bool)
    covered[3:10, 4:12] = True  # pixels that the hole touches: rows 10 / 3.125 to 30 / 3.125, and so on
    assert (abs(found[~covered].astype(int) - resized[~covered]) <= (channels == 1)).all()
    assert (found[covered] != resized[covered]).any()


def test_a_latent_is_known_only_if_all_of_its_pixels_are():
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 5, 7] = True
    concat = Task(INPAINT).concat(torch.zeros(1, 4, 4, 4), mask)
    assert concat.shape == (1, 5, 4, 4) and concat[:, 4].nonzero().tolist() == [[0, 1, 1]]
    shown = Task(INPAINT).shown(torch.rand(1, 3, 16, 16), (16, 16), mask)
    assert (shown[..., 5, 7] == 0.5).all()


def test_the_hidden_pixels_do_not_matter():
    pipe, mask = task_pipe(INPAINT), hole(16, 16, (4, 4, 12, 12))
    other = photo(16, 16)
    other.paste((1, 2, 3), (4, 4, 12, 12))
    first, second = (sample(pipe, image=each, mask_image=mask) for each in (photo(16, 16), other))
    assert torch.equal(first, second)


def test_every_size_mode_and_container_of_an_image():
    """Pictures of the same scene give the same; a small image of superres is not resampled before."""
    pipe, grey, rgb = task_pipe(COLORIZE), photo(23, 40, "L"), photo(23, 40)
    tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    wanted = sample(pipe, image=rgb)
    opaque = rgb.copy()
    opaque.putalpha(255)
    for same in ([rgb], np.array(rgb), np.array(rgb) / 255, tensor, tensor[None] / 255, opaque, (tensor,)):
        torch.testing.assert_close(sample(pipe, image=same), wanted, rtol=1e-4, atol=1e-4)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    others = [grey, deep, np.array(grey), grey.convert("LA"), grey.convert("RGB"), grey.convert("P")]
    results = [sample(pipe, image=other) for other in others]
    assert all(torch.allclose(result, results[0], atol=1e-3) for result in results)
    clear = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    assert (to_pixels(clear)[0] == 1).all() and to_pixels(Image.new("1", (4, 6), 1))[0].shape == (1, 6, 4)
    small = photo(4, 4)
    low = Task(SUPERRES).low_resolution(to_pixels(small)[0][None], (16, 16))
    assert torch.equal(low[0], to_pixels(small)[0])
    label_map = to_pixels(Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)))[0][None]
    assert Task(COLUMN).shown(label_map, (16, 16)).unique().tolist() == [0, 1]


def test_images_labels_and_copies_make_one_batch():
    pipe, pictures = task_pipe(SUPERRES), [photo(4, 4), photo(20, 30, "L")]
    both = sample(pipe, image=pictures, generator=generators(0, 1), class_labels="dog", guidance_scale=2.0)
    options = {"class_labels": 1, "guidance_scale": 2.0}
    for number, picture in enumerate(pictures):
        alone = sample(pipe, image=picture, generator=generators(number), **options)
        torch.testing.assert_close(both[number : number + 1], alone, rtol=1e-4, atol=1e-4)
    assert len(sample(pipe, image=pictures, num_images_per_prompt=2, generator=None)) == 4
    assert len(sample(pipe, image=pictures[0], batch_size=3, generator=None)) == 3
    size = sample(pipe, image=pictures[0], latents=torch.randn(1, 4, 12, 8), generator=None).shape
    assert size == (1, 3, 24, 16)


def test_guidance_keeps_the_image():
    """At scale 0 the class is dropped, the image is not."""
    pipe, seen = task_pipe(COLORIZE), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sample(pipe, image=photo(16, 16), class_labels=0, guidance_scale=3.0)
    assert all(torch.equal(*noisy[:, 4:].chunk(2)) and noisy[:, 4:].any() for noisy in seen)


def test_superres_is_told_its_noise_level():
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    task, level = Task(SUPERRES), torch.tensor([0.0, 0.3])
    concat = task.concat(latents, level=level, noise=noise)
    assert torch.equal(concat[0, :4], latents[0]) and torch.equal(concat[:1], task.concat(latents)[:1])
    torch.testing.assert_close(concat[1, :4], 0.91**0.5 * latents[1] + 0.3 * noise[1])
    assert (concat[1, 4] == 0.3).all() and (concat[0, 4] == 0).all()


PICTURE, MASK = photo(16, 16), hole(16, 16, (0, 0, 8, 8))


@pytest.mark.parametrize(
    "task, options, message",
    [
        (INPAINT, {}, "image is missing: .* inpaint wants image and mask_image"),
        (INPAINT, {"image": PICTURE}, "mask_image is missing"),
        (INPAINT, {"mask_image": MASK}, "image is missing"),
        (INPAINT, {"image": PICTURE, "mask_image": hole(8, 8, (0, 0, 1, 1))}, r"\(8, 8\), its image"),
        (COLORIZE, {"class_labels": 1}, "image is missing: .* colorize wants image"),
        (COLORIZE, {"image": PICTURE, "mask_image": MASK}, "mask_image is given, but the task colorize"),
        (COLORIZE, {"image": [PICTURE] * 2, "batch_size": 3}, "'image': 2"),
        (COLORIZE, {"image": "photo.png"}, "image is str"),
        (COLORIZE, {"image": torch.rand(5, 16, 16)}, "5 channels"),
        (COLORIZE, {"image": torch.rand(3, 16, 16) * 2 - 1}, "values from -"),
        (COLORIZE, {"image": torch.full((3, 16, 16), torch.nan)}, "values from nan"),
        (COLORIZE, {"image": []}, "'image': 0"),
        (None, {"mask_image": MASK}, "mask_image is given, but no image"),
    ],
)
def test_images_that_cannot_be_meant_are_refused(task, options, message):

    with pytest.raises(ValueError, match=message):
        (tiny_pipe() if task is None else task_pipe(task))(**options)


@pytest.mark.parametrize(
    "task", [{"kind": "paint"}, {"kind": "superres"}, {"kind": "inpaint", "factor": 2}, "inpaint", {}]
)
def test_what_is_no_task(task):
    with pytest.raises(ValueError, match="task=.*superres"):
        Task(task)


def test_a_network_of_another_task_is_refused():
    pipe = task_pipe(COLORIZE)
    for task in (None, INPAINT):
        with pytest.raises(ValueError, match="in_channels=8, but task="):
            LDMPipeline(**pipe.components, objective=FLOW, task=task)


def test_a_task_travels_with_its_model(tmp_path):
    """In a process without the package the folder paints the same picture."""
    pipe = task_pipe(INPAINT)
    (tmp_path / "model").mkdir()
    pipe.save_pretrained(tmp_path / "model")
    assert LDMPipeline.from_pretrained(tmp_path / "model").config.task == INPAINT
    PICTURE.save(tmp_path / "picture.png"), MASK.save(tmp_path / "mask.png")
    script = WITHOUT_THE_PACKAGE + (
        "from diffusers.utils import load_image\n"
        "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)\n"
        "given = dict(image=load_image('picture.png'), mask_image=load_image('mask.png'))\n"
        "options = dict(num_inference_steps=3, output_type='np', class_labels='dog')\n"
        "images = pipe(generator=[torch.Generator().manual_seed(5)], **given, **options).images\n"
        "numpy.save('painted.npy', images)\n"
    )
    finished = run(script, tmp_path / "model", tmp_path, installed=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    options = {"num_inference_steps": 3, "output_type": "np", "class_labels": "dog"}
    own = sample(pipe, image=PICTURE, mask_image=MASK, generator=generators(5), **options)
    np.testing.assert_allclose(np.load(tmp_path / "painted.npy"), own, atol=1e-5)


def test_denoise_concatenates_behind_the_noise():
    pipe, noisy, concat = task_pipe(COLORIZE), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    labels, times = torch.tensor([0, 1]), torch.tensor([10.0, 900.0])
    condition = Condition(class_labels=labels, concat=concat)
    with torch.no_grad():
        wanted = pipe.unet(torch.cat([noisy, concat], 1), times, class_labels=labels).sample
        assert torch.equal(denoise(pipe.unet, noisy, times, condition), wanted)
