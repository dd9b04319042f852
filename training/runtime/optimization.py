"""The optimizer of a stage, and gradients over accumulation parts and processes."""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.config import OptimizationConfig
from training.runtime.distributed import whole
from training.runtime.muon import Muon


def build_optimizer(config: OptimizationConfig, module: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, or Muon with it; the loop sets the learning rate of every step."""
    options = {
        "lr": config.learning_rate,
        "betas": tuple(config.adam_betas),
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "muon":
        return Muon(module, **options)
    return torch.optim.AdamW(module.parameters(), **options)


def gradient_sync(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager:
    """Averages gradients over the processes in the backward pass of the last accumulation part only.

    Gradients of the earlier parts add up on each process, which saves their communication.
    """
    return nullcontext() if last else accelerator.no_sync(model)


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, or NaN if it is infinite or NaN on this process.

    An infinite loss may have finite gradients. NaN makes them NaN, and the average over the processes too, so
    that every process skips the step.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.AdamW, max_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip the gradients to `max_norm`, update the parameters, clear the gradients.

    A gradient that is not finite changes neither parameters nor moments.

    Returns:
        The gradient norm before clipping, and whether the update was skipped, both `()` on the device:
        reading them would make the host wait.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = whole(accelerator.clip_grad_norm_(parameters, max_norm))
    skipped = ~norm.isfinite()
    optimizer.found_inf = skipped.float()  # fused AdamW and Muon change nothing where it is 1
    optimizer.step()
    optimizer.zero_grad()
    return norm, skipped
