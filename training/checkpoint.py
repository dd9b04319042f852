"""Files that are whole or absent: written aside, fsynced and renamed; and checkpoints made of them."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    atomic_write(path, (json.dumps(value, indent=2) + "\n").encode())


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, atomically."""
    aside = path.with_name(f".{path.name}.tmp")
    save_file(tensors, aside)
    _fsync(aside)
    os.replace(aside, path)


def move_into_place(aside: Path, target: Path) -> None:
    """Flush the finished folder `aside` to the disk and rename it to `target`, replacing what is there."""
    for path in [*aside.rglob("*"), aside]:
        _fsync(path)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    _fsync(target.parent)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Checkpoints:
    """The checkpoints of one stage: `<folder>/checkpoint-<step>`, each whole or absent.

    A checkpoint holds one safetensors file for each module and average, one `.pt` file for each optimizer
    (read with `weights_only=True`), and `state.json` with the step and what else the loop must remember.

    Args:
        folder: the stage's folder.
        states: what has `state_dict()` and `load_state_dict()`, by file name without suffix.
        keep: newest checkpoints that are kept.
    """

    def __init__(self, folder: Path, states: dict[str, Any], keep: int):
        self.folder = folder
        self.states = states
        self.keep = keep

    def _found(self) -> list[Path]:
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[-1]))

    def save(self, accelerator: Accelerator, step: int, record: dict) -> None:
        """Write checkpoint `step` aside, rename it into place, drop the oldest; every process calls this."""
        if accelerator.is_main_process:
            self._save(step, record)
        accelerator.wait_for_everyone()

    def _save(self, step: int, record: dict) -> None:
        target = self.folder / f"checkpoint-{step}"
        aside = self.folder / f".{target.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, state in self.states.items():
            if isinstance(state, torch.optim.Optimizer):
                torch.save(state.state_dict(), aside / f"{name}.pt")
            else:
                tensors = {
                    key: value.detach().cpu().contiguous() for key, value in state.state_dict().items()
                }
                save_file(tensors, aside / f"{name}.safetensors")
        write_json(aside / "state.json", {"step": step, **record})
        move_into_place(aside, target)
        for old in self._found()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, max_steps: int) -> dict:
        """Load the newest checkpoint, if there is one, and return its record (`{"step": 0}` otherwise).

        Raises:
            ValueError: if it is beyond `max_steps`.
        """
        found = self._found()
        if not found:
            return {"step": 0}
        record = json.loads((found[-1] / "state.json").read_text())
        if record["step"] > max_steps:
            raise ValueError(f"{found[-1]} has gone further than --{self.folder.name}.max_steps {max_steps}")
        for name, state in self.states.items():
            if isinstance(state, torch.optim.Optimizer):
                state.load_state_dict(
                    torch.load(found[-1] / f"{name}.pt", weights_only=True, map_location="cpu")
                )
            else:
                state.load_state_dict(load_file(found[-1] / f"{name}.safetensors"))
        return record
