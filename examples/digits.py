"""Shared by the examples on handwritten digits: images, training, sampling, and the quality of samples."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm_pipeline.models import build_autoencoder, build_unet
from ldm_pipeline.pipeline import (
    Condition,
    denoise,
    denormalize_latents,
    normalize_latents,
    set_latent_statistics,
)
from training.config import AutoencoderConfig, DataConfig, DenoiserConfig
from training.data.images import load_images
from training.data.latents import encode
from training.evaluation.features import load_network
from training.evaluation.metrics import FrechetDistance
from training.evaluation.plots import to_uint8
from training.losses.autoencoder import AutoencoderLoss
from training.losses.denoising import DenoisingLoss, sample_timesteps, stratified
from training.runtime.ema import EMA

SIDE, BATCH, CLASSES = 16, 64, 10
UNET = {"widths": (32, 64), "layers_per_block": 1, "attention": (False, True)}
UNET |= {"attention_head_dim": 16, "norm_groups": 8, "num_classes": CLASSES}


def load() -> tuple[Tensor, Tensor]:
    """The training digits of scikit-learn, (N, 1, SIDE, SIDE) in [-1, 1], and their labels (N,)."""
    digits = load_images(DataConfig(dataset="digits", resolution=SIDE, channels=1)).train
    items = [digits[index, False] for index in range(len(digits))]
    return tuple(torch.stack([item[key] for item in items]) for key in ("images", "class_labels"))


class Training:
    """A network, trained step by step on batches of a set of images.

    loss_of: f(indices (BATCH,)), the loss; count: of images. `seconds` are those that the process computed.
    """

    def __init__(self, network: nn.Module, loss_of: Callable, count: int):
        self.network, self.loss_of, self.count, self.steps, self.seconds = network, loss_of, count, 0, 0.0
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        self.ema = EMA(network, 0.1, 100 * BATCH)

    def go(self, steps: float = float("inf"), seconds: float = float("inf")) -> None:
        """Train up to that many steps or seconds in all."""
        start = time.process_time() - self.seconds
        while self.steps < steps and self.seconds < seconds:
            self.loss_of(torch.randint(self.count, (BATCH,))).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            self.ema.update(self.steps * BATCH, BATCH)
            self.seconds = time.process_time() - start


def autoencoder_training(images: Tensor, kl_weight: float) -> Training:
    """An AutoencoderKL of 4x4 latents with 8 channels, by this package's loss."""
    vae = build_autoencoder("AutoencoderKL", (8, 16, 32), (1, 1, 1), 8, 1, SIDE)
    loss = AutoencoderLoss(vae, AutoencoderConfig(reconstruction_loss="l2", kl_weight=kl_weight))
    shape = (BATCH, *encode(vae, images[:1])[0].shape[1:])
    return Training(vae, lambda rows: loss(images[rows], torch.randn(shape))[0]["loss"], len(images))


@torch.no_grad()
def to_latents(vae: nn.Module, images: Tensor) -> Tensor:
    """Normalised latents of all images; their statistics are written into the autoencoder's config."""
    latents = encode(vae, images)[0]
    set_latent_statistics(vae, latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist())
    return normalize_latents(vae, latents)


@torch.no_grad()
def to_images(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images (N, 1, SIDE, SIDE) of normalised latents."""
    return vae.decode(denormalize_latents(vae, latents)).sample


def denoiser_training(clean: Tensor, labels: Tensor) -> Training:
    """A U-Net that denoises clean images or latents (N, C, h, w) by class, by this package's loss: a flow."""
    unet = build_unet(clean.shape[-1], clean.shape[1], **UNET)
    config = DenoiserConfig()
    loss, null = DenoisingLoss(unet, config), Condition.null(unet, BATCH)

    def loss_of(rows: Tensor) -> Tensor:
        timesteps = sample_timesteps(config, stratified(torch.rand(BATCH)))
        condition = Condition(labels[rows]).drop(torch.rand(BATCH) < 0.1, null)
        return loss(clean[rows], torch.randn(BATCH, *clean.shape[1:]), timesteps, condition)[0]

    return Training(unet, loss_of, len(clean))


@torch.no_grad()
def sample(unet: nn.Module, labels: Tensor, steps: int = 10) -> Tensor:
    """Euler's method from noise to images or latents (N, C, h, w) of these classes."""
    generator = torch.Generator().manual_seed(1)
    side, channels = unet.config.sample_size, unet.config.in_channels
    noisy = torch.randn(len(labels), channels, side, side, generator=generator)
    for step in range(steps):
        times = torch.full((len(labels),), 1000 * (1 - step / steps))
        noisy = noisy - denoise(unet, noisy, times, Condition(labels)) / steps
    return noisy


def quality(samples: Tensor, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Frechet distance of samples to images, and the share that is read as the class in `labels`.

    Both by the package's features of digits, which are the images at 8x8 pixels and the nearest digit.
    """
    network = load_network("digits")
    found = network(to_uint8(samples))
    distance = FrechetDistance(network(to_uint8(images))["features"])(found["features"])
    return distance, float((found["logits"].argmax(1) == labels).float().mean())
