"""The same kind of U-Net on pixels instead of latents: distance of its samples over the minutes of training.

    python benchmarks/pixels.py path/to/features.pt --output_dir runs/pixels --data.dataset path/to/cifar10 \\
      --data.resolution 32 --denoiser.max_steps 9000 --denoiser.checkpoint_every 1000 \\
      --denoiser.keep_every 1000

Takes the options of `train_denoiser.py` besides its own, and its loop, optimizer and sampler: the pixels are
written where the run looks for latents, for an autoencoder of three channels without downsampling that is
never used. Every kept checkpoint draws samples of all classes in turn, by its averages, and is held against
all training images. The same command continues.
"""

import argparse
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from benchmarks.minutes import Judge, Measured, checkpoints_of, put_averages
from benchmarks.overheads import put_latents
from benchmarks.tasks import load
from ldm_pipeline.pipeline import denormalize_latents
from training.config import parse_config
from training.data.images import SPLITS
from training.runtime.run import Run, start
from training.train_denoiser import train_denoiser

SHARD = 8192
WITHOUT = {"kind": "AutoencoderDC", "widths": [12], "blocks": [1], "latent_channels": 3}
ALWAYS = [
    "--data.horizontal_flip=true",
    *(f"--autoencoder.{name}={value}" for name, value in WITHOUT.items()),
]


def write_pixels(run: Run) -> None:
    """The images and their mirror images, in [-1, 1], where the run looks for its latents."""

    def parts(split: str) -> Iterator[dict[str, Tensor]]:
        images = getattr(run.data, split)
        for first in range(0, len(images), SHARD):
            items = [images[index, False] for index in range(first, min(first + SHARD, len(images)))]
            pixels = torch.stack([item["images"] for item in items])
            labels = torch.tensor([int(item["class_labels"]) for item in items])
            yield {"mean": torch.stack([pixels, pixels.flip(-1)], 1).half(), "class_labels": labels}

    put_latents(run, {split: parts(split) for split in SPLITS})


@torch.no_grad()
def measure(run: Run, features: str, count: int) -> None:
    """Print a table of the metrics of the samples of every kept checkpoint, which `pixels.json` keeps."""
    judge, pipe = cache(lambda: Judge(run.data.train, features)), load(run.folder / "pipeline")

    def draw(labels: list[int], generator: torch.Generator) -> Tensor:
        with run.accelerator.autocast():
            drawn = pipe(class_labels=labels, generator=generator, output_type="latent").images
        return denormalize_latents(pipe.vae, drawn.float()).cpu()

    measured = Measured(run.folder / "pixels.json")
    for folder, step, seconds in checkpoints_of(run.folder):

        def metrics(folder=folder) -> dict[str, float]:
            put_averages(pipe, folder)
            return judge()(draw, count)

        measured.add("pixels", f"step {step}", seconds / 60, metrics)
    measured.print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("features", help="network as of --evaluation.features, such as a TorchScript file")
    parser.add_argument("--count", type=int, default=2000, help="samples of each checkpoint")
    own, options = parser.parse_known_args()
    run = start(parse_config([*options, *ALWAYS]), ["denoiser"])
    if not (run.folder / "latents" / "manifest.json").exists():
        write_pixels(run)
    if not run.done("denoiser"):
        train_denoiser(run)
    measure(run, own.features, own.count)


if __name__ == "__main__":
    main()
