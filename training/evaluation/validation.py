"""Measurements on held-out images: reconstruction by the autoencoder, loss of the denoiser."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm_pipeline.pipeline import Objective, Task
from training.config import RunError
from training.data.conditions import Conditions
from training.data.images import ImageDataset
from training.data.latents import encode
from training.data.order import seeded_generator
from training.evaluation.plots import save_grid
from training.losses.denoising import denoising_errors, network_timesteps

BINS = 8


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `(N,)`, dB, of images `(N, C, H, W)` in [-1, 1]; clamps reconstructions."""
    return _decibels((reconstructions.clamp(-1, 1) - images).square())


def _decibels(squares: Tensor) -> Tensor:
    return 10 * (4 / squares.flatten(1).mean(1).clamp(min=1e-10)).log10()


def task_errors(task: Task, samples: Tensor, originals: Tensor, hole: Tensor | None) -> dict[str, Tensor]:
    """Errors `(N,)`, by name, of a task's samples `(N, C, H, W)` against the originals, both in [-1, 1].

    For inpainting PSNR (dB) and mean absolute error (of 0 to 1) in the hole `(N, 1, H, W)` alone; else PSNR,
    and for superres also that of the images at low resolution, which the model was given.
    """
    if task.kind == "inpaint":
        wrong, weight = samples - originals, hole / hole.float().mean((1, 2, 3), keepdim=True)
        absolute = (wrong.abs() * weight).flatten(1).mean(1) / 2
        return {"hole PSNR": _decibels(wrong.square() * weight), "hole MAE": absolute}
    if task.kind != "superres":
        return {"PSNR": psnr(samples, originals)}
    size = originals.shape[-2:]
    low = [task.low_resolution(images / 2 + 0.5, size) * 2 - 1 for images in (samples, originals)]
    return {"PSNR": psnr(samples, originals), "consistency PSNR": psnr(*low)}


def ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Structural similarity `(N,)` of images `(N, C, H, W)` in [-1, 1] (Wang et al. 2004, Gaussian of 11)."""
    return structural_similarity_index_measure(
        reconstructions.clamp(-1, 1), images, data_range=2.0, reduction="none"
    ).view(-1)


def lpips_alex(channels: int, resolution: int) -> nn.Module:
    """The perceptual distance LPIPS of AlexNet (arXiv:1801.03924) between images in [-1, 1].

    Raises:
        RunError: its weights cannot be downloaded, or such images are too small for it.
    """
    from lpips import LPIPS  # here, because it is an extra, and needs torchvision

    try:
        network = LPIPS(net="alex", verbose=False).requires_grad_(False).eval()
        images = torch.zeros(1, channels, resolution, resolution)
        network(images, images)
    except (OSError, RuntimeError) as error:
        raise RunError(f"--evaluation.lpips of {resolution}x{resolution} images: {error}") from error
    return network


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside the `with` block."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def reconstruction_metrics(
    accelerator: Accelerator,
    autoencoder: nn.Module,
    images: ImageDataset,
    limit: int,
    batch_size: int,
    grid: Path,
    perceptual: nn.Module | None = None,
) -> dict[str, float]:
    """Mean PSNR (dB), SSIM and, with `perceptual`, LPIPS of reconstructions from the posterior mean.

    Every process measures its share of the first `limit` images.

    Args:
        grid: PNG of the first images, 8 per row, each above its reconstruction.
    """
    device = accelerator.device
    items = [(index, 0) for index in range(min(limit, len(images)))]
    share = -(-len(items) // accelerator.num_processes)
    own = items[accelerator.process_index * share :][:share]  # the grid shows those of the first process
    sums = torch.zeros(4, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    with inference(autoencoder), accelerator.autocast():
        for number, batch in enumerate(DataLoader(images, sampler=own, batch_size=batch_size)):
            pixels = batch["images"].to(device)
            decoded = autoencoder.decode(encode(autoencoder, pixels)[0]).sample.float()
            values = [torch.ones(len(pixels)), psnr(decoded, pixels), ssim(decoded, pixels)]
            values += [] if perceptual is None else [perceptual(decoded.clamp(-1, 1), pixels)]
            sums[: len(values)] += torch.stack([value.sum().to(sums) for value in values])
            if number == 0 and accelerator.is_main_process:
                columns = min(8, len(pixels))
                starts = range(0, len(pixels) // columns * columns, columns)[:4]
                pairs = [split[start : start + columns] for start in starts for split in (pixels, decoded)]
                save_grid(torch.cat(pairs), grid, columns)
    sums = accelerator.reduce(sums, "sum")
    names = ("psnr", "ssim") if perceptual is None else ("psnr", "ssim", "lpips")
    return {name: (total / sums[0]).item() for name, total in zip(names, sums[1:], strict=False)}


def validation_loss(
    accelerator: Accelerator,
    objective: Objective,
    conditions: Conditions,
    limit: int,
    batch_size: int,
    seed: int,
) -> dict:
    """Squared error of the prediction on the first `limit` held-out images.

    Noise, timestep and mask of an image depend on `seed` and its number only. Timesteps are uniform, whatever
    the training density: "val_loss" is the mean, "val_loss_by_timestep" the means of 8 equal bins, from clean
    to noisy. Every process measures its share.
    """
    latents, denoiser = conditions.latents, conditions.denoiser
    count, device = min(limit, len(latents)), accelerator.device
    sums = torch.zeros(2, BINS, device=device)
    batches = torch.arange(count).split(batch_size)
    rest = -len(batches) % accelerator.num_processes
    with inference(denoiser), accelerator.autocast():
        # A sharded network must be called equally often by every process: a batch too many does not count.
        for number in range(accelerator.process_index, len(batches) + rest, accelerator.num_processes):
            indices, counted = batches[number % len(batches)], float(number < len(batches))
            generators = [seeded_generator("cpu", seed, "validation", index) for index in indices.tolist()]
            noise, posterior_noise = (
                torch.stack([torch.randn(latents.shape, generator=each) for each in generators]).to(device)
                for _ in range(2)
            )
            position = torch.cat([torch.rand(1, generator=each) for each in generators])
            bins = indices % BINS
            timesteps = network_timesteps(objective.prediction_type, (bins + position) / BINS).to(device)
            clean = latents.batch(indices, torch.zeros_like(indices), posterior_noise)
            condition = conditions.batch(indices)
            if conditions.images:
                condition = replace(condition, concat=conditions.images.of(indices, seed, "validation"))
            errors, _ = denoising_errors(denoiser, objective, clean, noise, timesteps, condition)
            sums[0].index_add_(0, bins.to(device), errors * counted)
            sums[1].index_add_(0, bins.to(device), torch.full_like(errors, counted))
    total, number = accelerator.reduce(sums, "sum").cpu()
    return {
        "val_loss": (total.sum() / number.sum()).item(),
        "val_loss_by_timestep": [round(value, 5) for value in (total / number)[number > 0].tolist()],
    }
