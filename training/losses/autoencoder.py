"""The autoencoder's loss terms, and the discriminator of its adversarial one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import AutoencoderConfig
from training.data.latents import encode


def perceptual_distance(config: AutoencoderConfig) -> nn.Module | None:
    """LPIPS with VGG features (arXiv:1801.03924), frozen; None where its weight is 0."""
    if not config.lpips_weight:
        return None
    from lpips import LPIPS  # here, because it is an extra, and needs torchvision

    return LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()


class AutoencoderLoss(nn.Module):
    """The autoencoder with its loss: the one module that is trained and wrapped for several processes.

    Args:
        autoencoder: AutoencoderKL or AutoencoderDC.
        config: weights of the terms.
        perceptual: maps two batches of RGB images in [-1, 1] to distances `(N, ...)`; frozen, but passes
            gradients on to the reconstruction.
    """

    def __init__(
        self, autoencoder: nn.Module, config: AutoencoderConfig, perceptual: nn.Module | None = None
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.config = config
        self.perceptual = perceptual

    def forward(
        self, images: Tensor, noise: Tensor, halve: bool = False
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Loss terms, the images compared with, and their reconstructions.

        Args:
            images: `(N, C, H, W)` in [-1, 1].
            noise: standard normal `(N, c, h, w)`, which draws the latents from their posterior.
            halve: compare at half the size (scale equivariance, EQ-VAE, arXiv:2502.09509).

        Returns:
            Terms: "loss" (all but the adversarial one), "pixel", "kl" (per latent element; without a
            posterior its part that depends on the mean), "perceptual", "latent_std"; the last four are means.
        """
        mean, std = encode(self.autoencoder, images)
        mean, std = mean.float(), None if std is None else std.float()
        latent_std = _global_std(mean.detach())
        variance = (self.config.latent_noise * latent_std) ** 2
        if std is not None:
            variance = variance + std**2
        latents = mean + variance.sqrt() * noise
        kl_weight = (
            self.config.kl_weight * mean[0].numel() / images[0].numel()
        )  # LDM's is for sums, these are means
        if halve:
            latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
        reconstruction = self.autoencoder.decode(latents).sample.float()

        error = reconstruction - images
        terms = {"pixel": (error.abs() if self.config.reconstruction_loss == "l1" else error.square()).mean()}
        loss = terms["pixel"]
        # Without a posterior, only this part of the KL to the prior depends on the latents: it bounds them.
        terms["kl"] = 0.5 * mean.square().mean()
        if std is not None:
            terms["kl"] = terms["kl"] + 0.5 * (std**2 - 1 - 2 * std.log()).mean()
        loss = loss + kl_weight * terms["kl"]
        if self.perceptual is not None:
            rgb = (image.expand(-1, 3, -1, -1) for image in (reconstruction, images))
            terms["perceptual"] = self.perceptual(*rgb).mean()
            loss = loss + self.config.lpips_weight * terms["perceptual"]
        return {"loss": loss, **terms, "latent_std": latent_std.mean()}, images, reconstruction


def _global_std(latents: Tensor) -> Tensor:
    """Standard deviation per channel, `(1, c, 1, ...)`, over the batches of all processes."""
    dims = [dim for dim in range(latents.ndim) if dim != 1]
    moments = torch.stack([latents.mean(dims, keepdim=True), latents.square().mean(dims, keepdim=True)])
    mean, mean_square = average_over_processes(moments)
    return (mean_square - mean**2).clamp(min=0).sqrt()


def average_over_processes(value: Tensor) -> Tensor:
    """Mean of `value` over all processes; `value` itself if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


class PatchDiscriminator(nn.Sequential):
    """Convolutional discriminator of patches (pix2pix, arXiv:1611.07004): images to logits `(N, 1, h, w)`."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(32, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1),
            nn.GroupNorm(32, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the logits of real and reconstructed images (arXiv:1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(discriminator: nn.Module, reconstruction: Tensor) -> Tensor:
    """Mean logit of the reconstruction, negated; no gradient reaches the discriminator."""
    parameters = {name: p.detach() for name, p in discriminator.named_parameters()}
    return -torch.func.functional_call(discriminator, parameters, reconstruction).mean()


def adaptive_weight(reconstruction_term: Tensor, adversarial_term: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two terms' gradients at the decoder's last layer, clamped to 1e4.

    As in VQGAN (arXiv:2012.09841, eq. 7). The gradients are averaged over the processes first, so all use
    the same weight.
    """
    norms = [
        average_over_processes(torch.autograd.grad(term, last_layer, retain_graph=True)[0]).norm()
        for term in (reconstruction_term, adversarial_term)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


def last_layer(autoencoder: nn.Module) -> nn.Parameter:
    """Weight of the decoder's last convolution, for every class of autoencoder."""
    return [parameter for parameter in autoencoder.decoder.parameters() if parameter.ndim > 2][-1]
