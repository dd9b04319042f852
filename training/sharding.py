"""Networks that are spread over the processes (FSDP2, arXiv:2304.11277): their whole and each one's part."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from training.errors import RunError


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
