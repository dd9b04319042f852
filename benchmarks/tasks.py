"""Models of tasks beside what needs no training for them, on held-out pictures.

    python benchmarks/tasks.py path/to/data path/to/features.pt runs/a/pipeline runs/b/pipeline \
        --split validation --unconditional runs/text/pipeline

The task is read from each pipeline. Baselines:

- inpaint: the mean colour of what is known; `--unconditional`, a model without a task, which inpaints by
  latent blending, with as many steps.
- superres: nearest pixels; bicubic.
- colorize: the grey picture; the mean colour that training pictures have at each brightness.
- column: the condition itself; the training picture whose condition is nearest.

"FD" is the Frechet distance of the results' features to those of the originals; all other figures are means
over pictures. Each grid has columns of conditions, baselines, model and originals; its rows are pictures.
"""

import argparse
from collections.abc import Sized
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm_pipeline import LDMPipeline
from ldm_pipeline.pipeline import Task, luminance, to_pixels
from training.data.order import seeded_generator
from training.data.tasks import draw_hole
from training.evaluation.features import load_network
from training.evaluation.metrics import FrechetDistance
from training.evaluation.plots import save_grid, to_uint8
from training.evaluation.validation import task_errors

BINS = 64  # of brightness, each with its mean colour
GRID_ROWS = 8


def read(split: datasets.Dataset, column: str, indices: list[int]) -> Tensor:
    """Pictures float32 `(N, 3, R, R)` in [0, 1] of a column."""
    pictures = split.select(indices)[column]
    return torch.stack([to_pixels(picture.convert("RGB"))[0] for picture in pictures])


def some(split: Sized, limit: int, *name: str | int) -> list[int]:
    """At most `limit` rows of a split, drawn at random: always the same of a name."""
    return torch.randperm(len(split), generator=seeded_generator("cpu", *name))[:limit].tolist()


def holes(count: int, size: int, seed: int) -> Tensor:
    """Boxes and strokes `(N, 1, size, size)` bool as in training, none of the whole image."""
    drawn = []
    for index in range(count):
        generator = seeded_generator("cpu", seed, "holes", index)
        hole = draw_hole(size, generator)
        while hole.all() or not hole.any():
            hole = draw_hole(size, generator)
        drawn.append(hole)
    return torch.stack(drawn)


def batched(function, count: int, size: int, name: str) -> Tensor:
    """`function` of all slices of `range(count)`, joined."""
    starts = tqdm(range(0, count, size), desc=name, mininterval=10)
    return torch.cat([function(slice(start, min(start + size, count))) for start in starts])


def sample(pipe, part: slice, options: argparse.Namespace, **inputs) -> Tensor:
    """Results `(n, 3, R, R)` in [0, 1] of a call, each by the seed of its row."""
    generators = [seeded_generator("cpu", options.seed, index) for index in range(part.start, part.stop)]
    steps = {"num_inference_steps": options.num_inference_steps, "guidance_scale": 1.0}
    return pipe(generator=generators, output_type="pt", **steps, **inputs).images.float().cpu()


def colours(train: Tensor, images: Tensor) -> Tensor:
    """Grey images with the mean colour that pixels of `train` have at each brightness."""
    level = (luminance(train) * (BINS - 1)).round().long().flatten()
    counts = torch.bincount(level, minlength=BINS).clamp(min=1)
    sums = [torch.bincount(level, train[:, c].flatten(), BINS) for c in range(3)]
    table = torch.stack(sums, 1) / counts[:, None]
    return table[(luminance(images) * (BINS - 1)).round().long().squeeze(1)].permute(0, 3, 1, 2)


def nearest(train: Tensor, conditions: Tensor) -> Tensor:
    """For each condition `(N, 3, R, R)` the row of the nearest of `train`, `(N,)`."""
    parts = conditions.flatten(1).split(50)
    return torch.cat([torch.cdist(part, train.flatten(1)).argmin(1) for part in parts])


def baselines(task: Task, given: Tensor, images: Tensor, hole: Tensor | None, train) -> dict[str, Tensor]:
    """Results `(N, 3, R, R)` in [0, 1] by name, of what is `given` for `images`.

    Args:
        train: f(column or None) -> training pictures `(M, 3, R, R)` of a column, None of the images.
    """
    if task.kind == "inpaint":
        mean = (images * ~hole).sum((2, 3), keepdim=True) / (~hole).sum((2, 3), keepdim=True)
        return {"mean colour of what is known": torch.where(hole, mean, images)}
    if task.kind == "superres":
        size = images.shape[-2:]
        return {"nearest pixels": F.interpolate(given, size), "bicubic": task.shown(given, size)}
    if task.kind == "colorize":
        grey = luminance(images).expand_as(images)
        return {"grey": grey, "mean colour at each brightness": colours(train(None), images)}
    if task.kind == "column":
        found = train(None)[nearest(train(task.config["column"]), given)]
        return {"the condition itself": given, "picture of the nearest condition in training": found}
    raise SystemExit(f"no baselines for the task {task.config}")


def measure(pipe, splits: datasets.DatasetDict, network, options: argparse.Namespace) -> None:
    """Print the table of a model and write its grid."""
    task, held, size = pipe.task, splits[options.split], options.batch_size
    rows, learned = some(held, options.limit, "rows"), some(splits["train"], options.train, "train")
    images = given = read(held, options.image_column, rows)
    side = images.shape[-2:]
    hole = holes(len(images), side[0], options.seed) if task.takes_mask else None
    if task.kind == "column":
        given = read(held, task.config["column"], rows)
    elif task.kind == "superres":
        given = task.low_resolution(images, side)

    def train(column: str | None) -> Tensor:
        return read(splits["train"], column or options.image_column, learned)

    def draw(drawing) -> Tensor:
        def some_images(part: slice) -> Tensor:
            masks = {"mask_image": hole[part].float()} if task.takes_mask else {}
            return sample(drawing, part, options, image=given[part], **masks)

        return batched(some_images, len(images), size, task.kind)

    results = baselines(task, given, images, hole, train)
    if task.takes_mask and options.unconditional:
        results["latent blending, no training"] = draw(load(options.unconditional))
    results["**trained**"] = draw(pipe)
    autoencoded = batched(
        lambda part: pipe.decode(pipe.encode(images[part])).cpu(), len(images), size, "floor"
    )
    results["the original through the autoencoder"] = (
        torch.where(hole, autoencoded, images) if task.takes_mask else autoencoded
    )

    def features(pictures: Tensor) -> Tensor:
        pixels = to_uint8(pictures * 2 - 1)
        return batched(lambda part: network(pixels[part])["features"], len(pixels), size, "features")

    distance, lines = FrechetDistance(features(images)), []
    for name, pictures in results.items():
        errors = task_errors(task, pictures * 2 - 1, images * 2 - 1, hole)
        figures = {"FD": distance(features(pictures))} | {k: v.mean().item() for k, v in errors.items()}
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in figures.values())} |")
    print(f"\n{task.config}, {len(images)} pictures of {options.split}\n\n| result | {' | '.join(figures)} |")
    print("|---|" + "---|" * len(figures), *lines, sep="\n", flush=True)
    holed = [task.shown(given, side, hole)] if task.takes_mask else []  # else a baseline is the condition
    shown = [*holed, *list(results.values())[:-1], images]
    page = torch.stack([column[:GRID_ROWS] for column in shown], 1).flatten(0, 1)
    save_grid(page * 2 - 1, options.grids / f"{task.kind}.png", columns=len(shown))


def load(source: str) -> LDMPipeline:
    """A pipeline without progress bars of its own."""
    pipe = LDMPipeline.from_pretrained(source)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", help="data set or folder")
    parser.add_argument("features", help="network as of --evaluation.features, such as a TorchScript file")
    parser.add_argument("pipelines", nargs="+", help="pipeline folders or Hub ids of trained tasks")
    parser.add_argument("--unconditional", help="pipeline without a task, for latent blending")
    parser.add_argument("--split", default="test", help="held-out split")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--limit", type=int, default=1000, help="held-out pictures, at most")
    parser.add_argument("--train", type=int, default=4000, help="training pictures for baselines, at most")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=Path, default=Path("."), help="folder of the grids")
    return parser.parse_args()


def main():
    options = parse()
    options.grids.mkdir(parents=True, exist_ok=True)
    splits, network = datasets.load_dataset(options.dataset), load_network(options.features)
    with torch.no_grad():
        for name in options.pipelines:
            measure(load(name), splits, network, options)


if __name__ == "__main__":
    main()
