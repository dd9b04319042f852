"""Refuses configurations that can be known to fail: their text, their values, and values together."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import get_loader

from training.errors import RunError

if TYPE_CHECKING:
    from training.config import AutoencoderConfig, Config, OptimizationConfig

LOAD = get_loader("yaml")  # jsonargparse's own, for which 1e-3 is a number
LARGEST = 2**31 - 1
WIDEST = 2**14
# What is wanted, the test of it (which a NaN fails), and the options, in every section that has them. The
# upper bounds of whole numbers keep slips of the keyboard from indices and sizes that overflow.
RANGES = [
    (
        f"a whole number from 1 to {LARGEST}",
        lambda value: 1 <= value <= LARGEST,
        "batch_size gradient_accumulation_steps max_steps ema_half_life log_every validate_every "
        "sample_every checkpoint_every keep_checkpoints shard_size num_images",
    ),
    (
        f"a whole number from 0 to {LARGEST}",
        lambda value: 0 <= value <= LARGEST,
        "warmup_steps keep_every gan_start evaluate_every",
    ),
    (
        f"whole numbers from 1 to {WIDEST}",
        lambda value: 1 <= value <= WIDEST,
        "widths latent_channels attention_head_dim norm_groups",
    ),
    ("a whole number from 8 to 8192", lambda value: 8 <= value <= 8192, "resolution"),
    (f"0, or a whole number from 10 to {LARGEST}", lambda v: v == 0 or 10 <= v <= LARGEST, "num_samples"),
    (f"a whole number from 10 to {LARGEST}", lambda value: 10 <= value <= LARGEST, "evaluate_samples"),
    ("whole numbers from 1 to 1000", lambda value: 1 <= value <= 1000, "sample_steps num_inference_steps"),
    ("a whole number from 1 to 100", lambda value: 1 <= value <= 100, "layers_per_block"),
    ("whole numbers from 0 to 100", lambda value: 0 <= value <= 100, "blocks"),
    ("a whole number from 0 to 1000", lambda value: 0 <= value <= 1000, "num_workers"),
    ("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32, "seed"),  # as NumPy takes
    ("a number above 0, at most 1", lambda value: 0 < value <= 1, "learning_rate ema_fraction"),
    ("a number from 0 to 1", lambda value: 0 <= value <= 1, "decay_fraction label_dropout equivariance"),
    ("a number from 0 to below 1", lambda value: 0 <= value < 1, "adam_betas dropout held_out"),
    (
        "a number from 0 to 1e6",
        lambda value: 0 <= value <= 1e6,
        "weight_decay kl_weight lpips_weight gan_weight latent_noise",
    ),
    ("a number above 0 (.inf: no clipping)", lambda value: value > 0, "max_grad_norm"),
    ("a number above 0, at most 1e6", lambda value: 0 < value <= 1e6, "min_snr_gamma"),
    ("a number above 0, at most 100", lambda value: 0 < value <= 100, "logit_std"),
    (
        "a number from -100 to 100",
        lambda value: -100 <= value <= 100,
        "logit_mean guidance_scale guidance_scales",
    ),
]
LPIPS_SMALLEST = 16  # VGG halves images four times


def check_config(config: Config) -> None:
    """Refuse what can be known to fail before anything is read.

    Raises:
        RunError: with what was found, what is wanted and the option that changes it.
    """
    if not config.output_dir or "\0" in config.output_dir:
        raise RunError(f"--output_dir {config.output_dir!r}: want the path of a folder")
    _check_ranges(config)
    if not config.autoencoder.pretrained:
        _check_schedule("autoencoder", config.autoencoder)
        _check_losses(config.autoencoder, config.data.resolution)
    _check_schedule("denoiser", config.denoiser)
    if config.evaluation.lpips and find_spec("lpips") is None:
        raise RunError('--evaluation.lpips needs the package lpips: pip install "ldm-pipeline[lpips]"')
    if config.evaluation.save_best and config.evaluation.pipeline:
        raise RunError(
            "--evaluation.save_best writes into a run's own pipeline: leave out --evaluation.pipeline"
        )
    if config.denoiser.zero_terminal_snr and config.denoiser.prediction_type == "epsilon":
        raise RunError(
            "--denoiser.zero_terminal_snr with --denoiser.prediction_type epsilon: at pure noise the noise "
            "says nothing about the image; use v_prediction"
        )


def _check_ranges(config: Config) -> None:
    for section in ("", "data", "autoencoder", "latents", "denoiser", "evaluation"):
        owner = getattr(config, section) if section else config
        for entry in fields(owner):
            found, option = getattr(owner, entry.name), f"--{section}.{entry.name}".replace("--.", "--")
            if found is None and entry.default is not None:  # YAML's empty value, which any type lets pass
                raise RunError(f"{option} has no value: give one, or leave it out for its default")
            listed = found if isinstance(found, (list, tuple)) else [found]
            for wanted, holds, names in RANGES:
                empty = not listed and found != _default(entry)
                if entry.name in names.split() and (empty or not all(map(holds, listed))):
                    raise RunError(f"{option} {found}: want {wanted}")


def _default(entry: Field) -> Any:
    return entry.default_factory() if entry.default is MISSING else entry.default


def _check_schedule(name: str, stage: OptimizationConfig) -> None:
    if stage.warmup_steps + stage.decay_fraction * stage.max_steps > stage.max_steps:
        raise RunError(
            f"--{name}.warmup_steps {stage.warmup_steps} and the last {stage.decay_fraction:.0%} of "
            f"decay (--{name}.decay_fraction) do not fit into --{name}.max_steps {stage.max_steps}"
        )
    if stage.batch_size % stage.gradient_accumulation_steps:
        raise RunError(
            f"--{name}.batch_size {stage.batch_size} is no multiple of --{name}.gradient_accumulation_steps "
            f"{stage.gradient_accumulation_steps}"
        )


def _check_losses(stage: AutoencoderConfig, resolution: int) -> None:
    if stage.gan_weight and stage.gan_start >= stage.max_steps:
        raise RunError(
            f"--autoencoder.gan_weight {stage.gan_weight}, but --autoencoder.gan_start {stage.gan_start} is "
            f"not before the last step (--autoencoder.max_steps {stage.max_steps}): "
            "the discriminator would never start"
        )
    if stage.lpips_weight and find_spec("lpips") is None:
        raise RunError(
            f"--autoencoder.lpips_weight {stage.lpips_weight} needs the package lpips: "
            'pip install "ldm-pipeline[lpips]", or set the weight to 0'
        )
    smallest = resolution // 2 if stage.equivariance else resolution
    if stage.lpips_weight and smallest < LPIPS_SMALLEST:
        raise RunError(
            f"--autoencoder.lpips_weight {stage.lpips_weight} compares images of {smallest} pixels, too "
            f"small for its network: set it to 0, or --data.resolution to {LPIPS_SMALLEST} or more (twice "
            "that with --autoencoder.equivariance)"
        )


class _StrictLoader(yaml.SafeLoader):
    """YAML without what could hide something: keys given twice, endless aliases, the names of classes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise _refusal("aliases are not read: write the value out", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = []
        for key, value in node.value:
            if key.value in seen:
                raise _refusal(f"{key.value!r} is given twice: leave one", key.start_mark)
            if key.value == "class_path":  # jsonargparse would import what it names
                raise _refusal("class_path is no option", key.start_mark)
            if key.value == "features" and re.fullmatch(r"[\w.]+:[\w.]+", str(value.value)):
                raise _refusal("Python code is named on the command line alone", key.start_mark)
            seen.append(key.value)
        return node


def _refusal(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {mark.line + 1}: {problem}")


def read_yaml(text: str) -> Any:
    """What `text` means; YAMLError for all that is wrong with it."""
    try:
        yaml.compose(text, Loader=_StrictLoader)
        return LOAD(text)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error
