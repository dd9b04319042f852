"""A float32 exponential moving average of a network's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.runtime.distributed import reshard


class EMA:
    """EMA weights of a network, with a half-life in images, so that they do not depend on the batch size.

    The half-life is `fraction` of the images seen so far, and at most `half_life`. It is short at first, so
    that the random initial weights are forgotten (EDM2, arXiv:2312.02696, section 3.1).

    Args:
        module: the network, before it is wrapped for several processes. Buffers are not averaged.
        fraction: half-life as a share of the images seen.
        half_life: upper bound of the half-life, in images.
    """

    def __init__(self, module: nn.Module, fraction: float, half_life: int):
        self.module = module
        self.fraction = fraction
        self.half_life = half_life
        self.average = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average in the update after `images_seen` images, the last batch included."""
        half_life = min(self.half_life, self.fraction * images_seen)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Average in the parameters, after an optimizer step that brings the images to `images_seen`."""
        weight = 1 - self.decay(images_seen, batch_size)
        averages, parameters = list(self.average.values()), [p.float() for p in self.module.parameters()]
        torch._foreach_lerp_(averages, parameters, weight)

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """The network with its EMA weights inside the `with` block; afterwards it has the trained ones."""
        reshard(self.module)
        trained = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self._copy(self.average)
        try:
            yield self.module
        finally:
            reshard(self.module)
            self._copy(trained)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The EMA weights themselves, not copies, by parameter name."""
        return self.average
