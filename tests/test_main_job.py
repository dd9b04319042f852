"""The main job as its users run it: real processes, real files."""

import json
import re
import shutil
import sqlite3
from contextlib import closing

import pytest
import torch
from conftest import launch
from fork_server import Child, environment
from PIL import Image
from safetensors.torch import load_file

from ldm_pipeline import LDMPipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_images_in_pipeline_out(tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    reconstruction = metrics["reconstruction"]
    assert 5 < reconstruction["PSNR"] < 60 and 0 < reconstruction["SSIM"] <= 1
    assert 0 < metrics["val_loss"] < 10
    assert all(seconds > 0 for seconds in metrics["seconds"].values())
    ends = ("samples.png", "reconstructions.png", "neighbours.png")
    for name in (*ends, "autoencoder-0000012.png", "denoiser-0000012-ema.png"):
        assert Image.open(tiny_run / "samples" / name).size[0] > 300
    pipe = LDMPipeline.from_pretrained(tiny_run / "pipeline")
    image = pipe(class_labels="7", num_inference_steps=2).images[0]
    assert image.size == (16, 16) and image.mode == "L"
    assert not list(tiny_run.rglob("*.tmp*"))


def test_tensorboard_gets_each_stage_apart_with_all_its_numbers(tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = {"autoencoder": {"loss", "psnr"}, "denoiser": {"val_loss", "val_loss_by_timestep_7"}}
    for stage, names in written.items():
        events = EventAccumulator(str(tiny_run / "logs" / f"run-{stage}")).Reload()
        tags = set(events.Tags()["scalars"])
        assert {f"{stage}/{name}" for name in names} <= tags
        assert {tag.split("/")[0] for tag in tags} == {stage}
        assert [event.step for event in events.Scalars(f"{stage}/loss")] == [2, 4, 6, 8, 10, 12]


def test_trackio_gets_the_same_lines_on_this_machine(tmp_path):
    own = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    options = ("--output_dir", tmp_path / "run", "--trackers", "[trackio]", "--autoencoder.max_steps", "4")
    printed = launch("train_autoencoder.py", *options, env=environment() | own).stdout
    assert "tracker failed" not in printed
    with closing(sqlite3.connect(tmp_path / "trackio" / "run-autoencoder.db")) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tracked = [{"stage": "autoencoder", "step": step} | _without_stage(metrics) for step, metrics in rows]
    assert tracked == logged and len(logged) == 3


def _without_stage(metrics: bytes) -> dict:
    return {name.removeprefix("autoencoder/"): value for name, value in json.loads(metrics).items()}


def test_the_printed_lines_draw_a_picture(tiny_run, tmp_path):
    printed = (tiny_run.parent / "stdout.txt").read_text()
    code = printed[printed.index("from ldm_pipeline") :]
    assert 'class_labels="0"' in code
    (tmp_path / "printed.py").write_text(code)
    assert Child(tmp_path / "printed.py", cwd=tmp_path).wait() == 0
    assert Image.open(tmp_path / "picture.png").size == (16, 16)


def test_finished_stages_are_skipped_and_can_be_redone(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")  # the fixture stays as it is
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    again = launch("train_ldm.py", "--output_dir", run).stdout
    assert again.count("stands") == 4
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    metrics = json.loads((run / "metrics.json").read_text())
    redo = ("--output_dir", run, "--redo", "[evaluation]")
    refused = launch("evaluate_ldm.py", *redo, "--denoiser.norm_groups", "7", check=False)
    assert refused.returncode != 0 and (run / "metrics.json").exists()  # nothing is dropped unchecked
    assert "stands" not in launch("evaluate_ldm.py", *redo).stdout
    again = json.loads((run / "metrics.json").read_text())
    assert again["samples"] == metrics["samples"]


def test_another_configuration_is_refused_with_the_difference(tiny_run):
    refused = launch("train_ldm.py", "--output_dir", tiny_run, "--denoiser.widths", "[16, 64]", check=False)
    assert refused.returncode != 0 and "denoiser.widths: [16, 32] -> [16, 64]" in refused.stdout
    assert "--redo" in refused.stderr and "Traceback" not in refused.stderr.split("error:")[1].split("\n")[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.dataset", "no/such/folder"], "--data.dataset"),
        (["--data.resolution", "18"], "--data.resolution 18"),
        (["--denoiser.batch_size", "100000"], "--denoiser.batch_size"),
        (["--denoiser.norm_groups", "7"], "denoiser.norm_groups"),
        (["--denoiser.max_stps", "4"], "did you mean --denoiser.max_steps"),
        (["--autoencoder.gan_weight", "1"], "the discriminator would never start"),
        (["--autoencoder.lpips_weight", "1"], "pip install -e '.[lpips]'"),
        (["--autoencoder.pretrained", "no/such/autoencoder"], "--autoencoder.pretrained"),
    ],
)
def test_what_cannot_work_ends_at_once_with_the_option_to_change(options, message, tmp_path):
    refused = launch("train_ldm.py", *options, "--output_dir", tmp_path / "run", check=False)
    assert refused.returncode == 2 and message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_without_arguments_and_offline_it_names_the_option(tmp_path):
    refused = Child("train_ldm.py", cwd=tmp_path)
    assert refused.wait(60) == 2 and "--data.dataset 'uoft-cs/cifar10'" in refused.stderr


def test_dry_run_plans_and_trains_nothing(tmp_path):
    printed = launch("train_ldm.py", "--output_dir", tmp_path / "run", "--dry_run", "true").stdout
    assert re.search(
        r"denoiser: [\d.]+ M parameters, [\d.]+ GiB .* 12 steps of 16 images \(192\), .* minutes", printed
    )
    assert Image.open(tmp_path / "run" / "samples" / "data.png").size[0] > 300
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_an_existing_autoencoder_is_used(tiny_run, tmp_path):
    options = ("--autoencoder.pretrained", tiny_run / "autoencoder", "--denoiser.max_steps", "4")
    launch("train_ldm.py", "--output_dir", tmp_path / "run", *options)
    used, given = (load_file(run / "autoencoder" / WEIGHTS) for run in (tmp_path / "run", tiny_run))
    assert all(torch.equal(used[key], given[key]) for key in given)


def test_stages_run_alone_and_a_new_autoencoder_makes_new_latents(tmp_path):
    options = ("--output_dir", tmp_path, "--autoencoder.max_steps", "4")
    assert launch("train_autoencoder.py", *options).returncode == 0
    launch("encode_latents.py", *options)
    longer = ("--output_dir", tmp_path, "--autoencoder.max_steps", "6")
    missing = launch("train_denoiser.py", "--output_dir", tmp_path / "other", check=False)
    assert "encode_latents.py first" in missing.stderr
    assert "autoencoder.max_steps: 4 -> 6" in launch("train_autoencoder.py", *longer).stdout
    encoded = launch("encode_latents.py", *longer).stdout
    assert "encoded again, because these changed: autoencoder weights" in encoded
