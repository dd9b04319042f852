"""What is measured and drawn on the way and at the end; every process does its share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm_pipeline.pipeline import Condition, LDMPipeline, Objective, num_classes
from training.data.latents import LatentDataset, encode
from training.data.order import seeded_generator
from training.evaluation.plots import save_grid
from training.losses.denoising import denoising_errors, network_timesteps
from training.runtime.run import Run

BINS = 8


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `(N,)`, dB, of images `(N, C, H, W)` in [-1, 1]; clamps reconstructions."""
    error = (reconstructions.clamp(-1, 1) - images).square().mean((1, 2, 3))
    return 10 * (4 / error.clamp(min=1e-10)).log10()


def ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Structural similarity `(N,)` of images `(N, C, H, W)` in [-1, 1] (Wang et al. 2004, Gaussian of 11)."""
    return structural_similarity_index_measure(
        reconstructions.clamp(-1, 1), images, data_range=2.0, reduction="none"
    ).view(-1)


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


def lpips_alex() -> nn.Module:
    """The perceptual distance LPIPS of AlexNet (arXiv:1801.03924) between images in [-1, 1]."""
    from lpips import LPIPS  # here, because it is an extra, and needs torchvision

    return LPIPS(net="alex", verbose=False).requires_grad_(False).eval()


def measure_reconstruction(
    run: Run, autoencoder: nn.Module, limit: int, name: str, perceptual: nn.Module | None = None
) -> dict[str, float]:
    """Mean PSNR (dB), SSIM and, with `perceptual`, LPIPS of the first `limit` held-out images, reconstructed
    from the posterior mean.

    Draws a grid `name`, 8 images a row, each above its reconstruction. Every process measures its share.
    """
    accelerator, images = run.accelerator, run.data.held_out
    pairs = [(index, 0) for index in range(min(limit, len(images)))]
    share = -(
        -len(pairs) // accelerator.num_processes
    )  # the first process has the first images, for the grid
    mine = pairs[accelerator.process_index * share :][:share]
    sums = torch.zeros(4, dtype=torch.float64, device=run.device if run.device.type != "mps" else "cpu")
    with inference(autoencoder), accelerator.autocast():
        for number, batch in enumerate(
            DataLoader(images, sampler=mine, batch_size=run.config.evaluation.batch_size)
        ):
            pixels = batch["images"].to(run.device)
            decoded = autoencoder.decode(encode(autoencoder, pixels)[0]).sample.float()
            values = [torch.ones(len(pixels)), psnr(decoded, pixels), ssim(decoded, pixels)]
            values += [] if perceptual is None else [perceptual(decoded.clamp(-1, 1), pixels)]
            sums[: len(values)] += torch.stack([value.sum().to(sums) for value in values])
            if number == 0 and accelerator.is_main_process:
                columns = min(8, len(pixels))
                whole = len(pixels) // columns * columns
                pairs_of_rows = zip(
                    pixels[:whole].split(columns), decoded[:whole].split(columns), strict=True
                )
                rows = [row for pair in pairs_of_rows for row in pair][:8]
                save_grid(torch.cat(rows), run.folder / "samples" / name, columns)
    sums = accelerator.reduce(sums, "sum")
    names = ("psnr", "ssim") if perceptual is None else ("psnr", "ssim", "lpips")
    return {key: (total / sums[0]).item() for key, total in zip(names, sums[1:], strict=False)}


def validation_loss(
    run: Run, unet: nn.Module, objective: Objective, latents: LatentDataset, limit: int
) -> dict:
    """Squared error of the prediction on the first `limit` held-out images, with fixed noise and timesteps.

    Timesteps are uniform, whatever the training density: "val_loss" is the mean, "val_loss_by_timestep" the
    means of 8 equal bins, from clean to noisy. Every process measures its share.
    """
    accelerator, device = run.accelerator, run.device
    count = min(limit, len(latents))
    draws = seeded_generator("cpu", run.config.seed, "validation")
    noise, posterior_noise = (torch.randn(count, *latents.shape, generator=draws) for _ in range(2))
    bins = torch.arange(count) % BINS
    times = network_timesteps(objective.prediction_type, (bins + torch.rand(count, generator=draws)) / BINS)
    sums = torch.zeros(2, BINS, device=device)
    batches = torch.arange(count).split(run.config.evaluation.batch_size)
    rest = -len(batches) % accelerator.num_processes
    with inference(unet), accelerator.autocast():
        # A sharded network must be called equally often by every process: a batch too many does not count.
        for number in range(accelerator.process_index, len(batches) + rest, accelerator.num_processes):
            indices, counted = batches[number % len(batches)], float(number < len(batches))
            clean = latents.batch(indices, torch.zeros_like(indices), posterior_noise[indices].to(device))
            labels = latents.class_labels(indices) if num_classes(unet) else None
            errors, _ = denoising_errors(
                unet,
                objective,
                clean,
                noise[indices].to(device),
                times[indices].to(device),
                Condition(labels),
            )
            sums[0].index_add_(0, bins[indices].to(device), errors * counted)
            sums[1].index_add_(0, bins[indices].to(device), torch.full_like(errors, counted))
    total, each = accelerator.reduce(sums, "sum").cpu()
    return {
        "val_loss": (total.sum() / each.sum()).item(),
        "val_loss_by_timestep": [round(value, 5) for value in (total / each)[each > 0].tolist()],
    }


def draw_grid(
    run: Run, pipeline: LDMPipeline, name: str, steps: int, guidance_scale: float, rows: int = 4
) -> None:
    """Draw samples from fixed noise into `samples/<name>`, one class a column; all processes draw.

    Every image has a generator of its own, so the pictures do not depend on the number of processes.
    """
    accelerator = run.accelerator
    classes = num_classes(pipeline.denoiser)
    columns = min(classes, 10) or 8
    count = rows * columns
    per_process = -(-count // accelerator.num_processes)
    mine = [(accelerator.process_index * per_process + i) % count for i in range(per_process)]
    pipeline.set_progress_bar_config(disable=True)
    images, size = [], run.config.evaluation.batch_size
    with inference(pipeline.unet), accelerator.autocast():
        for first in range(0, per_process, size):
            chosen = mine[first : first + size]
            labels = [index % columns * classes // columns for index in chosen] if classes else None
            images += pipeline(
                class_labels=labels,
                num_inference_steps=steps,
                guidance_scale=guidance_scale if classes else 1.0,
                generator=[seeded_generator(run.device, run.config.seed, "grid", index) for index in chosen],
                output_type="pt",
            ).images
    images = accelerator.gather(torch.stack(images))[:count]
    if accelerator.is_main_process:
        save_grid(images * 2 - 1, run.folder / "samples" / name, columns=columns)
