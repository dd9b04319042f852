"""The cost of a run, measured with a step of each network before any training."""

import time
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import default_collate

from training.config import OptimizationConfig
from training.data.order import batch_flips, batch_indices
from training.data.tasks import TaskImages, cached, shown, task_of
from training.evaluation.plots import save_grid
from training.losses.autoencoder import AutoencoderLoss
from training.losses.denoising import DenoisingLoss
from training.networks import blank_condition, new_autoencoder, new_denoiser, text_width_of
from training.runtime.ema import EMA
from training.runtime.optimization import build_optimizer
from training.runtime.run import Run

GIB = 2**30


def describe_plan(run: Run) -> str:
    """Parameters, memory, steps, images and time of both networks, from a few steps on random latents.

    What LPIPS, a discriminator, compilation, validation and pictures add is not in it.
    """
    config, shape = run.config, run.latent_shape
    lines = [f"latents: {shape[0]} channels of {shape[1]}x{shape[2]}"]
    if not config.autoencoder.pretrained:
        lines.append(_measure(run, "autoencoder", config.autoencoder, shape))
    lines.append(_measure(run, "denoiser", config.denoiser, shape))
    images = len(run.data.train) * (2 if config.data.horizontal_flip else 1)
    images *= 1.5 if cached(task_of(config.denoiser)) else 1  # conditions have no deviations
    lines.append(f"latent cache: {images * shape[0] * shape[1] * shape[2] * 4 / GIB:.2f} GiB on disk at most")
    epochs = config.denoiser.max_steps * config.denoiser.batch_size / len(run.data.train)
    if epochs > 400 and len(run.data.train) < 5000:
        lines.append(
            f"warning: {len(run.data.train)} images, {epochs:.0f} epochs: "
            "expect copies of the training images"
        )
    return "\n".join(lines)


def _measure(run: Run, name: str, config: OptimizationConfig, shape: tuple[int, int, int]) -> str:
    part = config.batch_size // run.accelerator.num_processes // config.gradient_accumulation_steps
    noise = torch.randn(part, *shape, device=run.device)
    if name == "autoencoder":
        module = AutoencoderLoss(new_autoencoder(run.config), config).to(run.device)
        size = run.config.data.resolution
        images = torch.randn(part, run.config.data.channels, size, size, device=run.device)
        arguments = (images, noise)
    else:
        width = text_width_of(config, run.text)
        words = run.text[1] if config.trains_text_encoder else None
        module = DenoisingLoss(new_denoiser(run.config, run.data, shape, width), config, words).to(run.device)
        condition = blank_condition(module.unet, part, run.device)
        if words is not None:  # token numbers
            mask = condition.encoder_attention_mask
            condition = replace(condition, encoder_hidden_states=torch.zeros_like(mask, dtype=torch.int64))
        times = torch.full((part,), 500, device=run.device)
        arguments = (noise, noise, times, condition)
    seconds, activations = _time_step(run, module, config, arguments)
    parameters = sum(p.numel() for p in module.parameters())
    # Weights, gradients, two moments and the average, 4 bytes each.
    memory = (20 * parameters + activations) / GIB
    total = seconds * config.gradient_accumulation_steps * config.max_steps
    return (
        f"{name}: {parameters / 1e6:.2f} M parameters, {memory:.2f} GiB a process, "
        f"{config.max_steps} steps of {config.batch_size} images ({config.max_steps * config.batch_size:,}), "
        f"{part * run.accelerator.num_processes / seconds:.0f} images/s, about {total / 60:.1f} minutes"
    )


def _time_step(
    run: Run, module: nn.Module, config: OptimizationConfig, arguments: tuple
) -> tuple[float, int]:
    """Seconds of a training step, the best of three, and the bytes that its backward pass needs kept."""
    optimizer = build_optimizer(config, module)
    ema = EMA(module, config.ema_fraction, config.ema_half_life)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> float:
        begun = time.perf_counter()
        with run.accelerator.autocast():
            loss = module(*arguments)[0]
            loss = loss["loss"] if isinstance(loss, dict) else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(config.batch_size, config.batch_size)
        loss.item()  # waits for the device
        return time.perf_counter() - begun

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return min(step() for _ in range(3)), sum(kept.values())


def save_data_grid(run: Run) -> str:
    """Write a grid of the first images of the first epoch as the networks will see them; returns a line."""
    path, seed, data = run.folder / "samples" / "data.png", run.config.seed, run.data.train
    if run.accelerator.is_main_process:
        count = min(64, len(data))
        flips = batch_flips(seed, 0, count) & run.config.data.horizontal_flip
        items = list(zip(batch_indices(seed, 0, count, len(data)).tolist(), flips.tolist(), strict=True))
        images = torch.stack([data[item]["images"] for item in items])
        if task := task_of(run.config.denoiser, run.data):  # beside each image its condition
            given = TaskImages(task, run.data, "train")
            batch = [given[*item, seed, "task", 0, row] for row, item in enumerate(items)]
            images = torch.stack([images, shown(task, default_collate(batch)) * 2 - 1], 1).flatten(0, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(images, path, 8)
    return f"what the networks will see: {path}"
