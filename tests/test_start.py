"""The start of a run: its threads, and what is a user's mistake and what is a bug of ours."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import TINY, launch
from PIL import Image

from ldm_pipeline.models import build_autoencoder
from training import stages
from training.config import RunError, parse_config
from training.runtime.accelerator import choose_threads


@pytest.fixture
def plain_start(monkeypatch):
    """Neither a launcher nor the user has named a number of threads; the process may use four cores."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)


def test_threads_are_the_users_or_those_the_run_had_or_the_usable_cores(plain_start, monkeypatch):
    assert choose_threads(None, None) == (4, None)
    assert choose_threads(None, 2) == (2, None)
    assert choose_threads(7, 2) == (7, None)
    number, warning = choose_threads(None, 8)
    assert number == 4 and "--num_threads 8" in warning
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(None, 2) == (3, None)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # `accelerate launch` sets both by itself
    assert choose_threads(None, 2) == (2, None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_threads(None, None) == (2, None)


def test_a_run_says_and_keeps_its_threads_whatever_starts_it(tmp_path):
    options = (
        "--output_dir",
        tmp_path / "run",
        "--autoencoder.max_steps",
        "2",
        "--autoencoder.warmup_steps",
        "1",
    )
    first = launch("train_autoencoder.py", *options, "--num_threads", "1")
    assert "1 x cpu with 1 thread," in first.stdout
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["num_threads"] == 1
    again = launch("train_autoencoder.py", *options, processes=1)
    assert "1 x cpu with 1 thread," in again.stdout and "configuration changed" not in again.stdout


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    config = parse_config(["--config", str(TINY), "--output_dir", str(tmp_path / "run")])

    def wrong(config, names):
        raise RunError("found this, want that: --seed")

    monkeypatch.setattr(stages, "start", wrong)
    with pytest.raises(SystemExit) as ended:
        stages.run_stages(config)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: found this, want that: --seed\n"

    def bug(config, names):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(stages, "start", bug)
    with pytest.raises(ValueError, match="a bug of ours"):
        stages.run_stages(config)


def test_a_pretrained_autoencoder_is_needed_once(tmp_path):
    build_autoencoder("AutoencoderKL", [8, 16], [1, 1], 4, 1, 16).save_pretrained(tmp_path / "vae")
    options = ("--output_dir", tmp_path / "run", "--autoencoder.pretrained", tmp_path / "vae")
    launch("train_autoencoder.py", *options)
    shutil.rmtree(tmp_path / "vae")
    assert "autoencoder stands" in launch("train_autoencoder.py", *options).stdout
    launch("encode_latents.py", *options)


def test_unreadable_images_are_named_and_left_out(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        Image.new("L", (16, 16), number).save(images / f"{number:02d}.png")
    (images / "broken.png").write_bytes(b"no picture")
    options = ("--data.dataset", images, "--output_dir", tmp_path / "run", "--autoencoder.max_steps", "6")
    run = launch("train_autoencoder.py", *options)  # more than an epoch
    assert "1 images cannot be read" in run.stdout and "broken.png: ValueError" in run.stdout


def test_a_typo_is_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    )
    for script in ("train_ldm", "train_autoencoder", "encode_latents", "train_denoiser", "evaluate_ldm"):
        command = [sys.executable, str(TINY.parent.parent / f"{script}.py"), "--denoiser.max_step", "3"]
        env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        finished = subprocess.run(command, capture_output=True, text=True, env=env)
        assert finished.returncode == 2, script
        assert "denoiser.max_steps" in finished.stderr and finished.stderr.endswith("False\n"), (
            finished.stderr
        )
