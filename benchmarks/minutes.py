"""Distance and recall of samples over the minutes that runs took, as tables and a plot.

    python benchmarks/minutes.py path/to/cifar10 path/to/features.pt --plot curve.png \\
      --runs "by --minutes=runs/5,runs/10,runs/20" --checkpoints "cifar10_cpu.yaml=runs/cifar10_cpu"

`--runs NAME=FOLDERS` is a curve with a point for each finished run, `--checkpoints NAME=FOLDERS` one with a
point for each checkpoint that a run kept (`--denoiser.keep_every`). Samples are of all classes in turn, by
the pipelines' own defaults, and are held against all training images. Minutes are those of autoencoder,
latents and denoiser. What was measured before is in the JSON file beside the plot, and stays.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.tasks import load
from ldm_pipeline import LDMPipeline
from training.config import parse_config
from training.data.images import ImageDataset, load_images
from training.evaluation.features import load_network
from training.evaluation.metrics import Reference
from training.evaluation.plots import to_uint8
from training.runtime.atomic import read_json, write_json
from training.runtime.checkpoints import ema_weights, found_checkpoints

BATCH = 100
SHOWN = ("FD", "recall")


class Judge:
    """Metrics of samples beside all training images, in the features of a network."""

    def __init__(self, train: ImageDataset, features: str):
        self.network = load_network(features)
        loader = DataLoader(train, sampler=[(index, False) for index in range(len(train))], batch_size=BATCH)
        outputs = self._outputs(to_uint8(batch["images"]) for batch in loader)
        self.reference = Reference(features, outputs, train.labels, torch.device("cpu"))

    @torch.no_grad()
    def _outputs(self, parts: Iterator[Tensor]) -> dict[str, Tensor]:
        """Outputs of the network by name, for parts (n, 3, R, R) uint8 of all images."""
        outputs = [self.network(part) for part in parts]
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}

    def __call__(self, draw: Callable[[list[int], torch.Generator], Tensor], count: int) -> dict[str, float]:
        """Metrics of `count` samples.

        Args:
            draw: (class numbers, generator) -> images `(n, 3, R, R)` in [-1, 1].
        """
        classes = int(self.reference.labels.max()) + 1
        labels = torch.arange(count) % classes

        def parts() -> Iterator[Tensor]:
            for first in range(0, count, BATCH):
                generator = torch.Generator().manual_seed(first)
                yield to_uint8(draw(labels[first : first + BATCH].tolist(), generator))

        return self.reference.metrics(self._outputs(parts()), labels)


def drawing(pipe: LDMPipeline, bf16: bool) -> Callable[[list[int], torch.Generator], Tensor]:
    """The sampler of a pipeline, for `Judge`."""

    def draw(labels: list[int], generator: torch.Generator) -> Tensor:
        with torch.autocast(pipe.device.type, torch.bfloat16, bf16):
            images = pipe(class_labels=labels, generator=generator, output_type="pt").images
        return images.float().cpu() * 2 - 1

    return draw


def checkpoints_of(run: Path) -> Iterator[tuple[Path, int, float]]:
    """Folder, step and seconds of a denoiser's training of every kept checkpoint."""
    for folder in found_checkpoints(run / "denoiser"):
        record = read_json(folder / "state.json")
        yield folder, record["step"], record["seconds"]


def put_averages(pipe: LDMPipeline, checkpoint: Path) -> LDMPipeline:
    """The pipeline with the averaged weights of a checkpoint."""
    pipe.unet.load_state_dict(ema_weights(checkpoint))
    return pipe


def seconds_of(run: Path, *stages: str) -> float:
    """Seconds that stages of a run took."""
    return sum(read_json(run / stage / "done.json")["seconds"] for stage in stages)


def runs_of(given: list[str]) -> Iterator[tuple[str, Path]]:
    """Curves and run folders of arguments NAME=FOLDER,FOLDER."""
    for text in given:
        curve, _, folders = text.rpartition("=")
        yield from ((curve, Path(folder)) for folder in folders.split(","))


def points(options: argparse.Namespace) -> Iterator[tuple[str, str, float, Callable[[], LDMPipeline]]]:
    """Curve, name, minutes and the way to the pipeline of every point."""
    for curve, run in runs_of(options.runs):
        minutes = seconds_of(run, "autoencoder", "latents", "denoiser") / 60
        yield curve, run.name, minutes, partial(load, run / "pipeline")
    for curve, run in runs_of(options.checkpoints):
        before = seconds_of(run, "autoencoder", "latents")
        for folder, step, seconds in checkpoints_of(run):
            averaged = lambda run=run, folder=folder: put_averages(load(run / "pipeline"), folder)  # noqa: E731
            yield curve, f"{run.name}, step {step}", (before + seconds) / 60, averaged


class Measured:
    """Metrics of the points of curves, in a JSON file: what is in it is not measured again.

    Attributes:
        curves: name -> point -> "minutes" and metrics.
    """

    def __init__(self, path: Path):
        self.path = path
        self.curves: dict[str, dict[str, dict[str, float]]] = read_json(path) if path.exists() else {}

    def add(self, curve: str, point: str, minutes: float, metrics: Callable[[], dict[str, float]]) -> None:
        points = self.curves.setdefault(curve, {})
        if point not in points:
            points[point] = {"minutes": minutes} | metrics()
            write_json(self.path, self.curves)

    def print(self) -> None:
        for curve, points in self.curves.items():
            print_table(curve, points)


def plot(found: dict, path: Path) -> None:
    """Distance and recall over minutes, a line for each curve."""
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    for panel, metric in zip(figure.subplots(1, 2), SHOWN, strict=True):
        for curve, points in found.items():
            rows = sorted(points.values(), key=lambda row: row["minutes"])
            name = next(name for name in rows[0] if name.split("-")[0] == metric)
            panel.plot([row["minutes"] for row in rows], [row[name] for row in rows], "o-", label=curve)
        panel.set(xlabel="minutes", ylabel=name)
        panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path)


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print the figures of named rows as a Markdown table."""
    names = [name for name in next(iter(rows.values())) if not name.endswith("deviation")]
    print(f"\n| {title} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[key]:.3f}' for key in names)} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", help="data set or folder")
    parser.add_argument("features", help="network as of --evaluation.features, such as a TorchScript file")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=FOLDER,FOLDER")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="NAME=FOLDER,FOLDER")
    parser.add_argument("--count", type=int, default=2000, help="samples of each point")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="sample in bf16 autocast")
    parser.add_argument("--plot", type=Path, default=Path("minutes.png"))
    return parser.parse_args()


def main():
    options = parse()
    data = parse_config([f"--data.dataset={options.dataset}", f"--data.resolution={options.resolution}"]).data
    judge = cache(lambda: Judge(load_images(data).train, options.features))
    measured = Measured(options.plot.with_suffix(".json"))
    for curve, point, minutes, pipe in points(options):

        def metrics(pipe=pipe) -> dict[str, float]:
            return judge()(drawing(pipe(), options.bf16), options.count)

        measured.add(curve, point, minutes, metrics)
        plot(measured.curves, options.plot)
    measured.print()


if __name__ == "__main__":
    main()
