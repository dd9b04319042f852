"""A run's autoencoder beside the linear (patch-PCA) code of the same latent shape, on held-out images.

    python benchmarks/linear_code.py runs/cifar10_cpu --scorer path/to/score_cifar.py

The scorer is optional: a Python file with `ResNet20`, `features`, `frechet`, `reference` and `SHARED`.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ldm_pipeline.models import load_autoencoder
from training.config import parse_config
from training.data import ImageSplit, load_images
from training.latents import encode
from training.metrics import psnr, ssim


def load(split: ImageSplit, count: int) -> Tensor:
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


def frechet_to_training_images(path: Path, images: Tensor) -> float:
    """Frechet distance of the scorer's pooled features to those of its training images."""
    spec = importlib.util.spec_from_file_location("scorer", path)
    scorer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scorer)
    network = scorer.ResNet20()
    network.load_state_dict(load_file(scorer.SHARED / "eval/resnet20-cifar10.safetensors"))
    network.eval()
    reference = scorer.reference(network, Path(tempfile.gettempdir(), "score_cifar_reference.npz"))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return scorer.frechet(scorer.features(network, pixels)[0][:, -64:], reference["train"][:, -64:])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--scorer", type=Path)
    parser.add_argument("--images", type=int, default=10_000, help="held-out images, at most")
    options = parser.parse_args()
    data = load_images(parse_config(["--config", str(options.run / "config.yaml")]).data)
    autoencoder = load_autoencoder(options.run / "autoencoder").eval()
    held_out = load(data.held_out, options.images)
    latents = encode(autoencoder, held_out[:1])[0]
    factor, channels = held_out.shape[3] // latents.shape[3], latents.shape[1]
    linear = patch_pca(load(data.train, 10_000), factor, channels)
    codes = {
        "linear (patch PCA)": linear,
        type(autoencoder).__name__: lambda batch: autoencoder.decode(encode(autoencoder, batch)[0]).sample,
        "the images themselves": lambda batch: batch,
    }
    print(f"{len(held_out)} held-out images, latents {channels} x {latents.shape[2]} x {latents.shape[3]}\n")
    print("| code | PSNR | SSIM | fd |\n|---|---|---|---|")
    for name, code in codes.items():
        decoded = torch.cat([code(batch) for batch in held_out.split(250)])
        figures = [f"{psnr(decoded, held_out).mean():.2f}", f"{ssim(decoded, held_out).mean():.4f}"]
        figures.append(f"{frechet_to_training_images(options.scorer, decoded):.3f}" if options.scorer else "")
        print(f"| {name} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
