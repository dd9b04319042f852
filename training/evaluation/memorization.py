"""Whether samples are copies of training images: the nearest ones, and how near real images come."""

import torch
from torch import Tensor

from ldm_pipeline.pipeline import LDMPipeline
from training.evaluation.metrics import ENOUGH, nearest
from training.evaluation.plots import save_grid
from training.evaluation.samples import Setting, draw, sample_labels
from training.runtime.run import Run

QUANTILE = 0.05  # of the held-out images are nearer to a training image than the threshold
ROWS, NEIGHBOURS = 8, 3


def memorisation(
    run: Run,
    pipeline: LDMPipeline,
    setting: Setting,
    train: dict[str, Tensor],
    held_out: dict[str, Tensor],
    samples: dict[str, Tensor],
) -> dict:
    """The share of samples that are nearer to a training image than all but 5 % of held-out images are.

    Distances are Euclidean, in feature space; a model that does not copy has a share of about 5 %. Draws
    `samples/neighbours.png`: on the left the first samples, on the right those nearest to a training image,
    each followed by its three nearest training images. For the main process alone.
    """
    device = run.device if run.device.type == "cuda" else "cpu"
    real, _ = nearest(held_out["features"][:ENOUGH], train["features"], 1, device)
    distances, indices = nearest(samples["features"][:ENOUGH], train["features"], NEIGHBOURS, device)
    threshold = real[:, 0].quantile(QUANTILE).item()
    count = len(distances)
    chosen = [*range(min(ROWS, count)), *distances[:, 0].argsort()[:ROWS].tolist()]
    labels = sample_labels(run, pipeline, len(samples["features"]))
    drawn = draw(run, pipeline, setting, chosen, labels).cpu().float() / 127.5 - 1
    rows = [_row(run, drawn[place], indices[sample]) for place, sample in enumerate(chosen)]
    half, gap = len(rows) // 2, torch.ones(1, *drawn.shape[1:])
    lines = [torch.cat([left, gap, right]) for left, right in zip(rows[:half], rows[half:], strict=True)]
    save_grid(torch.cat(lines), run.folder / "samples" / "neighbours.png", 2 * NEIGHBOURS + 3)
    return {
        "n": count,
        "train_images": len(run.data.train),
        "held_out_images": len(real),
        "quantile": QUANTILE,
        "threshold": threshold,
        "share": (distances[:, 0] < threshold).double().mean().item(),
        "median": distances[:, 0].median().item(),
        "held_out_median": real.median().item(),
    }


def _row(run: Run, sample: Tensor, neighbours: Tensor) -> Tensor:
    return torch.stack([sample, *(run.data.train[index, 0]["images"] for index in neighbours.tolist())])
