"""Whether samples are copies of training images: their nearest neighbours, compared with held-out images'."""

from pathlib import Path

import torch
from torch import Tensor

from training.data.images import ImageDataset
from training.evaluation.metrics import MANY_SAMPLES, nearest_neighbours
from training.evaluation.plots import save_grid
from training.evaluation.samples import Sampler
from training.evaluation.settings import SamplingSettings

QUANTILE = 0.05  # of the held-out images are nearer to a training image than the threshold
ROWS, NEIGHBOURS = 8, 3


def memorization(
    sampler: Sampler,
    settings: SamplingSettings,
    images: ImageDataset,
    features: dict[str, Tensor],
    grid: Path,
) -> dict:
    """The share of samples that are nearer to a training image than 95 % of the held-out images are.

    Distances are Euclidean, between features. A model that does not copy has a share of about 5 %. For the
    main process alone.

    Args:
        images: the training images.
        features: `(N, D)` of "train", "held_out" and "samples".
        grid: PNG of the first samples on the left and those nearest to a training image on the right, each
            followed by its three nearest training images.
    """
    device = sampler.device if sampler.device.type == "cuda" else "cpu"
    held_out, _ = nearest_neighbours(features["held_out"][:MANY_SAMPLES], features["train"], 1, device)
    distances, indices = nearest_neighbours(
        features["samples"][:MANY_SAMPLES], features["train"], NEIGHBOURS, device
    )
    threshold, count = held_out[:, 0].quantile(QUANTILE).item(), len(distances)

    shown = [*range(min(ROWS, count)), *distances[:, 0].argsort()[:ROWS].tolist()]
    samples = sampler.sample(settings, shown).cpu().float() / 127.5 - 1
    nearest = torch.stack([images[index, 0]["images"] for index in indices[shown].flatten().tolist()])
    rows = torch.cat([samples[:, None], nearest.unflatten(0, (-1, NEIGHBOURS))], 1)
    left, right = rows.chunk(2)
    lines = torch.cat([left, torch.ones_like(left[:, :1]), right], 1)
    save_grid(lines.flatten(0, 1), grid, columns=2 * NEIGHBOURS + 3)
    return {
        "n": count,
        "train_images": len(images),
        "held_out_images": len(held_out),
        "quantile": QUANTILE,
        "threshold": threshold,
        "share": (distances[:, 0] < threshold).double().mean().item(),
        "median": distances[:, 0].median().item(),
        "held_out_median": held_out.median().item(),
    }
