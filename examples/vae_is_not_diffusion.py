"""Why "decode random latents" is not the reverse process: a VAE and an LDM on the same digits.

A VAE pays for latents that are not like N(0, 1), and decodes N(0, 1). The autoencoder of an LDM pays next to
nothing; its latents are far from independent noise, and the denoiser takes noise to them. The KL divergence
of this package's loss is compared with its definition, an average over samples of the posterior.
"""

import torch
from digits import (
    autoencoder_training,
    denoiser_training,
    load,
    quality,
    sample,
    to_images,
    to_latents,
)
from show import arguments, draw_images, new_figure, print_table, save
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ldm_pipeline.pipeline import normalize_latents
from training.config import AutoencoderConfig
from training.data.latents import encode
from training.losses.autoencoder import AutoencoderLoss

WEIGHTS = {"VAE": 0.1, "autoencoder of the LDM": 1e-4}  # of KL, both summed over an image


@torch.no_grad()
def check_divergence(vae: nn.Module, images: Tensor) -> float:
    """The term "kl" of this package's loss, which is E[log q(z | x) - log p(z)] per latent element.

    AssertionError unless its closed form is the average over samples of q, within five standard errors.
    """
    mean, std = encode(vae, images)
    reported = AutoencoderLoss(vae, AutoencoderConfig())(images, torch.zeros_like(mean))[0]["kl"]
    z = Normal(mean, std).sample((100,))
    ratios = (Normal(mean, std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).flatten(1).mean(1)
    assert abs(ratios.mean() - reported) < 5 * ratios.std() / 10, "KL of the loss and by its definition"
    return float(reported)


def distance_to_noise(latents: Tensor) -> float:
    """KL(N(0, C) || N(0, 1)) in nats per latent element; C is the covariance of latents (N, c, h, w).

    Normalised per channel, latents have variance 1 on average. What is left is how much they depend on each
    other, which a decoder of independent noise gets wrong.
    """
    covariance = latents.flatten(1).T.double().cov()
    nats = (covariance.trace() - len(covariance) - covariance.logdet()) / 2
    zero, one = torch.zeros(len(covariance)).double(), torch.eye(len(covariance)).double()
    wanted = kl_divergence(MultivariateNormal(zero, covariance), MultivariateNormal(zero, one))
    assert abs(nats / wanted - 1) < 1e-6, "KL of two Gaussians"
    return float(nats) / len(covariance)


if __name__ == "__main__":
    steps = 600, "of training the denoiser; half of each autoencoder"
    options = arguments(__doc__, steps=steps, samples=(600, "of each"))
    torch.manual_seed(0)
    images, labels = load()
    asked, rows, panels = labels[: options.samples], [], {"digits": images}
    for name, weight in WEIGHTS.items():
        training = autoencoder_training(images, weight)
        training.go(steps=options.steps // 2)
        vae = training.network.eval()
        latents, noise = to_latents(vae, images), torch.randn(2, len(images), 8, 4, 4)
        # A VAE decodes N(0, 1) as it is; the latents of an LDM are first given their mean and deviation.
        raw = name == "VAE"
        white = noise[0, : options.samples]
        decoded = to_images(vae, normalize_latents(vae, white) if raw else white)
        rebuilt = to_images(vae, latents)
        with torch.no_grad():
            mean, std = encode(vae, images)
        drawn = mean + std * noise[1]
        panels |= {f"{name}: rebuilt": rebuilt, f"{name}: decoded noise": decoded}
        psnr = 10 * float((4 / (rebuilt - images).square().mean()).log10())
        far = distance_to_noise(drawn if raw else normalize_latents(vae, drawn))
        numbers = psnr, check_divergence(vae, images[:200]), far
        rows.append((f"{name}, decoded noise", *numbers, quality(decoded, images, asked)[0]))

    training = denoiser_training(latents, labels)
    training.go(steps=options.steps)
    with training.ema.swapped() as unet:
        drawn = to_images(vae, sample(unet.eval(), asked, 20))
    panels["LDM: denoised noise"] = drawn
    rows.append(("LDM, denoised noise", *numbers, quality(drawn, images, asked)[0]))
    print_table("pictures of | PSNR | KL per element | dependence of latents | Frechet distance", rows)
    figure, axes = new_figure(10, 3.9, 2, 3)
    for each, (title, pictures) in zip(axes.flat, panels.items(), strict=True):
        draw_images(each, pictures[:50], title, 10)
    save(figure, options.output)
