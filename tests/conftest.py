"""Shared helpers: real processes on a tiny run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "training" / "configs" / "tiny.yaml"


def command(script: str, *options: str, processes: int = 1, config: Path = TINY) -> list[str]:
    """A training script as its users run it, on the CPU."""
    # `accelerate launch --cpu` would start one process, whatever --num_processes says.
    several = ("--multi_gpu", "--main_process_port", "0") if processes > 1 else ("--cpu",)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", *several, "--num_machines", "1"),
        *("--mixed_precision", "no", "--num_processes", str(processes), "--dynamo_backend", "no"),
        *(str(ROOT / "training" / script), "--config", str(config), *map(str, options)),
    ]


def launch(script: str, *options: str, processes: int = 1, config: Path = TINY, check: bool = True, cwd=None):
    """Run a training script to its end, offline; returns the finished process."""
    finished = subprocess.run(
        command(script, *options, processes=processes, config=config),
        capture_output=True, text=True, cwd=cwd, env=environment(), timeout=600,
    )  # fmt: skip
    if check:
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
        assert f"{processes} x cpu" in finished.stdout
    return finished


def environment() -> dict[str, str]:
    """The environment of a child: no Hub, no accelerator, no progress bars."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The run folder of the whole main job on the tiny configuration."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    finished = launch("train_ldm.py", "--output_dir", folder, "--trackers", "[tensorboard]")
    (folder.parent / "stdout.txt").write_text(finished.stdout)
    return folder
