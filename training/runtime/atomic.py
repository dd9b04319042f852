"""Atomic writes: to a temporary path, flushed to disk, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm_pipeline import loading
from training.config import RunError


def on_write(moment: str, path: Path) -> None:
    """Test hook, empty: `make chaos` replaces it to kill the process at every moment of every write.

    Args:
        moment: "begun", "written" (to the temporary path) or "done".
        path: the file or folder that is being written.
    """


@contextmanager
def replacing(target: Path, size: int) -> Iterator[Path]:
    """A temporary path, at which the `with` block creates a file or a folder; afterwards it is `target`.

    A reader finds the old content or all of the new, never a part, even after a loss of power.

    Args:
        size: about how many bytes will be written, for the message.

    Raises:
        RunError: if it cannot be written; the old content stays.
    """
    aside = _beside(target, ".tmp")
    with _explained(target, size):
        _remove(aside)
        on_write("begun", target)
        yield aside
        on_write("written", target)
        for path in [*aside.rglob("*"), aside]:
            _fsync(path)
        if target.is_dir():  # which cannot be replaced in one step
            target.rename(_beside(target, ".old"))
        os.replace(aside, target)
        _remove(_beside(target, ".old"))
        _fsync(target.parent)
        on_write("done", target)


def append_line(path: Path, text: str) -> None:
    """Append a line and flush it to the disk. Raises RunError if it cannot be written."""
    with _explained(path, len(text)):
        on_write("begun", path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        on_write("done", path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path, len(data)) as aside:
        aside.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as aside:
        save_file(tensors, aside, {"format": "pt"})  # as the readers of Hugging Face expect


def read_json(path: Path) -> dict:
    """The object in a JSON file of a run folder. Raises RunError if the file holds none."""
    try:
        return loading.read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{error}; restore it, or delete it to do its stage again") from error


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Remove a file or folder at once: it is renamed first, so that no reader finds a part of it."""
    if path.exists():
        aside = _beside(path, ".tmp")
        _remove(aside)
        path.rename(aside)
        _remove(aside)


def clean_up(folder: Path) -> None:
    """Remove temporary files of killed writes below `folder`; restore a folder that was being replaced."""
    for old in folder.rglob(".*.old"):
        target = old.with_name(old.name[1 : -len(".old")])
        _remove(old) if target.exists() else old.rename(target)
    for aside in list(folder.rglob(".*.tmp")):
        _remove(aside)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        _remove(_beside(path, ".tmp"))  # it may be what fills the disk
        free = shutil.disk_usage(path.parent).free
        raise RunError(
            f"{path} cannot be written: {error}. It needs {size:,} bytes, {free:,} are free there; make room "
            "or choose another --output_dir"
        ) from error


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
