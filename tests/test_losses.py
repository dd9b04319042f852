"""Every term of the autoencoder's loss moves what it should, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_pipeline import build_autoencoder
from training.config import AutoencoderConfig
from training.losses.autoencoder import (
    AutoencoderLoss,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    last_layer,
)


class Perceptual(nn.Module):
    """Stands for LPIPS, whose weights cannot be shipped: a frozen convolution compares two RGB batches."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, a, b):
        return (self.features(a) - self.features(b)).square().mean((1, 2, 3))


def make(kind="AutoencoderKL", channels=3, **options):
    torch.manual_seed(0)
    config = AutoencoderConfig(**options)
    autoencoder = build_autoencoder(kind, [8, 16], [0 if kind == "AutoencoderDC" else 1, 1], 4, channels, 16)
    loss = AutoencoderLoss(autoencoder, config, Perceptual() if config.lpips_weight else None)
    return loss, torch.rand(4, channels, 16, 16) * 2 - 1, torch.randn(4, 4, 8, 8)


def moved(term, module) -> set[str]:
    """The parts of the module that the term has a gradient into."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return {
        name.split(".")[0]
        for name, g in zip(names, gradients, strict=True)
        if g is not None and g.abs().sum() > 0
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_pixel_and_perceptual_terms_train_both_halves(kind, channels):
    loss, images, noise = make(kind, channels, lpips_weight=1.0)
    terms, _, _ = loss(images, noise)
    for term in ("pixel", "perceptual", "loss"):
        assert {"encoder", "decoder"} <= moved(terms[term], loss.autoencoder)
    assert not any(p.requires_grad for p in loss.perceptual.parameters())


def test_kl_trains_the_encoder_alone_and_is_that_of_two_gaussians():
    loss, images, noise = make()
    terms, _, _ = loss(images, noise)
    assert moved(terms["kl"], loss.autoencoder) == {"encoder", "quant_conv"}
    posterior = loss.autoencoder.encode(images).latent_dist
    gaussian = torch.distributions.Normal(posterior.mean, posterior.std)
    wanted = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0.0, 1.0)).mean()
    assert torch.isclose(terms["kl"], wanted, rtol=1e-4)


def test_the_kl_weight_is_that_of_sums_over_an_image():
    """LDM: sum of pixel errors + weight * sum of KL; ours is that divided by the image's elements."""
    loss, images, noise = make(kl_weight=10.0)
    terms, _, _ = loss(images, noise)
    halved, _, _ = loss(images, noise, halve=True)
    assert torch.isclose((halved["loss"] - halved["pixel"]) / halved["kl"], torch.tensor(10 * 256 / 768))
    by_sums = (terms["pixel"] * images[0].numel() + 10 * terms["kl"] * noise[0].numel()) / images[0].numel()
    assert torch.isclose(terms["loss"], by_sums)


def test_without_a_posterior_the_kl_holds_the_latents_scale():
    loss, images, noise = make("AutoencoderDC", kl_weight=0.01)
    terms, _, _ = loss(images, noise)
    assert torch.isclose(terms["kl"], 0.5 * loss.autoencoder.encode(images).latent.square().mean())
    assert moved(terms["kl"], loss.autoencoder) == {"encoder"}


def test_latent_noise_is_relative_to_the_latents_deviation():
    """Ten times larger latents get ten times the noise, so an encoder cannot escape it by growing."""
    quiet, images, noise = make("AutoencoderDC")
    noisy, _, _ = make("AutoencoderDC", latent_noise=0.5)
    latents = quiet.autoencoder.encode(images).latent
    wanted = latents + 0.5 * latents.std((0, 2, 3), correction=0, keepdim=True) * noise
    assert torch.allclose(noisy(images, noise)[2], noisy.autoencoder.decode(wanted).sample, atol=1e-4)
    assert torch.allclose(quiet(images, noise)[2], quiet.autoencoder.decode(latents).sample, atol=1e-5)


def test_equivariance_compares_halved_latents_with_halved_images():
    loss, images, noise = make("AutoencoderDC")
    _, target, reconstruction = loss(images, noise, halve=True)
    assert torch.equal(target, F.interpolate(images, scale_factor=0.5, mode="area"))
    assert reconstruction.shape == target.shape


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_the_adversarial_terms_each_move_one_side(kind):
    loss, images, noise = make(kind)
    discriminator = PatchDiscriminator(3)
    terms, target, reconstruction = loss(images, noise)
    fooled = generator_loss(discriminator, reconstruction)
    assert {"encoder", "decoder"} <= moved(fooled, loss.autoencoder) and moved(fooled, discriminator) == set()
    judged = discriminator_loss(discriminator(target), discriminator(reconstruction.detach()))
    assert moved(judged, loss.autoencoder) == set() and len(moved(judged, discriminator)) > 3
    last = last_layer(loss.autoencoder)
    assert last.shape[0] == 3 * (4 if kind == "AutoencoderDC" else 1)  # it makes the image's channels
    weight = adaptive_weight(terms["loss"], fooled, last)
    norms = [
        torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (terms["loss"], weight * fooled)
    ]
    assert torch.isclose(norms[0], norms[1], rtol=0.01)


def test_the_adaptive_weight_is_clamped():
    last = nn.Parameter(torch.ones(3))
    assert adaptive_weight((1e9 * last).sum(), (1e-9 * last).sum(), last) == 1e4
