"""Shared helpers: real processes on a tiny run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from fork_server import ROOT, Child, environment

TINY = ROOT / "training" / "configs" / "tiny.yaml"


def pytest_configure(config):
    """One core and one thread for each worker and its children: two of two threads wait for each other.

    Before torch is imported, as it counts the usable cores. Not in the controller: workers inherit its cores.
    """
    os.environ.pop("OMP_NUM_THREADS", None)
    if not config.getoption("numprocesses", None) and hasattr(os, "sched_setaffinity"):
        cores, worker = sorted(os.sched_getaffinity(0)), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


def start(script: str | Path, *options, config: Path = TINY, **more) -> Child:
    """Begin a training script in one process on the CPU, offline; `more` as for `Child`."""
    return Child(script, "--config", config, *options, **more)


def launch(script: str | Path, *options, processes: int = 0, config: Path = TINY, check: bool = True, **more):
    """Run a training script to its end, offline: forked, or by `processes` under `accelerate launch`.

    Returns a finished process with returncode, stdout and stderr.
    """
    if processes:
        finished = subprocess.run(
            command(script, *options, processes=processes, config=config),
            **{"capture_output": True, "text": True, "env": environment(), "timeout": 600, **more},
        )
    else:
        finished = start(script, *options, config=config, **more)
        finished.wait(600)
    if check:
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
        assert f"{processes or 1} x cpu" in finished.stdout
    return finished


def command(script: str | Path, *options, processes: int, config: Path = TINY) -> list[str]:
    """The command line of a training script on `processes` under `accelerate launch`."""
    # `accelerate launch --cpu` would start one process, whatever --num_processes says.
    several = ("--multi_gpu", "--main_process_port", "0") if processes > 1 else ("--cpu",)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", *several, "--num_machines", "1"),
        *("--mixed_precision", "no", "--num_processes", str(processes), "--dynamo_backend", "no"),
        *(str(ROOT / "training" / script), "--config", str(config), *map(str, options)),
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The run folder of the whole main job on the tiny configuration; each worker of xdist has a copy."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-tiny"
    with FileLock(f"{shared}.lock"):
        if not (shared / "stdout.txt").exists():
            options = ("--output_dir", shared / "run", "--trackers", "[tensorboard]")
            finished = launch("train_ldm.py", *options)
            (shared / "stdout.txt").write_text(finished.stdout)
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(shared, folder, dirs_exist_ok=True)
    return folder / "run"
