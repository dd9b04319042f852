"""Files and folders that are whole or absent: written aside, flushed to the disk, renamed into place."""

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

from ldm_pipeline import pipeline
from training.config import RunError


def passing(moment: str, path: Path) -> None:
    """Called as every write of `path` has "begun", is "written" aside and is "done"; `make chaos` replaces it
    by what kills the process there."""


@contextmanager
def replacing(target: Path, size: int) -> Iterator[Path]:
    """A path for the `with` block to create a file or a folder at; afterwards that is `target`.

    A reader sees what was there before or all of the new, never a part, even after a loss of power.

    Args:
        size: about how many bytes will be written, for the message.

    Raises:
        RunError: it cannot be written; what was there before still is.
    """
    aside = _beside(target, ".tmp")
    with _explained(target, size):
        _remove(aside)
        passing("begun", target)
        yield aside
        passing("written", target)
        for path in [*aside.rglob("*"), aside]:
            _fsync(path)
        if target.is_dir():  # which cannot be replaced in one step
            target.rename(_beside(target, ".old"))
        os.replace(aside, target)
        _remove(_beside(target, ".old"))
        _fsync(target.parent)
        passing("done", target)


def append_line(path: Path, text: str) -> None:
    """Append a line and flush it to the disk. Raises RunError if it cannot be written."""
    with _explained(path, len(text)):
        passing("begun", path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        passing("done", path)


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
    """The object in a JSON file of ours. Raises RunError if it holds none."""
    try:
        return pipeline.read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{error}; restore it, or delete it to do its stage again") from error


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Remove a file or folder so that nobody ever finds a part of it."""
    if path.exists():
        aside = _beside(path, ".tmp")
        _remove(aside)
        path.rename(aside)
        _remove(aside)


def clean_up(folder: Path) -> None:
    """Remove what killed writes left below `folder`; a folder that was just being replaced comes back."""
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
