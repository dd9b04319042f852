"""The same U-Net on pixels and on latents: what a step costs, and what equal time is worth.

Digits of 16x16 pixels are diffused as they are, and as 4x4 latents of an autoencoder whose training counts.
The cost of the convolutions is compared with its closed form. Quality is the Frechet distance of samples.
"""

import torch
from digits import (
    CLASSES,
    SIDE,
    UNET,
    autoencoder_training,
    denoiser_training,
    load,
    quality,
    sample,
    to_images,
    to_latents,
)
from show import BLUE, RED, arguments, draw_images, new_figure, print_table, save
from torch.utils.flop_counter import FlopCounterMode

from ldm_pipeline.models import build_unet
from ldm_pipeline.pipeline import Condition, denoise

PARTS = 3


def closed_form(side: int, channels: int) -> int:
    """Operations of all convolutions of the U-Net for one image; two for each weight at each pixel."""

    def block(inputs: int, outputs: int) -> int:
        """Two convolutions of 3x3, and one of 1x1 where the widths differ."""
        return 9 * outputs * (inputs + outputs) + (inputs != outputs) * inputs * outputs

    fine, coarse = UNET["widths"]
    full = 9 * channels * fine + block(fine, fine)  # in, and down
    full += 9 * coarse**2 + block(coarse + fine, fine) + block(2 * fine, fine)  # up
    full += 9 * fine * channels  # out
    quarter = 9 * fine**2 + block(fine, coarse) + 2 * block(coarse, coarse)  # down, and the middle
    quarter += block(2 * coarse, coarse) + block(coarse + fine, coarse)  # up
    return 2 * side**2 * full + 2 * (side // 2) ** 2 * quarter


def counted(side: int, channels: int) -> int:
    """The same, counted while the network computes."""
    unet = build_unet(side, channels, **UNET)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoise(unet, torch.zeros(1, channels, side, side), torch.zeros(1), Condition.null(unet, 1))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution]


if __name__ == "__main__":
    seconds = 30.0, "of one core for pixels, and as many for latents"
    options = arguments(__doc__, seconds=seconds, samples=(200, "of each"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = load()
    asked = torch.arange(options.samples) % CLASSES
    for side, channels in ((SIDE, 1), (SIDE // 4, 8), (32, 3)):
        assert counted(side, channels) == closed_form(side, channels), (side, channels)

    first = autoencoder_training(images, 1e-4)
    first.go(seconds=options.seconds / 3)
    vae = first.network.eval()
    latents = to_latents(vae, images)

    ways = {
        "pixels": (images, lambda drawn: drawn, 0.0),
        "latents": (latents, lambda drawn: to_images(vae, drawn), first.seconds),
    }
    (figure, axes), rows = new_figure(11, 2.7, 1, 3), []
    for number, (name, (clean, decoded, spent)) in enumerate(ways.items()):
        training, curve = denoiser_training(clean, labels), []
        for part in range(1, PARTS + 1):
            training.go(seconds=(options.seconds - spent) * part / PARTS)
            with training.ema.swapped() as unet:
                drawn = decoded(sample(unet.eval(), asked))
                unet.train()
            curve.append((spent + training.seconds, *quality(drawn, images, asked)))
        cost = closed_form(clean.shape[-1], clean.shape[1])
        rows.append((name, "x".join(map(str, clean.shape[1:])), cost / 1e6, training.steps, *curve[-1][1:]))
        axes[0, 0].plot(*list(zip(*curve, strict=True))[:2], "o-", color=(BLUE, RED)[number], label=name)
        draw_images(axes[0, 1 + number], drawn[:50], f"{name}, {training.steps} steps", 10)
    print_table("diffused | shape | million operations | steps | Frechet distance | of the class", rows)
    floor = quality(to_images(vae, latents), images, labels)[0]
    axes[0, 0].axhline(floor, color=RED, linestyle="--", label="digits, encoded and decoded")
    axes[0, 0].set(ylim=(0, 2), xlabel="seconds, with the autoencoder", title="Frechet distance of samples")
    axes[0, 0].legend()
    save(figure, options.output)
