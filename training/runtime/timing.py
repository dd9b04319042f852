"""The time of a training step, measured on random images and latents before any training."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import median

import torch
from torch import nn

from ldm_pipeline.pipeline import tokenize
from training.config import Config, OptimizationConfig
from training.data.captions import padded_length
from training.data.images import ImageData
from training.losses.autoencoder import AutoencoderLoss
from training.losses.denoising import DenoisingLoss
from training.networks import blank_condition, new_autoencoder, new_denoiser, text_width_of
from training.runtime.ema import EMA
from training.runtime.optimization import build_optimizer


def trial(
    config: Config,
    name: str,
    count: int,
    shape: tuple[int, int, int],
    data: ImageData,
    text: tuple | None,
    device: torch.device,
) -> tuple[nn.Module, tuple]:
    """A network with its loss, and arguments of its forward pass: `count` random images.

    Args:
        name: "autoencoder" or "denoiser".
        shape: (C, h, w) of the latents.
        data: has the classes and captions.
        text: tokenizer and text encoder of captions, or None.
    """
    noise = torch.randn(count, *shape, device=device)
    if name == "autoencoder":
        size = config.data.resolution
        images = torch.randn(count, config.data.channels, size, size, device=device)
        return AutoencoderLoss(new_autoencoder(config), config.autoencoder).to(device), (images, noise)
    stage = config.denoiser
    words = text[1] if stage.trains_text_encoder else None
    width = text_width_of(stage, text)
    module = DenoisingLoss(new_denoiser(config, data, shape, width), stage, words).to(device)
    condition = blank_condition(module.unet, count, device)
    if text is not None:
        rows = data.train.rows[:: max(1, len(data.train) // count)]
        captions = [data.train.all_captions[row][0] for row in rows.tolist()]
        length = padded_length(tokenize(*text, captions)[1].shape[1])
        hidden = condition.encoder_hidden_states.new_zeros(count, length, width)
        hidden = hidden if words is None else hidden[..., 0].long()  # token numbers
        mask = torch.ones(count, length, dtype=torch.bool, device=device)
        condition = replace(condition, encoder_hidden_states=hidden, encoder_attention_mask=mask)
    times = torch.full((count,), 500, device=device)
    return module, (noise, noise, times, condition)


def time_step(
    module: nn.Module,
    config: OptimizationConfig,
    arguments: tuple,
    autocast: Callable[[], AbstractContextManager],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, int]:
    """Seconds of a training step, the median of some, and the bytes of its activations and moments."""
    optimizer = build_optimizer(config, module)
    ema = EMA(module, config.ema_fraction, config.ema_half_life)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> float:
        begun = clock()
        with autocast():
            loss = module(*arguments)[0]
            loss = loss["loss"] if isinstance(loss, dict) else loss
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(config.batch_size, config.batch_size)
        loss.item()  # waits for the device
        return clock() - begun

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    seconds = [step() for _ in range(3)]
    seconds += [step() for _ in range(4) if sum(seconds) < 1]  # short steps are measured less exactly
    moments = (moment for state in optimizer.state.values() for moment in state.values())
    return median(seconds), sum(kept.values()) + sum(moment.nbytes for moment in moments)
