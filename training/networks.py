"""The networks that a configuration describes, and whether they fit the data and each other."""

import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DModel
from torch import nn

from ldm_pipeline.models import build_autoencoder, build_unet, load_autoencoder
from training.config import Config, OptimizationConfig, RunError
from training.data.images import ImageData


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
    return _new_unet(config, latent_shape, len(data.id2label) if labelled else None)


def _new_unet(config: Config, latent_shape: tuple[int, int, int], num_classes: int | None) -> UNet2DModel:
    stage = config.denoiser
    return build_unet(
        latent_shape[1:],
        latent_shape[0],
        stage.widths,
        stage.layers_per_block,
        stage.attention,
        stage.attention_head_dim,
        stage.norm_groups,
        stage.dropout,
        num_classes,
    )


def check_networks(
    config: Config, data: ImageData, autoencoder: nn.Module, shape: tuple[int, int, int]
) -> tuple[nn.Module, UNet2DModel]:
    """Whether the data fit the networks; after `check_shapes`, which returns the autoencoder and `shape`.

    Returns:
        Autoencoder and denoiser (on the meta device).

    Raises:
        RunError: with what was found, what is wanted and the option that changes it.
    """
    if config.denoiser.class_conditional and data.id2label is None:
        raise RunError("--denoiser.class_conditional true, but the data has no labels: name them with "
                       "--data.label_column, or set it to false")  # fmt: skip
    for name, stage in _trained(config).items():
        if stage.batch_size > len(data.train):
            raise RunError(
                f"--{name}.batch_size {stage.batch_size} is more than the {len(data.train)} training images"
            )
    with torch.device("meta"):
        return autoencoder, new_denoiser(config, data, shape)


def check_shapes(
    config: Config, num_processes: int
) -> tuple[AutoencoderKL | AutoencoderDC, tuple[int, int, int]]:
    """Build both networks without memory, so that what does not fit is found before the first step and before
    the data are read.

    Returns:
        The autoencoder (on the meta device, unless it exists already) and the shape of its latents.

    Raises:
        RunError: with what was found, what is wanted and the option that changes it.
    """
    for name, stage in _trained(config).items():
        if stage.batch_size % (num_processes * stage.gradient_accumulation_steps):
            raise RunError(
                f"--{name}.batch_size {stage.batch_size} is no multiple of {num_processes} processes x "
                f"--{name}.gradient_accumulation_steps {stage.gradient_accumulation_steps}"
            )
    try:
        with torch.device("meta"):
            autoencoder = _existing(config) if config.autoencoder.pretrained else new_autoencoder(config)
            shape = latent_shape_of(autoencoder, config)
            _new_unet(config, shape, num_classes=None)
    except ValueError as error:
        raise RunError(str(error)) from error
    return autoencoder, shape


def _trained(config: Config) -> dict[str, OptimizationConfig]:
    """The stages that will be trained."""
    stages = {"autoencoder": config.autoencoder, "denoiser": config.denoiser}
    return {"denoiser": config.denoiser} if config.autoencoder.pretrained else stages


def latent_shape_of(autoencoder: AutoencoderKL | AutoencoderDC, config: Config) -> tuple[int, int, int]:
    """Channels, height and width of the latents of the run's images.

    Raises:
        RunError: if the resolution cannot be halved as often as autoencoder and denoiser do.
    """
    described = autoencoder.config
    widths = described.get("block_out_channels") or described.get("encoder_block_out_channels")
    factor, halvings = 2 ** (len(widths) - 1), 2 ** (len(config.denoiser.widths) - 1)
    resolution = config.data.resolution
    if resolution % (factor * halvings):
        raise RunError(
            f"--data.resolution {resolution} is no multiple of {factor * halvings}: the autoencoder "
            f"downsamples by {factor} (--autoencoder.widths) and the denoiser by {halvings} "
            "(--denoiser.widths)"
        )
    trained = not config.autoencoder.pretrained
    if trained and config.autoencoder.equivariance and resolution // factor % 2:
        raise RunError(
            f"--autoencoder.equivariance halves latents, and {resolution // factor} is odd: set it to 0 or "
            "change --data.resolution"
        )
    if resolution < 4 * factor or (factor >= 8 and resolution <= 32):
        raise RunError(
            f"the autoencoder downsamples by {factor}, which leaves "
            f"{resolution // factor}x{resolution // factor} latents of {resolution}-pixel images, too few to "
            "diffuse: use fewer --autoencoder.widths or a larger --data.resolution"
        )
    return described.latent_channels, resolution // factor, resolution // factor


def _existing(config: Config) -> AutoencoderKL | AutoencoderDC:
    source, channels = config.autoencoder.pretrained, config.data.channels
    try:
        autoencoder = load_autoencoder(source)
    except Exception as error:  # somebody else's files: a torn config.json raises almost anything
        raise RunError(f"--autoencoder.pretrained {source} cannot be loaded: {error}") from error
    if autoencoder.config.in_channels != channels:
        raise RunError(
            f"--autoencoder.pretrained {source} takes {autoencoder.config.in_channels} channels, "
            f"--data.channels is {channels}"
        )
    return autoencoder
