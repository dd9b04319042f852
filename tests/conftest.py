"""Shared helpers: real processes on a tiny run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "training" / "configs" / "tiny.yaml"


def command(script: str, *options: str, processes: int = 0, config: Path = TINY) -> list[str]:
    """A training script on the CPU, under `accelerate launch` if a number of processes is given.

    Without it a script runs all the same, and starts some seconds sooner.
    """
    # `accelerate launch --cpu` would start one process, whatever --num_processes says.
    several = ("--multi_gpu", "--main_process_port", "0") if processes > 1 else ("--cpu",)
    launcher = [
        *("-m", "accelerate.commands.launch", *several, "--num_machines", "1"),
        *("--mixed_precision", "no", "--num_processes", str(processes), "--dynamo_backend", "no"),
    ]
    return [
        *(sys.executable, *(launcher if processes else [])),
        *(str(ROOT / "training" / script), "--config", str(config), *map(str, options)),
    ]


def launch(script: str, *options: str, processes: int = 0, config: Path = TINY, check: bool = True, cwd=None):
    """Run a training script to its end, offline; returns the finished process."""
    finished = subprocess.run(
        command(script, *options, processes=processes, config=config),
        capture_output=True, text=True, cwd=cwd, env=environment(), timeout=600,
    )  # fmt: skip
    if check:
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
        assert f"{processes or 1} x cpu" in finished.stdout
    return finished


def environment() -> dict[str, str]:
    """The environment of a child: no Hub, no accelerator, no progress bars."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The run folder of the whole main job on the tiny configuration."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    finished = launch("train_ldm.py", "--output_dir", folder, "--trackers", "[tensorboard]", processes=1)
    (folder.parent / "stdout.txt").write_text(finished.stdout)
    return folder
