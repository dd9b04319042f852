"""The cost of a run, measured with a step of each network before any training."""

import torch
from torch.utils.data import default_collate

from training.config import OptimizationConfig
from training.data.order import batch_flips, batch_indices
from training.data.tasks import TaskImages, cached, shown, task_of
from training.evaluation.plots import save_grid
from training.recipes import expects_copies, seen
from training.runtime.run import Run
from training.runtime.timing import time_step, trial

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
    if expects_copies(config.denoiser, len(run.data.train)):
        epochs = seen(config.denoiser) / len(run.data.train)
        lines.append(
            f"warning: {len(run.data.train)} images, {epochs:.0f} epochs: "
            "expect copies of the training images"
        )
    return "\n".join(lines)


def _measure(run: Run, name: str, config: OptimizationConfig, shape: tuple[int, int, int]) -> str:
    part = config.batch_size // run.accelerator.num_processes // config.gradient_accumulation_steps
    module, arguments = trial(run.config, name, part, shape, run.data, run.text, run.device)
    seconds, kept = time_step(module, config, arguments, run.accelerator.autocast)
    parameters = sum(p.numel() for p in module.parameters())
    # Weights, gradients and the average, 4 bytes each; activations and moments.
    memory = (12 * parameters + kept) / GIB
    total = seconds * config.gradient_accumulation_steps * config.max_steps
    return (
        f"{name}: {parameters / 1e6:.2f} M parameters, {memory:.2f} GiB a process, "
        f"{config.max_steps} steps of {config.batch_size} images ({config.max_steps * config.batch_size:,}), "
        f"{part * run.accelerator.num_processes / seconds:.0f} images/s, about {total / 60:.1f} minutes"
    )


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
