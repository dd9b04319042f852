"""Training of tasks: one global batch whoever draws it, caches that say what pixels say, refusals at once."""

import json
import pickle
import shutil
import signal

import datasets
import numpy as np
import pytest
import torch
from chaos import differences
from conftest import TINY, launch, start
from PIL import Image

from ldm_pipeline import LDMPipeline, export_for_hub
from ldm_pipeline.loading import load_autoencoder
from ldm_pipeline.models import build_autoencoder
from ldm_pipeline.pipeline import Condition, Task, denoise, set_latent_statistics
from training.config import DataConfig, RunError, parse_config
from training.data.images import load_images
from training.data.order import StepSampler, batch_slices
from training.data.scan import check_pairs
from training.data.tasks import TaskImages, draw_hole, image_conditions, shown, task_of
from training.runtime.record import read_record
from training.runtime.signals import EXIT_CODE

DIGITS = DataConfig(dataset="digits", resolution=16, channels=1)


def task(name, data=None):
    return task_of(parse_config(["--config", str(TINY), f"--denoiser.task={name}"]).denoiser, data)


def untrained_autoencoder():
    torch.manual_seed(0)
    autoencoder = build_autoencoder("AutoencoderDC", [8, 16], [0, 1], 4, 1, 16).eval()
    set_latent_statistics(autoencoder, [0.0] * 4, [1.0] * 4)
    return autoencoder


def check_slices(conditions, count, flips=True):
    """Whole batches are those of two processes in two parts each, and of a run that goes on at step 1."""
    whole = list(conditions.batches(StepSampler(count, 8, 3, range(3), flips)))
    parts = [
        list(conditions.batches(StepSampler(count, 8, 3, range(1, 3), flips, batch_slices(8, rank, 2, 2))))
        for rank in (0, 1)
    ]
    for step in (1, 2):
        own = [rows[2 * (step - 1) : 2 * step] for rows in parts]
        torch.testing.assert_close(torch.cat([*own[0], *own[1]]), whole[step], rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole[0], whole[1])
    return whole


@pytest.mark.parametrize("name", ["inpaint", "deblur", "enhance"])
def test_what_is_random_is_a_function_of_seed_step_and_row(name):
    data = load_images(DIGITS)
    conditions = image_conditions(task(name), data, "train", untrained_autoencoder(), None, "auto")
    whole = check_slices(conditions, len(data.train))
    assert whole[0].shape == (8, 4 + (name == "inpaint"), 8, 8)
    indices = torch.tensor([5, 9])
    both = conditions.of(indices, 0, "validation")
    assert torch.equal(both, conditions.of(indices, 0, "validation"))
    torch.testing.assert_close(both[1:], conditions.of(indices[1:], 0, "validation"))
    copied = pickle.loads(pickle.dumps(conditions.images))  # what workers receive that are spawned
    assert torch.equal(copied[4, True, 1, 2]["image"], conditions.images[4, True, 1, 2]["image"])


def test_holes():
    """A quarter of the images is hidden altogether; the others have holes of all sizes, and each has one."""
    shares = [draw_hole(32, torch.Generator().manual_seed(seed)).float().mean().item() for seed in range(400)]
    whole = sum(share == 1 for share in shares) / len(shares)
    others = np.array([share for share in shares if share < 1])
    assert abs(whole - 0.25) < 0.07 and min(shares) > 0
    assert 0.1 < others.mean() < 0.3 and others.min() < 0.03 and others.max() > 0.5


def test_superres_end_to_end(tiny_run, tmp_path, monkeypatch):
    """On a finished run: images are not encoded again; the cache says what the call says; figures, grids."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    options = ["--output_dir", run, "--denoiser.task=superres:2"]
    shard = run / "latents" / "train-00000.safetensors"
    before = shard.stat().st_mtime_ns
    refused = launch("train_ldm.py", *options, check=False)
    assert refused.returncode == 2 and "denoiser.task changed" in refused.stderr
    finished = launch("train_ldm.py", *options, "--redo=[denoiser]")
    assert shard.stat().st_mtime_ns == before and 'pipe(image=image, class_labels="0")' in finished.stdout
    again = launch("train_ldm.py", *options)
    assert "pipeline stands" in again.stdout and "latents stands" in again.stdout

    pipe = LDMPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.task == {"kind": "superres", "factor": 2} and pipe.unet.config.in_channels == 9
    data, autoencoder = load_images(DIGITS), load_autoencoder(run / "autoencoder").eval()
    conditions = image_conditions(pipe.task, data, "train", autoencoder, run / "latents", "disk")
    check_slices(conditions, len(data.train))
    noisy = next(conditions.batches(StepSampler(len(data.train), 64, 3, range(1))))
    assert 0 < noisy[:, 4].min() and 0.3 < noisy[:, 4].max() < 0.35

    # Cached, live, and at the call.
    indices = torch.tensor([3, 1001])
    cached = conditions.of(indices)
    items = torch.stack([TaskImages(pipe.task, data, "train")[i, False]["image"] for i in indices.tolist()])
    low = pipe.task.low_resolution(items, (16, 16))
    concat = pipe._image_condition(*pipe._pixels(list(low), None, [16, 16]), [16, 16])
    torch.testing.assert_close(cached, concat, rtol=2e-3, atol=5e-3)  # float16 on disk
    live = pipe.task.concat(pipe.encode(shown(pipe.task, {"image": items})))
    torch.testing.assert_close(live, concat, rtol=1e-4, atol=1e-4)

    # The card, from the run.
    export_for_hub(run / "pipeline", tmp_path / "hub", "org/big", "mit", record=read_record(run))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "A class-conditional and image-conditional" in card and "brought to 1/2 of the size" in card
    assert "samples.png" in card and "image-to-image" in card and "consistency PSNR-64" in card
    snippet = card.split("```python")[1].split("```")[0].split("trust_remote_code=True)")[1]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20)).save("image.png")
    exec(snippet, {"pipe": pipe})
    assert Image.open("sample.png").size == (16, 16)
    assert "samples.png" not in read_record(run, show_data=False).pictures

    figures = json.loads((run / "metrics.json").read_text())["samples"]["figures"]
    assert figures["PSNR-64"] > 3 and figures["consistency PSNR-64"] > figures["PSNR-64"]
    assert Image.open(run / "samples" / "denoiser-0000012-ema.png").height > 600  # three rows for one


def test_a_stopped_run_of_inpainting_ends_in_the_same_bits(tiny_run, tmp_path):
    straight, stopped = (shutil.copytree(tiny_run, tmp_path / name) for name in ("straight", "stopped"))
    options = ["--denoiser.task=inpaint", "--data.num_workers=1", "--redo=[denoiser]"]
    launch("train_denoiser.py", "--output_dir", straight, *options)
    log = stopped / "metrics.jsonl"
    log.unlink()
    with start("train_denoiser.py", "--output_dir", stopped, *options) as process:
        process.wait_until(lambda: log.exists() and '"stage": "denoiser"' in log.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait() == EXIT_CODE
    launch("train_denoiser.py", "--output_dir", stopped, *options)
    differing = differences(straight, stopped)
    assert set(differing) <= {"metrics.jsonl"}  # with a line more at the step of the signal


def test_a_model_that_is_shown_the_answer_tells_it_from_another(tmp_path):
    """The task `column` with the image itself: the error is much larger where another image is shown."""
    untrained_autoencoder().save_pretrained(tmp_path / "vae")
    options = [f"--autoencoder.pretrained={tmp_path / 'vae'}", "--denoiser.task=column:image"]
    options += [f"--denoiser.{name}_every=100" for name in ("validate", "sample", "checkpoint")]
    options += ["--denoiser.max_steps=60", "--denoiser.learning_rate=4e-3", "--denoiser.dropout=0"]
    for script in ("train_autoencoder.py", "encode_latents.py", "train_denoiser.py"):
        launch(script, "--output_dir", tmp_path / "run", *options, "--denoiser.class_conditional=false")
    pipe, data = LDMPipeline.from_pretrained(tmp_path / "run" / "pipeline"), load_images(DIGITS)
    pixels = torch.stack([data.held_out[index, False]["images"] for index in range(64)]) / 2 + 0.5
    clean = pipe.encode(pixels)
    concat = pipe._image_condition(*pipe._pixels(list(pixels), None, [16, 16]), [16, 16])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy, timesteps, errors = 0.4 * clean + 0.6 * noise, torch.tensor(600.0), []
    for condition in (Condition(concat=concat), Condition(concat=concat.roll(1, 0))):
        with torch.no_grad():
            prediction = denoise(pipe.unet, noisy, timesteps, condition)
        errors.append((prediction - (noise - clean)).square().mean().item())
    assert errors[0] < 0.5 * errors[1], errors


def pairs(count=12, size=(20, 12), **changes):
    """Pictures with maps of three colours, as palette pictures of half the size; `changes` by row of maps."""
    generator = np.random.default_rng(0)
    rows = {"image": [], "map": []}
    for row in range(count):
        rows["image"].append(Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), np.uint8)))
        labels = Image.fromarray(generator.integers(0, 3, (size[1] // 2, size[0] // 2), np.uint8), "P")
        labels.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        rows["map"].append(changes.get(f"row{row}", labels))
    features = datasets.Features({name: datasets.Image() for name in rows})
    return datasets.Dataset.from_dict(rows, features=features)


def load(path, **options):
    config = {"dataset": str(path), "resolution": 8, "held_out": 0.25} | options
    return load_images(DataConfig(**config), paired_column="map")


def test_a_paired_map_keeps_its_colours_and_its_place(tmp_path):
    rows = pairs()
    rows.save_to_disk(tmp_path / "set")
    data = load(tmp_path / "set")
    check_pairs(data)
    column = task("column:map", data)
    assert column.config == {"kind": "column", "column": "map", "nearest": True}
    images = TaskImages(column, data, "train")
    for index in range(len(data.train)):
        mirrored, plain = (images[index, flip]["image"] for flip in (True, False))
        assert torch.equal(mirrored, plain.flip(-1)) and set(plain.unique().tolist()) == {0, 1}
        assert torch.equal(plain.sum(0), torch.ones(8, 8))  # pure colours
        original = rows[int(data.train.rows[index])]["map"].convert("RGB").crop((2, 0, 8, 6))
        original = torch.from_numpy(np.array(original)).permute(2, 0, 1)[None] / 255
        assert torch.equal(Task(column.config).shown(original, (8, 8))[0], plain)  # as at the call
    photos = load_images(DataConfig(dataset=str(tmp_path / "set"), image_column="map"), paired_column="image")
    assert not task("column:image", photos).config["nearest"]


def test_pairs_that_are_none_are_refused_before_the_first_step(tmp_path):
    pairs(row3=None, row5=Image.new("P", (12, 20))).save_to_disk(tmp_path / "set")
    with pytest.raises(RunError, match="2 of .*cannot be paired") as error:
        data = load(tmp_path / "set", held_out=0.09)
        check_pairs(data)
    assert "no image" in str(error.value) and "it is 12x20, its image 20x12" in str(error.value)
    with pytest.raises(RunError, match="column:depth: 'depth' is no column of images; found: image"):
        load_images(DataConfig(dataset=str(tmp_path / "set")), paired_column="depth")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--denoiser.task=paint"], "--denoiser.task paint.*want inpaint, superres"),
        (["--denoiser.task=superres:3"], "--data.resolution 16 is no multiple of 3"),
        (["--denoiser.task=superres:1"], "want inpaint, superres"),
        (["--denoiser.task=column:"], "want inpaint, superres"),
        (["--denoiser.task=colorize"], "grey images have no colours"),
    ],
)
def test_tasks_that_cannot_work_are_refused_by_their_option(options, message):
    with pytest.raises(RunError, match=message):
        parse_config(["--config", str(TINY), *options])


def test_the_plan_shows_conditions(tmp_path):
    finished = launch("train_ldm.py", "--output_dir", tmp_path, "--denoiser.task=inpaint", "--dry_run")
    assert "what the networks will see" in finished.stdout
    assert Image.open(tmp_path / "samples" / "data.png").height > 1500  # 64 images and their conditions
