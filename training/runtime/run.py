"""What every script starts with: the checked configuration, the processes, the run folder and the images."""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
)
from filelock import BaseFileLock

from training.config import Config, RunError, parse_config, redact
from training.data.images import ImageData, load_images
from training.data.scan import Scan, scan
from training.networks import check_networks, check_shapes
from training.runtime.accelerator import build_accelerator
from training.runtime.atomic import read_json, write_json
from training.runtime.folder import check_folder, check_space, lock_folder, open_folder
from training.runtime.signals import Interruption

Result = TypeVar("Result")


@dataclass
class Run:
    """One run of this process: its configuration, its share of the work, its folder and its images."""

    config: Config
    accelerator: Accelerator
    folder: Path
    data: ImageData
    interruption: Interruption | None
    lock: BaseFileLock | None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def done(self, stage: str) -> dict | None:
        """The record that a finished stage left, or None."""
        path = self.folder / stage / "done.json"
        return read_json(path) if path.exists() else None

    def finish(self, stage: str, record: dict) -> None:
        """Record that a stage is finished; call it last."""
        if self.accelerator.is_main_process:
            write_json(self.folder / stage / "done.json", record)
        self.accelerator.wait_for_everyone()

    def require(self, path: Path, script: str) -> Path:
        """`path`, which an earlier stage leaves. Raises RunError naming its script if it is missing."""
        if not path.exists():
            raise RunError(
                f"{path} is missing: run training/{script} first, or the whole job by train_ldm.py"
            )
        return path

    def once(self, function: Callable[..., Result], *arguments) -> Result:
        """The result of a call by the main process alone, for all; every process calls this."""
        found = [function(*arguments) if self.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]

    def print(self, *message) -> None:
        """Print once, not once a process."""
        self.accelerator.print(*message, flush=True)


def start(stages: list[str], argv: list[str] | None = None) -> Run:
    """Read the configuration, open the run folder, load and scan the images: all checks before a step.

    Exits with code 2 and a message for what the user can mend.

    Args:
        stages: what this script does; no other stage can be redone by it.
        argv: the command line, by default the process's own.
    """
    try:
        config = parse_config(argv)
        if unknown := set(config.redo) - set(stages):
            raise ValueError(
                f"--redo {sorted(unknown)}: this script does {', '.join(stages)}; use train_ldm.py"
            )
        accelerator = build_accelerator(config)
        trains = stages != ["evaluation"]
        shaped = check_shapes(config, accelerator.num_processes) if trains else None
        check_folder(config, accelerator.print)
        folder = Path(config.output_dir)
        lock = lock_folder(folder) if accelerator.is_main_process and not config.dry_run else None
        with accelerator.main_process_first():
            data = load_images(config.data)
            found = _scan_once(config, data, accelerator.is_main_process)
        accelerator.print(found.describe(), flush=True)
        data.drop(found.unreadable)
        if trains:
            networks = check_networks(config, data, *shaped)
            check_space(config, networks, len(data.train) + len(data.held_out))
        if lock:
            open_folder(config)
        accelerator.wait_for_everyone()
        if not config.dry_run and not (folder / "config.yaml").exists():
            raise ValueError(
                f"{socket.gethostname()} does not see {folder.absolute()}: the machines of a run need one "
                "--output_dir that they share"
            )
    except (ValueError, OSError) as error:
        fail(error)
    interruption = None if config.dry_run else Interruption()
    return Run(config, accelerator, folder, data, interruption, lock)


def fail(error: Exception) -> NoReturn:
    """Print what a person can mend, without a traceback and with the process if there are several; exit."""
    sys.stdout.flush()
    process = f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{process}error: {redact(str(error))}", file=sys.stderr, flush=True)
    sys.exit(2)


def _scan_once(config: Config, data: ImageData, store: bool) -> Scan:
    """The scan of these images, from the run folder if an earlier start has left it there."""
    path = Path(config.output_dir) / "data.json"
    if path.exists() and (stored := read_json(path)).get("fingerprint") == data.fingerprint:
        try:
            return Scan(**stored["scan"])
        except (KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error}): delete it") from error
    found = scan(data, config.data.num_workers)
    if store:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"fingerprint": data.fingerprint, "scan": asdict(found)})
    return found
