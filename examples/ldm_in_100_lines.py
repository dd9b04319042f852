"""A latent diffusion model in one file, with nothing but torch and the networks of Diffusers.

The end, `prove`, shows that its losses and its sampler are those of this package.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DModel
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

NULL, KL_WEIGHT = 10, 1e-4  # the class that says nothing; of the autoencoder's loss


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction and a little KL, per pixel (Kingma and Welling, arXiv:1312.6114, equation 10)."""
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / images.numel()
    return F.mse_loss(reconstruction, images) + KL_WEIGHT * kl


def flow_loss(unet: UNet2DModel, clean: Tensor, noise: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """Velocity of the straight path from latents to noise (Liu et al., arXiv:2209.03003, equation 1)."""
    tau = time.view(-1, 1, 1, 1)
    noisy = (1 - tau) * clean + tau * noise
    return F.mse_loss(unet(noisy, 1000 * time, class_labels=labels).sample, noise - clean)


@torch.no_grad()
def sample(unet: UNet2DModel, latents: Tensor, labels: Tensor, steps: int = 20, scale: float = 1.5) -> list:
    """Euler's method from noise to latents, led away from no class (arXiv:2207.12598); all its states."""
    states, nothing = [latents], torch.full_like(labels, NULL)
    for step in range(steps):
        time = torch.full((len(latents),), 1000 * (1 - step / steps))
        without, named = (unet(states[-1], time, class_labels=each).sample for each in (nothing, labels))
        states.append(states[-1] - (without + scale * (named - without)) / steps)
    return states


def train(name: str, network: torch.nn.Module, steps: int, loss_of) -> None:
    """Minimise loss_of(64 indices of digits, noise), and print a row; the learning rate rises and falls."""
    optimizer = torch.optim.AdamW(network.parameters())
    schedule, values = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps), []
    for _ in range(steps):
        loss = loss_of(torch.randint(1797, (64,)), torch.randn(64, 8, 4, 4))
        optimizer.zero_grad()
        loss.backward()
        values.append(loss.item())
        optimizer.step()
        schedule.step()
    print(f"| {name} | {steps} | {values[0]:.3f} | {sum(values[-10:]) / 10:.3f} |", flush=True)


def prove(vae, unet, images, clean, labels, statistics) -> None:
    """AssertionError unless losses and sampler are this package's."""
    from ldm_pipeline.models import build_scheduler
    from ldm_pipeline.pipeline import Condition, LDMPipeline, set_latent_statistics
    from training.config import AutoencoderConfig, DenoiserConfig
    from training.losses.autoencoder import AutoencoderLoss
    from training.losses.denoising import DenoisingLoss

    noise, time = torch.randn_like(clean), torch.rand(len(clean))
    theirs = AutoencoderLoss(vae, AutoencoderConfig(reconstruction_loss="l2", kl_weight=KL_WEIGHT))
    torch.testing.assert_close(vae_loss(vae, images, noise), theirs(images, noise)[0]["loss"])
    trained = DenoisingLoss(unet, DenoiserConfig())
    theirs = trained(clean, noise, 1000 * time, Condition(labels))[0]
    torch.testing.assert_close(flow_loss(unet, clean, noise, time, labels), theirs)
    set_latent_statistics(vae, *(each.flatten().tolist() for each in statistics))
    objective = trained.objective.config
    pipe = LDMPipeline(vae, unet, build_scheduler(objective, "FlowMatchEulerDiscrete"), objective)
    options = {"num_inference_steps": 20, "guidance_scale": 1.5, "output_type": "latent"}
    theirs = pipe(class_labels=labels, latents=noise, **options).images
    torch.testing.assert_close(sample(unet, noise, labels)[-1], theirs, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=__file__.replace(".py", ".png"))
    parser.add_argument("--steps", type=int, default=900, help="of training the denoiser (%(default)s)")
    options, data, _ = parser.parse_args(), load_digits(), torch.manual_seed(0)
    labels, images = torch.tensor(data.target), torch.tensor(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=16, mode="bicubic", antialias=True).clamp(-1, 1)
    down, up = (
        ("DownEncoderBlock2D",) * 3,
        ("UpDecoderBlock2D",) * 3,
    )  # to 4x4 latents and back
    vae = AutoencoderKL(1, 1, down, up, (8, 16, 32), latent_channels=8, norm_num_groups=8)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DModel(4, 8, 8, down_block_types=down, up_block_types=up, num_class_embeds=NULL + 1, **sizes)

    def denoise(rows: Tensor, noise: Tensor) -> Tensor:
        time, given = torch.randn(64).sigmoid(), torch.where(torch.rand(64) < 0.1, NULL, labels[rows])
        return flow_loss(unet, clean[rows], noise, time, given)

    print("| network | steps | loss, first | mean of the last 10 |\n|---|---|---|---|")
    train("VAE", vae, options.steps // 3 + 10, lambda rows, noise: vae_loss(vae, images[rows], noise))
    with torch.no_grad():
        clean = vae.encode(images).latent_dist.mean
    mean, std = clean.mean((0, 2, 3), keepdim=True), clean.std((0, 2, 3), keepdim=True)
    clean = (clean - mean) / std
    train("denoiser", unet, options.steps, denoise)
    prove(vae, unet, images[:100], clean[:100], labels[:100], (mean, std))
    asked = torch.arange(300) % 10
    states = [clean[:300], *sample(unet, torch.randn(300, 8, 4, 4), asked)[::4]]
    with torch.no_grad():
        drawn = [vae.decode(each * std + mean).sample.clamp(-1, 1) for each in states]
    right = labels[torch.cdist(drawn[-1].flatten(1), images.flatten(1)).argmin(1)] == asked
    print(f"\n{right.float().mean():.0%} of 300 samples are nearest to a digit of the class asked for.")
    rows = [images[:10], *(each[:10] for each in drawn), drawn[-1][10:20], drawn[-1][20:30]]
    canvas = torch.cat([torch.cat(list(F.pad(row, (1, 1, 1, 1), value=-1)[:, 0]), 1) for row in rows])
    axes = Figure(figsize=(7, 6.4), dpi=110, layout="constrained").subplots()
    axes.imshow(canvas, cmap="gray_r")
    names = ["digits", "decoded latents", "noise", *(f"{n} steps left" for n in (16, 12, 8, 4)), "samples"]
    axes.set(xticks=[], yticks=[18 * i + 8.5 for i in range(len(names))], yticklabels=names)
    axes.figure.savefig(options.output)
