"""Networks on several processes: sharded parameters (FSDP2, arXiv:2304.11277), and dropout that does not
depend on the number of processes."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from training.config import RunError


def prepare(
    accelerator: Accelerator, trained: nn.Module, network: nn.Module, optimizer: torch.optim.Optimizer
) -> nn.Module:
    """What to call in training: `trained`, wrapped for several processes as Accelerate is configured.

    Args:
        trained: `network` with its loss.
        network: what is also called by itself, to sample; a Diffusers U-Net.
        optimizer: that of `trained`; it follows the parameters to their shards.

    Raises:
        RunError: for FSDP of version 1, which cannot shard the network in place.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(trained)
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # all processes have built the same network
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [type(network).__name__, "ResnetBlock2D"]
    # Accelerate would round the inputs, the targets and the loss to bf16 too: autocast, as everywhere.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    trained.forward = accelerator.autocast()(trained.forward)
    model, _ = accelerator.prepare(trained, optimizer)
    if not isinstance(network, FSDPModule):
        raise RunError("Accelerate is configured for FSDP 1: give --fsdp_version 2")
    return model


def reshard(network: nn.Module) -> None:
    """Make the parameters of a sharded network the shards again, which a forward pass alone leaves whole."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Tensor) -> Tensor:
    """A tensor, collected from its shards if it has any; then every process must call this."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's part of it. RuntimeError if the shapes differ."""
    if target.shape != value.shape:
        raise RuntimeError(f"shape {tuple(value.shape)}, wanted {tuple(target.shape)}")
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


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
