"""Diffusers' own networks and schedulers from a few numbers."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import diffusers
from diffusers import AutoencoderDC, AutoencoderKL, SchedulerMixin, UNet2DModel
from huggingface_hub import snapshot_download

from ldm_pipeline.pipeline import (
    SCHEDULERS,
    check_model_folder,
    check_weights,
    forget_local_path,
    model_folder,
    read_json,
)


def build_autoencoder(
    kind: str,
    widths: Sequence[int],
    blocks: Sequence[int],
    latent_channels: int,
    channels: int = 3,
    resolution: int = 32,
) -> AutoencoderKL | AutoencoderDC:
    """An untrained autoencoder of images `(N, channels, H, W)` in [-1, 1].

    Its latents are `(N, latent_channels, H / f, W / f)` with `f = 2 ** (len(widths) - 1)`.

    Args:
        kind: "AutoencoderKL" (arXiv:2112.10752) or "AutoencoderDC" (arXiv:2410.10733), without posterior.
        widths: channels by level, finest first.
        blocks: residual blocks by level. AutoencoderKL needs the same number in every level.

    Raises:
        ValueError: for numbers that the class cannot serve.
    """
    if not widths or len(blocks) != len(widths):
        raise ValueError(
            f"autoencoder.blocks {list(blocks)} and autoencoder.widths {list(widths)} must have one entry a "
            "level each"
        )
    if kind == "AutoencoderKL":
        if len(set(blocks)) != 1 or blocks[0] < 1:
            raise ValueError(
                f"autoencoder.blocks {list(blocks)}: AutoencoderKL wants one number, 1 or more, in all levels"
            )
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(width % g == 0 for width in widths))
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=blocks[0],
            latent_channels=latent_channels,
            norm_num_groups=groups,
            sample_size=resolution,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    if kind == "AutoencoderDC":
        _check_dc(widths, blocks, latent_channels)
        none = ((),) * len(widths)
        return AutoencoderDC(
            in_channels=channels,
            latent_channels=latent_channels,
            encoder_block_out_channels=tuple(widths),
            decoder_block_out_channels=tuple(widths),
            encoder_layers_per_block=tuple(blocks),
            decoder_layers_per_block=tuple(blocks),
            encoder_qkv_multiscales=none,
            decoder_qkv_multiscales=none,
        )
    raise ValueError(f"unknown autoencoder {kind!r}: want AutoencoderKL or AutoencoderDC")


def _check_dc(widths: Sequence[int], blocks: Sequence[int], latent_channels: int) -> None:
    """Refuse what AutoencoderDC would build and then fail in, or with a bare assertion.

    Its shortcuts average or repeat whole groups of channels, and pixels are unshuffled four to one. Only the
    first level may be left out (0 blocks: the image goes to the second at once), or the last have no blocks.
    """
    if min(blocks) < 0 or 0 in blocks[1:-1] or (blocks[0] == 0 and len(blocks) == 1):
        raise ValueError(
            f"autoencoder.blocks {list(blocks)}: AutoencoderDC takes 0 for the first and the last of several "
            "levels only"
        )
    if widths[-1] % latent_channels:
        raise ValueError(
            f"autoencoder.latent_channels {latent_channels}: AutoencoderDC wants a divisor of the last of "
            f"autoencoder.widths {list(widths)}"
        )
    first = 0 if blocks[0] else 1
    if any(width % 4 for width in widths[1:]) or any(
        4 * fine % coarse for fine, coarse in zip(widths[first:], widths[first + 1 :], strict=False)
    ):
        raise ValueError(
            f"autoencoder.widths {list(widths)}: AutoencoderDC wants multiples of 4 after the first level, "
            "each a divisor of four times the one before"
        )


def load_autoencoder(source: str | Path) -> AutoencoderKL | AutoencoderDC:
    """An existing autoencoder from a local folder or a Hub id, whichever of the two classes it is.

    Only safetensors are read, and exactly the weights of its class or none.

    Raises:
        ValueError: if it is of another class, or if its files are damaged.
        OSError: if there is none at `source`.
    """
    names = ["config.json", *(f"diffusion_pytorch_model{n}" for n in (".safetensors*", "-*.safetensors"))]
    folder = model_folder(str(source), lambda: snapshot_download(str(source), allow_patterns=names))
    kind = read_json(folder / "config.json").get("_class_name")
    classes = {c.__name__: c for c in (AutoencoderKL, AutoencoderDC)}
    if str(kind) not in classes:
        raise ValueError(f"{source} holds a {kind}: want {' or '.join(classes)}")
    check_model_folder(classes[kind], folder)
    autoencoder = classes[kind].from_pretrained(folder, use_safetensors=True)
    autoencoder.register_to_config(_name_or_path=str(source))
    forget_local_path(autoencoder)
    check_weights(autoencoder, str(source))
    return autoencoder


def build_unet(
    sample_size: int | tuple[int, int],
    latent_channels: int,
    widths: Sequence[int],
    layers_per_block: int = 2,
    attention: Sequence[bool] | None = None,
    attention_head_dim: int = 64,
    norm_groups: int = 32,
    dropout: float = 0.0,
    num_classes: int | None = None,
) -> UNet2DModel:
    """An untrained U-Net that denoises latents `(N, latent_channels, *sample_size)`.

    Args:
        sample_size: height and width of the latents.
        widths: channels by level, finest first; every level after the first halves the resolution.
        attention: levels with self-attention; none if omitted.
        num_classes: K of a class-conditional model. It embeds K + 1 classes: the last is the null class of
            classifier-free guidance (arXiv:2207.12598).

    Raises:
        ValueError: if the latents cannot be halved that often, or a width is no multiple of a group or head.
    """
    if not widths:
        raise ValueError("denoiser.widths is empty: want one number or more")
    attention = [False] * len(widths) if attention is None else list(attention)
    size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    halvings = 2 ** (len(widths) - 1)
    if any(side % halvings for side in size):
        raise ValueError(
            f"latents of {size[0]}x{size[1]} cannot be halved {len(widths) - 1} times: use fewer "
            "denoiser.widths or another data.resolution"
        )
    if len(attention) != len(widths):
        raise ValueError(
            f"denoiser.attention {attention} and denoiser.widths {list(widths)} must have one entry "
            "a level each"
        )
    if bad := [width for width in widths if width % norm_groups]:
        raise ValueError(f"denoiser.widths {bad} are no multiples of denoiser.norm_groups {norm_groups}")
    if all(side == halvings for side in size) and norm_groups in widths[-2:]:
        raise ValueError(
            f"denoiser.norm_groups {norm_groups} would normalise single numbers in the last of "
            f"denoiser.widths {list(widths)}, which has 1x1 pixels: lower it, or use fewer levels"
        )
    heads = [w for w, attend in zip(widths, attention, strict=True) if attend] + [widths[-1]]
    if bad := [width for width in heads if width % attention_head_dim]:
        raise ValueError(
            f"denoiser.widths {bad} with attention are no multiples of denoiser.attention_head_dim "
            f"{attention_head_dim}"
        )
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attention),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attention)),
        attention_head_dim=attention_head_dim,
        norm_num_groups=norm_groups,
        dropout=dropout,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=None if num_classes is None else num_classes + 1,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def build_scheduler(objective: dict, name: str | None = None) -> SchedulerMixin:
    """A sampler for what the network predicts, on the network's own noise path where it knows that path.

    Args:
        objective: the `objective` of an LDMPipeline.
        name: a class of `diffusers`, with or without "Scheduler" at its end, such as "DDIM". By default UniPC
            (arXiv:2302.04867) for a flow, DPM-Solver++ 2M (arXiv:2211.01095) otherwise.

    Raises:
        ValueError: if no scheduler that can sample an LDMPipeline has this name.
    """
    flow = objective["prediction_type"] == "flow_prediction"
    name = (name or ("UniPCMultistep" if flow else "DPMSolverMultistep")).removesuffix(
        "Scheduler"
    ) + "Scheduler"
    if name not in SCHEDULERS:
        raise ValueError(f"no scheduler {name}; wanted one of {', '.join(sorted(SCHEDULERS))}")
    kind = getattr(diffusers, name)
    options = {
        "clip_sample": False,  # made for pixels
        "timestep_spacing": "trailing",  # starts at pure noise (arXiv:2305.08891)
        "snr_shift_scale": 1.0,
        "original_inference_steps": 1000,
        "lower_order_final": True,
    }
    if not flow:
        options |= objective
    elif SCHEDULERS[name] == "solver":
        options |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        options |= {"solver_order": 3} if kind is diffusers.UniPCMultistepScheduler else {}
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in options.items() if key in taken})
