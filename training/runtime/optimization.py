"""The optimizer, and steps that are skipped where a gradient is not finite."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.config import OptimizationConfig
from training.runtime.distributed import whole


def build_optimizer(config: OptimizationConfig, module: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over all parameters; the loop sets the rate of every step."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=tuple(config.adam_betas),
        weight_decay=config.weight_decay,
        fused=True,
    )


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, or NaN if it is not finite: then so are the gradients, on every process."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.AdamW, max_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip the gradients, step and clear them; a gradient that is not finite changes nothing.

    Returns:
        The gradients' norm before clipping, and whether the step was skipped, both `()`. Neither has been
        read: the device does not wait.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = whole(accelerator.clip_grad_norm_(parameters, max_norm))
    skipped = ~norm.isfinite()
    optimizer.found_inf = skipped.float()  # where it is 1, fused AdamW changes nothing
    optimizer.step()
    optimizer.zero_grad()
    return norm, skipped
