"""Dropout that does not depend on how many processes share a batch."""

import torch
from torch import Tensor, nn


class GlobalDropout(nn.Dropout):
    """Dropout whose mask is the own rows of one that is drawn for the global batch.

    All processes and accumulation parts draw the same mask, if they start from the same seed, and apply
    different rows of it: so N processes drop what one would.
    """

    rows: Tensor
    batch_size: int

    def forward(self, values: Tensor) -> Tensor:
        """`values` (N, ...), the rows `self.rows` (N,) of a global batch of `self.batch_size`."""
        if not self.training or not self.p:
            return values
        kept = torch.empty(self.batch_size, *values.shape[1:], dtype=values.dtype, device=values.device)
        return values * kept.bernoulli_(1 - self.p)[self.rows] / (1 - self.p)


def use_global_dropout(network: nn.Module) -> list[GlobalDropout]:
    """Replace every dropout of a network by a global one; returns those that drop anything."""
    replaced = []
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout and child.p:
                replaced.append(GlobalDropout(child.p))
                setattr(parent, name, replaced[-1])
    return replaced


def draw_dropout(
    dropouts: list[GlobalDropout], seed: int, batch_size: int, rows: slice, device: torch.device
):
    """Have the next forward pass of `rows` of the global batch drop what `seed` says."""
    torch.manual_seed(seed)
    for dropout in dropouts:
        dropout.batch_size, dropout.rows = batch_size, torch.arange(rows.start, rows.stop, device=device)
