"""Diffusers' own networks and schedulers from a few numbers."""

import inspect
from collections.abc import Sequence

import diffusers
from diffusers import AutoencoderDC, AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel

from ldm_pipeline.pipeline import Objective, schedulers_for


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
        blocks: residual blocks by level. AutoencoderKL needs the same number in every level. AutoencoderDC
            leaves out the first level where it has none.

    Raises:
        ValueError: for an unknown kind and for numbers that would be ignored. Other wrong numbers raise what
            the class raises, or fail in the first pass.
    """
    if len(blocks) != len(widths):
        raise ValueError(
            f"autoencoder.blocks {list(blocks)} and autoencoder.widths {list(widths)} must have one entry "
            "per level each"
        )
    builders = {"AutoencoderKL": _build_kl, "AutoencoderDC": _build_dc}
    if kind not in builders:
        raise ValueError(f"unknown autoencoder {kind!r}: want {' or '.join(builders)}")
    return builders[kind](tuple(widths), tuple(blocks), latent_channels, channels, resolution)


def _build_kl(widths, blocks, latent_channels, channels, resolution) -> AutoencoderKL:
    if len(set(blocks)) != 1:
        raise ValueError(f"autoencoder.blocks {list(blocks)}: AutoencoderKL wants one number in all levels")
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=blocks[0],
        latent_channels=latent_channels,
        norm_num_groups=next(g for g in (32, 16, 8, 4, 2, 1) if all(width % g == 0 for width in widths)),
        sample_size=resolution,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def _build_dc(widths, blocks, latent_channels, channels, resolution) -> AutoencoderDC:
    none = ((),) * len(widths)
    return AutoencoderDC(
        in_channels=channels,
        latent_channels=latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=blocks,
        decoder_layers_per_block=blocks,
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
    )


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
    text_width: int | None = None,
    cross_attention_dim: int = 256,
    concat_channels: int = 0,
) -> UNet2DModel | UNet2DConditionModel:
    """An untrained U-Net that denoises latents `(N, latent_channels, *sample_size)`.

    Args:
        sample_size: height and width of the latents.
        widths: channels by level, finest first; every level after the first halves the resolution.
        attention: levels with self-attention; none if omitted.
        num_classes: K of a class-conditional model. It embeds K + 1 classes: the last is the null class of
            classifier-free guidance (arXiv:2207.12598).
        text_width: D of the encoded text `(N, L, D)` that a text-conditional model attends to, in the levels
            with attention and the middle.
        cross_attention_dim: the encoded text is projected to this width, which the attention reads.
        concat_channels: channels that are concatenated to the noisy latents.

    Raises:
        ValueError: for numbers that Diffusers would round or ignore. Other wrong numbers raise what the class
            raises, or fail in the first pass.
    """
    attention = [False] * len(widths) if attention is None else list(attention)
    sides = (sample_size,) if isinstance(sample_size, int) else sample_size
    if max(sides) == 2 ** (len(widths) - 1) and norm_groups in widths[-2:]:
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
    options = {
        "sample_size": sample_size,
        "in_channels": latent_channels + concat_channels,
        "out_channels": latent_channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers_per_block,
        "norm_num_groups": norm_groups,
        "dropout": dropout,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": None if num_classes is None else num_classes + 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    kind = "Attn" if text_width is None else "CrossAttn"
    options["down_block_types"] = tuple(f"{kind}DownBlock2D" if a else "DownBlock2D" for a in attention)
    options["up_block_types"] = tuple(f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    if text_width is None:
        return UNet2DModel(attention_head_dim=attention_head_dim, **options)
    return UNet2DConditionModel(
        # The name is historical: in this class it is the number of heads.
        attention_head_dim=tuple(max(1, width // attention_head_dim) for width in widths),
        encoder_hid_dim=text_width,
        encoder_hid_dim_type="text_proj",
        cross_attention_dim=cross_attention_dim,
        **options,
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
    flow, supported = objective["prediction_type"] == "flow_prediction", schedulers_for(Objective(objective))
    name = (name or ("UniPCMultistep" if flow else "DPMSolverMultistep")).removesuffix("Scheduler")
    name += "Scheduler"
    if name not in supported:
        raise ValueError(f"no scheduler {name}; wanted one of {', '.join(sorted(supported))}")
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
    elif supported[name] == "solver":
        options |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        options |= {"solver_order": 3} if kind is diffusers.UniPCMultistepScheduler else {}
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in options.items() if key in taken})


def build_guider(name: str, guidance_scale: float):
    """A guider of `diffusers.guiders`, with or without "Guidance" at its end, such as "AdaptiveProjected".

    That one gets the projection and the reverse momentum of its paper (arXiv:2410.02416); by Diffusers'
    defaults it has neither and is classifier-free guidance with a threshold.

    Raises:
        ValueError: if there is none of this name, or it wants more than a scale.
    """
    from diffusers import guiders  # here, because older versions have none

    kind = getattr(guiders, f"{name.removesuffix('Guidance')}Guidance", None)
    taken = inspect.signature(kind.__init__).parameters if kind else {}
    if "guidance_scale" not in taken:
        known = sorted(each.removesuffix("Guidance") for each in dir(guiders) if each.endswith("Guidance"))
        raise ValueError(f"no guider {name} that takes a scale; Diffusers has {', '.join(known)}")
    paper = {"eta": 0.0, "adaptive_projected_guidance_momentum": -0.75}
    options = paper if paper.keys() <= taken.keys() else {}
    return kind(guidance_scale=guidance_scale, **options)
