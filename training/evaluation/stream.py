"""Long rows of results, computed batch by batch by all processes; what is on disk is not computed again."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from training.config import RunError
from training.runtime.atomic import write_tensors
from training.runtime.run import Run

Compute = Callable[[list[range]], Iterable[dict[str, Tensor]]]


def stream(run: Run, folder: Path, count: int, size: int, compute: Compute, name: str) -> None:
    """Leave a file in `folder` for every batch of `size` of the indices below `count`.

    Every process calls this and does its share. A batch is the same whatever the number of processes, so its
    results are the same to the bit.

    Args:
        compute: the results of batches of indices, one after the other: tensors with a row an index.
        name: of the progress bar.

    Raises:
        Interrupted: after SIGTERM or SIGINT; the batches up to there stay.
    """
    accelerator = run.accelerator
    missing = [part for part in batches(count, size) if not _path(folder, part).exists()]
    accelerator.wait_for_everyone()  # all have the same list before the first file is written
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    place, processes = accelerator.process_index, accelerator.num_processes
    # A sharded network must be called equally often by every process: a batch too many is not written.
    mine = [
        missing[number % len(missing)]
        for number in range(place, -(-len(missing) // processes) * processes, processes)
    ]
    own = len(range(place, len(missing), processes))
    done = count - sum(map(len, missing))
    bar = tqdm(
        total=count,
        initial=done,
        desc=name,
        unit="image",
        disable=not accelerator.is_main_process,
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    for number, (part, tensors) in enumerate(zip(mine, compute(mine), strict=True)):
        if number < own:
            write_tensors(
                _path(folder, part), {key: value.cpu().contiguous() for key, value in tensors.items()}
            )
        bar.update(min(len(part) * processes, count - bar.n))
        run.interruption.check()
    bar.close()
    accelerator.wait_for_everyone()


def read_batches(folder: Path, count: int, size: int, without: str = "") -> dict[str, Tensor]:
    """All that `stream` has left, in the order of the indices, but not the tensors called `without`."""
    found: dict[str, list[Tensor]] = {}
    for part in batches(count, size):
        for key, value in read_batch(folder, part).items():
            if key != without:
                found.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in found.items()}


def read_batch(folder: Path, part: range) -> dict[str, Tensor]:
    """What `stream` has left of one batch. RunError if its file is damaged."""
    path = _path(folder, part)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it, and it is computed again") from error


def batches(count: int, size: int) -> list[range]:
    """The indices below `count` in rows of `size`."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _path(folder: Path, part: range) -> Path:
    return folder / f"{part.start:07d}-{part.stop:07d}.safetensors"
