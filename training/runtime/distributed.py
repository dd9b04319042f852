"""Networks on several processes: sharded parameters (FSDP2, arXiv:2304.11277), and global dropout masks."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from training.config import RunError
from training.data.order import seeded_generator

BLOCK = 16  # rows of the global batch whose dropout masks share a seed


def prepare(
    accelerator: Accelerator,
    trained: nn.Module,
    networks: list[nn.Module],
    optimizer: torch.optim.Optimizer,
) -> nn.Module:
    """Wrap `trained` for several processes, as Accelerate is configured; the loop calls the result.

    Args:
        trained: the networks with their loss.
        networks: parts of `trained` that are also called alone, to sample; the denoiser first.
        optimizer: of `trained`; under FSDP it follows the parameters to their shards.

    Raises:
        RunError: for FSDP of version 1, which cannot shard the network in place.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(trained)
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # all processes have built the same network
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    wrapped = [type(network).__name__ for network in networks]
    plugin.transformer_cls_names_to_wrap = [*wrapped, "ResnetBlock2D"]
    # Accelerate would round the inputs, the targets and the loss to bf16 too: autocast, as everywhere.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    trained.forward = accelerator.autocast()(trained.forward)
    model, _ = accelerator.prepare(trained, optimizer)
    if not isinstance(networks[0], FSDPModule):
        raise RunError("Accelerate is configured for FSDP 1: give --fsdp_version 2")
    return model


def reshard(network: nn.Module) -> None:
    """Free the gathered parameters of a sharded network, which a forward pass without a backward keeps."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Tensor) -> Tensor:
    """A detached tensor, gathered from its shards if it is sharded; then every process calls this."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, which may be a shard of it. RuntimeError if the shapes differ."""
    if target.shape != value.shape:
        raise RuntimeError(f"shape {tuple(value.shape)}, wanted {tuple(target.shape)}")
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


class GlobalDropout(nn.Dropout):
    """Dropout whose mask depends on an image's row in the global batch, not on the process that computes it.

    Every block of `BLOCK` rows has a seed of its own. A process draws the blocks that its rows lie in. So N
    processes and any number of accumulation parts drop what one process would, and a part needs the memory of
    its own rows only.
    """

    key: tuple[int | str, ...]
    rows: slice

    def forward(self, values: Tensor) -> Tensor:
        """`values` (N, ...) of the rows `self.rows` of the global batch; unchanged outside training."""
        return self._drop(values) if self.training and self.p else values

    @torch.compiler.disable  # Dynamo does not trace generators
    def _drop(self, values: Tensor) -> Tensor:
        blocks = range(self.rows.start // BLOCK, -(-self.rows.stop // BLOCK))
        kept = values.new_empty(len(blocks) * BLOCK, *values.shape[1:])
        for block, mask in zip(blocks, kept.split(BLOCK), strict=True):
            mask.bernoulli_(1 - self.p, generator=seeded_generator(values.device, *self.key, block))
        first = self.rows.start - blocks.start * BLOCK
        return values * kept[first : first + len(values)] / (1 - self.p)


def use_global_dropout(network: nn.Module) -> list[GlobalDropout]:
    """Replace every dropout of a network by a global one; returns those whose probability is above 0."""
    replaced = []
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout and child.p:
                replaced.append(GlobalDropout(child.p))
                setattr(parent, name, replaced[-1])
    return replaced


def seed_dropout(dropouts: list[GlobalDropout], seed: int, step: int, rows: slice) -> None:
    """Set the masks of the next forward pass: those of `rows` of the global batch of `step`."""
    for layer, dropout in enumerate(dropouts):
        dropout.key, dropout.rows = (seed, "dropout", step, layer), rows
