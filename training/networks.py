"""The networks of a configuration, and whether they fit the images and each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ldm_pipeline.loading import AUTOENCODERS, load_autoencoder, load_text_encoder
from ldm_pipeline.models import build_autoencoder, build_unet
from ldm_pipeline.pipeline import Condition, denoise, encode_tokens, latent_shape, text_width, tokenize
from training.config import Config, DenoiserConfig, OptimizationConfig, RunError
from training.data.captions import WORDS_WIDTH
from training.data.images import ImageData
from training.data.latents import encode
from training.data.tasks import task_of

SMALLEST = 4  # height and width of latents that a diffusion model can still arrange


def new_autoencoder(config: Config) -> AutoencoderKL | AutoencoderDC:
    """The untrained autoencoder; equal seeds give equal weights."""
    torch.manual_seed(config.seed)
    stage, data = config.autoencoder, config.data
    return build_autoencoder(
        stage.kind, stage.widths, stage.blocks, stage.latent_channels, data.channels, data.resolution
    )


def new_denoiser(
    config: Config, data: ImageData | None, latent_shape: tuple[int, int, int], text_width: int | None = None
) -> UNet2DModel | UNet2DConditionModel:
    """The untrained U-Net of latents `latent_shape` = (C, h, w); equal seeds give equal weights.

    It has the classes of `data`, unless there are none or `--denoiser.class_conditional false`, reads encoded
    text of `text_width`, and takes the channels of `--denoiser.task` behind the latents.
    """
    torch.manual_seed(config.seed + 1)
    stage, task = config.denoiser, task_of(config.denoiser)
    unet = build_unet(
        latent_shape[1:],
        latent_shape[0],
        stage.widths,
        stage.layers_per_block,
        stage.attention,
        stage.attention_head_dim,
        stage.norm_groups,
        stage.dropout,
        len(data.id2label) if data is not None and has_classes(config, data) else None,
        text_width,
        stage.cross_attention_dim,
        task.channels(latent_shape[0]) if task else 0,
    )
    for last in _last_layers(unet):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return unet


def _last_layers(unet: nn.Module) -> Iterator[nn.Module]:
    """The last layers of a U-Net and of its residual branches, which begin at zero (arXiv:2006.11239)."""
    yield unet.conv_out
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            yield module.conv2
        elif isinstance(module, Attention):
            yield module.to_out[0]


def has_classes(config: Config, data: ImageData) -> bool:
    """Whether the denoiser is told the images' classes: there are some, and the configuration wants them."""
    return data.id2label is not None and config.denoiser.class_conditional is not False


def pretrained_text_encoder(config: DenoiserConfig) -> tuple | None:
    """Tokenizer and text encoder of `--denoiser.text_encoder`, None if it names none to load."""
    source = config.text_encoder
    if source is None or config.trains_text_encoder:
        return None
    try:
        return load_text_encoder(source, config.text_max_length)
    except (OSError, ValueError) as error:
        raise RunError(f"--denoiser.text_encoder {source} cannot be used: {error}") from error


def text_width_of(config: DenoiserConfig, text: tuple | None) -> int | None:
    """Width D of the encoded text `(N, L, D)`, or None; `text`: tokenizer and encoder, if they are loaded."""
    if text:
        empty = (each.to(text[1].device) for each in tokenize(*text, [""]))
        return encode_tokens(text[1], *empty).shape[-1]
    return WORDS_WIDTH if config.text_encoder else None


def blank_condition(denoiser: nn.Module, count: int, device=None) -> Condition:
    """A condition of the shapes that the denoiser takes, of zeros, to try it without data."""
    condition = Condition.null(denoiser, count, device)
    if width := text_width(denoiser):
        text = torch.zeros(count, 8, width, device=device), torch.ones(count, 8, dtype=bool, device=device)
        condition = replace(condition, encoder_hidden_states=text[0], encoder_attention_mask=text[1])
    if more := denoiser.config.in_channels - denoiser.config.out_channels:
        size = latent_shape(denoiser)[1:]
        condition = replace(condition, concat=torch.zeros(count, more, *size, device=device))
    return condition


def pretrained_autoencoder(config: Config) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder of `--autoencoder.pretrained`. RunError if it cannot be loaded."""
    source = config.autoencoder.pretrained
    try:
        return load_autoencoder(source)
    except (OSError, ValueError) as error:
        raise RunError(f"--autoencoder.pretrained {source} cannot be loaded: {error}") from error


def check_networks(
    config: Config, num_processes: int, text_width: int | None = None
) -> tuple[AutoencoderKL | AutoencoderDC, UNet2DModel | UNet2DConditionModel]:
    """Build both networks on the meta device and pass an image through, before any data is read.

    Args:
        text_width: see `new_denoiser`.

    Returns:
        Autoencoder and denoiser (of no classes) without memory for their weights.

    Raises:
        RunError: they do not fit each other, the resolution or the number of processes.
    """
    for name, stage in trained_stages(config).items():
        parts = num_processes * stage.gradient_accumulation_steps
        if stage.batch_size % parts:
            raise RunError(
                f"--{name}.batch_size {stage.batch_size} is no multiple of {parts}, which is {num_processes} "
                f"processes x --{name}.gradient_accumulation_steps {stage.gradient_accumulation_steps}"
            )
    size, stage = config.data.resolution, config.autoencoder
    with torch.device("meta"), torch.no_grad():
        images = torch.zeros(1, config.data.channels, size, size)
        with _naming_options(config, "autoencoder", "kind widths blocks latent_channels equivariance"):
            autoencoder = _planned_autoencoder(config)
            latents = encode(autoencoder, images)[0]
            _expect(autoencoder.decode(latents).sample, images)
            if stage.equivariance and not stage.pretrained:
                _expect(autoencoder.decode(latents[..., ::2, ::2]).sample, images[..., ::2, ::2])
        factor, side = size // latents.shape[-1], min(latents.shape[-2:])
        if side < SMALLEST or (factor >= 8 and size <= 32):
            raise RunError(
                f"the autoencoder downsamples by {factor}, which leaves {_size(latents)} latents of "
                f"{size}-pixel images, too few to diffuse: use fewer --autoencoder.widths or a larger "
                "--data.resolution"
            )
        with _naming_options(config, "denoiser", "widths attention attention_head_dim norm_groups"):
            denoiser = new_denoiser(config, None, tuple(latents.shape[1:]), text_width)
            _expect(denoise(denoiser, latents, torch.zeros(1), blank_condition(denoiser, 1)), latents)
    return autoencoder, denoiser


@contextmanager
def _naming_options(config: Config, section: str, names: str) -> Iterator[None]:
    """Turn whatever Diffusers' networks raise at numbers that do not fit into a RunError with the options."""
    try:
        yield
    except RunError:
        raise
    except (ValueError, RuntimeError, AssertionError, TypeError, IndexError, ZeroDivisionError) as error:
        options = [f"--{section}.{name} {getattr(getattr(config, section), name)}" for name in names.split()]
        if config.autoencoder.pretrained and section == "autoencoder":
            options = [f"--autoencoder.pretrained {config.autoencoder.pretrained}"]
        raise RunError(
            f"the {section} cannot be built: {error}. Its options: {', '.join(options)}; "
            f"--data.resolution {config.data.resolution}, --data.channels {config.data.channels}"
        ) from error


def _expect(result: torch.Tensor, wanted: torch.Tensor) -> None:
    if result.shape != wanted.shape:
        raise ValueError(
            f"{_size(wanted)} comes back as {_size(result)}: it must be halved without a rest at every level"
        )


def _planned_autoencoder(config: Config) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder without weights: of the run folder, of `--autoencoder.pretrained`, or a new one."""
    if not config.autoencoder.pretrained:
        return new_autoencoder(config)
    own = Path(config.output_dir) / "autoencoder"
    stands = (own / "done.json").exists() and "autoencoder" not in config.redo
    source = own if stands else config.autoencoder.pretrained
    try:
        described = AutoencoderKL.load_config(source)
    except (OSError, ValueError) as error:
        raise RunError(f"--autoencoder.pretrained {source} cannot be loaded: {error}") from error
    if (kind := described.get("_class_name")) not in AUTOENCODERS:
        raise RunError(f"--autoencoder.pretrained {source} is a {kind}, wanted {' or '.join(AUTOENCODERS)}")
    return AUTOENCODERS[kind].from_config(described)


def _size(images: torch.Tensor) -> str:
    return "x".join(map(str, images.shape[-2:]))


def check_data(config: Config, data: ImageData) -> None:
    """RunError where the images are too few for a batch, or lack the labels that were asked for."""
    if config.denoiser.class_conditional and data.id2label is None:
        raise RunError(
            "--denoiser.class_conditional true, but the data has no labels: name them with "
            "--data.label_column, or set it to false"
        )
    for name, stage in trained_stages(config).items():
        if stage.batch_size > len(data.train):
            raise RunError(
                f"--{name}.batch_size {stage.batch_size} is more than the {len(data.train)} training images"
            )


def trained_stages(config: Config) -> dict[str, OptimizationConfig]:
    """The stages that will train a network, by name."""
    stages = {"autoencoder": config.autoencoder, "denoiser": config.denoiser}
    return {"denoiser": config.denoiser} if config.autoencoder.pretrained else stages
