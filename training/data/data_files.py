"""Whether data files are whole, lie where they should, and hold nothing that would run code."""

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow
from huggingface_hub import constants
from pyarrow import parquet

from training.config import DataConfig

PICKLES = {"pickle", "pkl", "pyd", "pth", "pt", "joblib"}  # to decode these may run code that they carry


def folders_of(config: DataConfig) -> tuple[str, ...]:
    """Where files that the data set names by their path may lie: its own folder, or the caches of the Hub."""
    path = Path(config.dataset).expanduser()
    if config.dataset == "digits" or not path.exists():
        caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
        return tuple(os.path.abspath(folder) for folder in caches)
    folder = path if path.is_dir() else path.parent
    return os.path.abspath(folder), os.path.realpath(folder)


def check_inside(files: Iterable[str], config: DataConfig) -> None:
    """ValueError where a description of the data set names a file outside its folder."""
    folders = tuple(os.path.join(folder, "") for folder in folders_of(config))
    for name in files:
        if not os.path.abspath(name).startswith(folders) or "://" in name:
            raise ValueError(f"its description names a file outside its folder: {name}")


def check_data_files(paths: Iterable[Path]) -> None:
    """ValueError for what datasets would not notice: data cut off where a part ends, links, pickles."""
    for path in paths:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError(f"{path.name} is no regular file")
        try:
            {".parquet": _check_parquet, ".arrow": _check_arrow, ".tar": _check_tar}[path.suffix](path)
        except (OSError, ValueError, tarfile.TarError) as error:  # of pyarrow, which does not name the file
            raise ValueError(f"{path.name}: {error}") from error


def _check_parquet(path: Path) -> None:
    if parquet.read_metadata(path).num_rows == 0:
        raise ValueError("it has no rows")


def _check_arrow(path: Path) -> None:
    with pyarrow.memory_map(str(path)) as file:
        content = file.read_buffer()
        is_file = bytes(content[:6]) == b"ARROW1"
        if bytes(content[-8:]) != b"\xff\xff\xff\xff\0\0\0\0" and not is_file:  # the mark of the end
            raise ValueError("it is cut off")
        reader = pyarrow.ipc.open_file(content) if is_file else pyarrow.ipc.open_stream(content)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch.validate(full=True)  # pyarrow reads anywhere in memory where offsets are broken


def _check_tar(path: Path) -> None:
    with tarfile.open(path) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()
            _check_member(member)
        tar.fileobj.seek(tar.offset)  # where no further member begins
        rest = tar.fileobj.read(2**20)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise ValueError(f"it is cut off or damaged at byte {tar.offset:,}")


def _check_member(member: tarfile.TarInfo) -> None:
    if PICKLES & set(Path(member.name).name.lower().split(".")[1:]):
        raise ValueError(f"it holds a pickle ({member.name}), which could run any code: remove it")
    if not (member.isreg() or member.isdir()):
        raise ValueError(f"it holds a link or a device ({member.name}), which datasets would leave out")
