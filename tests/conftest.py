"""Shared helpers: real processes on a tiny run."""

import os
import shutil
import socket
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock
from fork_server import ROOT, Child, environment

TINY = ROOT / "training" / "configs" / "tiny.yaml"
LAUNCHER = find_spec("accelerate").submodule_search_locations[0] + "/commands/launch.py"


def pytest_configure(config):
    """One core and one thread for each worker and its children: two of two threads wait for each other.

    Before torch is imported, as it counts the usable cores. Not in the controller: workers inherit its cores.
    No GPU: a forked process cannot use one after its parent has looked for it.
    """
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not config.getoption("numprocesses", None) and hasattr(os, "sched_setaffinity"):
        cores, worker = sorted(os.sched_getaffinity(0)), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


def start(script: str | Path, *options, config: Path = TINY, **more) -> Child:
    """Begin a training script in one process on the CPU, offline; `more` as for `Child`."""
    return Child(script, "--config", config, *options, **more)


def launch(
    script: str | Path,
    *options,
    ranks: int = 1,
    processes: int = 0,
    config: Path = TINY,
    check: bool = True,
    **more,
) -> Child:
    """Run a training script to its end, offline; returns its finished process, of several the first.

    Args:
        ranks: forked processes, each with the environment that `torchrun` gives it.
        processes: of their own, under `accelerate launch`, whose process is returned; 0: forked ones.
        check: whether anything but success fails the test.
        more: as for `Child`.
    """
    if processes:
        arguments = command(script, *options, processes=processes, config=config)
        children = [Child(LAUNCHER, *arguments[3:], **more)]
    elif ranks > 1:
        children = [start(script, *options, config=config, env=env, **more) for env in environments(ranks)]
    else:
        children = [start(script, *options, config=config, **more)]
    with ExitStack() as stack:
        for child in children:
            stack.enter_context(child)
        for child in children:
            child.wait(600)
            if check:
                assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-6000:]
    if check:
        assert f"{processes or ranks} x cpu" in children[0].stdout
    return children[0]


def environments(ranks: int) -> list[dict[str, str]]:
    """The environments of processes that `torchrun` starts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    numbers = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [environment() | rendezvous | numbers | each for each in own]


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
