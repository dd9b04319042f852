"""Batch order and random seeds, as functions of (seed, step) alone."""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator seeded by `key`, such as (seed, "noise", step): the one place where keys become seeds."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=seeded_generator("cpu", seed, "order", epoch))


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> torch.Tensor:
    """Image indices of the global batch of a step: int64 `(batch_size,)` below `count`.

    They are the positions from `step * batch_size` on in an endless sequence of permutations, each a function
    of seed and epoch alone. No earlier step is replayed.
    """
    position, end, pieces = step * batch_size, (step + 1) * batch_size, []
    while position < end:
        epoch, offset = divmod(position, count)
        pieces.append(_epoch(seed, epoch, count)[offset : offset + end - position])
        position += len(pieces[-1])
    return torch.cat(pieces)


def batch_flips(seed: int, step: int, batch_size: int) -> torch.Tensor:
    """Mirrored images of the global batch of a step: bool `(batch_size,)`, half of them on average."""
    return torch.rand(batch_size, generator=seeded_generator("cpu", seed, "flip", step)) < 0.5


def batch_slices(batch_size: int, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> list[slice]:
    """Rows of every global batch that process `rank` computes: one slice per part of an accumulated step.

    Over all processes the slices cover the batch once, in order, in equal parts. A batch that does not divide
    is refused before a run starts.
    """
    size, rest = divmod(batch_size, world_size * accumulation)
    assert size and not rest, f"{batch_size} rows for {world_size} processes x {accumulation} parts"
    first = rank * accumulation
    return [slice(part * size, (part + 1) * size) for part in range(first, first + accumulation)]


class StepSampler(Sampler[list[tuple[int, bool]]]):
    """A batch sampler: per step, one list of (index, flip) for each of this process's `slices`.

    Args:
        count: number of images.
        batch_size: rows of the global batch.
        seed: of order and flips.
        steps: steps to sample, such as those that are left.
        flips: whether half of the images are mirrored.
        slices: rows of the global batch, from `batch_slices`; all of them by default.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        steps: range,
        flips: bool = False,
        slices: list[slice] | None = None,
    ):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps, self.flips = steps, flips
        self.slices = slices or batch_slices(batch_size)

    def __len__(self) -> int:
        return len(self.steps) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for step in self.steps:
            indices = batch_indices(self.seed, step, self.batch_size, self.count)
            flips = torch.zeros(self.batch_size, dtype=torch.bool)
            if self.flips:
                flips = batch_flips(self.seed, step, self.batch_size)
            for rows in self.slices:
                yield list(zip(indices[rows].tolist(), flips[rows].tolist(), strict=True))
