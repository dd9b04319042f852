"""The networks that a configuration describes, and whether they fit the data and each other."""

import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DModel

from ldm_pipeline.models import build_autoencoder, build_unet, load_autoencoder
from training.config import Config
from training.data import ImageData


def new_autoencoder(config: Config) -> AutoencoderKL | AutoencoderDC:
    """The untrained autoencoder; the same weights for the same seed."""
    torch.manual_seed(config.seed)
    stage, data = config.autoencoder, config.data
    return build_autoencoder(
        stage.kind, stage.widths, stage.blocks, stage.latent_channels, data.channels, data.resolution
    )


def new_denoiser(config: Config, data: ImageData, latent_shape: tuple[int, int, int]) -> UNet2DModel:
    """The untrained U-Net of latents `latent_shape` = (channels, height, width); same seed, same weights."""
    torch.manual_seed(config.seed + 1)
    stage = config.denoiser
    labelled = data.id2label is not None if stage.class_conditional is None else stage.class_conditional
    return build_unet(
        latent_shape[1:],
        latent_shape[0],
        stage.widths,
        stage.layers_per_block,
        stage.attention,
        stage.attention_head_dim,
        stage.norm_groups,
        stage.dropout,
        len(data.id2label) if labelled else None,
    )


def check_networks(
    config: Config, data: ImageData, num_processes: int
) -> tuple[torch.nn.Module, UNet2DModel]:
    """Build both networks without memory, so that what does not fit is found before the first step.

    Returns:
        Autoencoder and denoiser, on the meta device.

    Raises:
        ValueError: with what was found, what is wanted and the option that changes it.
    """
    if config.denoiser.class_conditional and data.id2label is None:
        raise ValueError("--denoiser.class_conditional true, but the data has no labels: name them with "
                         "--data.label_column, or set it to false")  # fmt: skip
    for name, stage, count in (
        ("autoencoder", config.autoencoder, len(data.train)),
        ("denoiser", config.denoiser, len(data.train)),
    ):
        parts = num_processes * stage.gradient_accumulation_steps
        if stage.batch_size % parts:
            raise ValueError(
                f"--{name}.batch_size {stage.batch_size} is no multiple of {num_processes} processes x "
                f"--{name}.gradient_accumulation_steps {stage.gradient_accumulation_steps}"
            )
        if stage.batch_size > count:
            raise ValueError(
                f"--{name}.batch_size {stage.batch_size} is more than the {count} training images"
            )
    with torch.device("meta"):
        autoencoder = _existing(config) if config.autoencoder.pretrained else new_autoencoder(config)
    shape = latent_shape_of(autoencoder, config)
    with torch.device("meta"):
        return autoencoder, new_denoiser(config, data, shape)


def latent_shape_of(autoencoder: AutoencoderKL | AutoencoderDC, config: Config) -> tuple[int, int, int]:
    """Channels, height and width of the latents of the run's images.

    Raises:
        ValueError: if the resolution cannot be halved as often as autoencoder and denoiser do.
    """
    described = autoencoder.config
    widths = described.get("block_out_channels") or described.get("encoder_block_out_channels")
    factor, halvings = 2 ** (len(widths) - 1), 2 ** (len(config.denoiser.widths) - 1)
    resolution = config.data.resolution
    if resolution % (factor * halvings):
        raise ValueError(
            f"--data.resolution {resolution} is no multiple of {factor * halvings}: the autoencoder "
            f"downsamples by {factor} (--autoencoder.widths) and the denoiser by {halvings} "
            "(--denoiser.widths)"
        )
    if config.autoencoder.equivariance and resolution // factor % 2:
        raise ValueError(
            f"--autoencoder.equivariance halves latents, and {resolution // factor} is odd: set it to 0 or "
            "change --data.resolution"
        )
    if factor >= 8 and resolution <= 32:
        raise ValueError(
            f"the autoencoder downsamples by {factor}, which leaves "
            f"{resolution // factor}x{resolution // factor} latents of {resolution}-pixel images, too few to "
            "diffuse: use fewer --autoencoder.widths or a larger --data.resolution"
        )
    return described.latent_channels, resolution // factor, resolution // factor


def _existing(config: Config) -> AutoencoderKL | AutoencoderDC:
    source, channels = config.autoencoder.pretrained, config.data.channels
    try:
        autoencoder = load_autoencoder(source)
    except OSError as error:
        raise ValueError(f"--autoencoder.pretrained {source}: {error}") from error
    if autoencoder.config.in_channels != channels:
        raise ValueError(
            f"--autoencoder.pretrained {source} takes {autoencoder.config.in_channels} channels, "
            f"--data.channels is {channels}"
        )
    return autoencoder
