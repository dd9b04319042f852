"""A run's autoencoder beside the linear (patch-PCA) code of the same latent shape, on held-out images.

    python benchmarks/linear_code.py runs/cifar10_cpu --features facebook/dinov2-base

With `--features`, a network as of `--evaluation.features`, also the Frechet distance to the training images.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm_pipeline.loading import load_autoencoder
from training.config import parse_config
from training.data.images import ImageDataset, load_images
from training.data.latents import encode
from training.evaluation.features import FeatureNetwork, load_network
from training.evaluation.metrics import FrechetDistance
from training.evaluation.plots import to_uint8
from training.evaluation.validation import psnr, ssim


def load(split: ImageDataset, count: int) -> Tensor:
    """The first `count` images `(N, C, R, R)` in [-1, 1]."""
    chosen = range(min(count, len(split)))
    return torch.stack(
        [split[index, False]["images"] for index in tqdm(chosen, desc=split.name, mininterval=10)]
    )


def patch_pca(images: Tensor, factor: int, channels: int) -> Callable[[Tensor], Tensor]:
    """Code by the first `channels` principal components of `factor` x `factor` patches of `images`."""
    patches = F.pixel_unshuffle(images, factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    basis = torch.linalg.eigh(torch.cov(patches.T)).eigenvectors[:, -channels:]

    def reconstruct(batch: Tensor) -> Tensor:
        rows = F.pixel_unshuffle(batch, factor).permute(0, 2, 3, 1).double() - mean
        return F.pixel_shuffle((rows @ basis @ basis.T + mean).permute(0, 3, 1, 2), factor).float()

    return reconstruct


def features(network: FeatureNetwork, images: Tensor) -> Tensor:
    """Features `(N, D)` of images in [-1, 1]."""
    return torch.cat([network(to_uint8(batch))["features"] for batch in images.split(250)])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--features")
    parser.add_argument("--images", type=int, default=10_000, help="held-out images, at most")
    options = parser.parse_args()
    data = load_images(parse_config(["--config", str(options.run / "config.yaml")]).data)
    autoencoder = load_autoencoder(options.run / "autoencoder").eval()
    held_out = load(data.held_out, options.images)
    latents = encode(autoencoder, held_out[:1])[0]
    factor, channels = held_out.shape[3] // latents.shape[3], latents.shape[1]
    network = load_network(options.features) if options.features else None
    train = load(data.train, len(data.train) if network else 10_000)
    linear = patch_pca(train[:10_000], factor, channels)
    distance = FrechetDistance(features(network, train)) if network else None
    codes = {
        "linear (patch PCA)": linear,
        type(autoencoder).__name__: lambda batch: autoencoder.decode(encode(autoencoder, batch)[0]).sample,
        "the images themselves": lambda batch: batch,
    }
    print(f"{len(held_out)} held-out images, latents {channels} x {latents.shape[2]} x {latents.shape[3]}\n")
    print("| code | PSNR | SSIM | fd |\n|---|---|---|---|")
    for name, code in codes.items():
        decoded = torch.cat([code(batch) for batch in held_out.split(250)])
        metrics = [f"{psnr(decoded, held_out).mean():.2f}", f"{ssim(decoded, held_out).mean():.4f}"]
        metrics.append(f"{distance(features(network, decoded)):.3f}" if network else "")
        print(f"| {name} | {' | '.join(metrics)} |", flush=True)


if __name__ == "__main__":
    main()
