"""Configurations of all sorts, always the same ones, and what becomes of each."""

import contextlib
import io
import random
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import torch
from conftest import ROOT, TINY

from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import Condition, denoise
from training.config import Config, DataConfig, objective_of, parse_config
from training.data.images import ImageData, load_images
from training.data.latents import encode
from training.networks import check_networks, check_shapes, new_autoencoder, new_denoiser

TEXTS, NETWORKS = 60, 80
LARGE = 3_000_000  # parameters; larger networks are built, but not run
CONFIGS: dict[str, tuple[Config, bool]] = {}  # accepted, by what describes their networks
NASTY = {
    int: [-1, 0, 1, 3, 10**6, 10**30, "1.5", ".nan", "x", "[1]", "null"],
    float: [-0.5, 0, 0.5, 1, 1.5, ".nan", ".inf", "-.inf", "1e300", "x", "[1.0]"],
    bool: ["true", "false", 2, "maybe"],
    list: ["[]", "[0, 0]", "[-1, 16]", "[16]", "[16, 1.5]", "[true, x]", "16", "{a: 1}", "[[1], [2]]"],
    tuple: ["[]", "[1, 1]", "[-0.1, 0.9]", "[0.9]", "[0.5, .nan]", "[0, 0]", "0.9"],
    str: ["''", "x", "[x", "null", "日本"],
}
WORDS = [".nan", "-1", "1e999", "[]", "{}", "~", "!!python/name:os.system", "*a", "&a", "?", "- ", '"', "\t"]


def options(config: Config) -> dict[str, object]:
    """All options by their dotted names, with their values."""
    found = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        inner = asdict(value).items() if is_dataclass(value) else ()
        found |= {f"{entry.name}.{name}": each for name, each in inner} or {entry.name: value}
    return found


def mutated_texts(draw: random.Random) -> Iterator[str]:
    """The smallest configuration with one to three slips: characters, words or lines lost, moved or added."""
    for _ in range(TEXTS):
        text = TINY.read_text()
        for _ in range(draw.randint(1, 3)):
            at, lines = draw.randrange(len(text)), text.split("\n")
            line = draw.randrange(len(lines))
            match draw.randrange(6):
                case 0:
                    text = text[:at] + text[at + draw.randint(1, 4) :]
                case 1:
                    text = text[:at] + draw.choice([*":[]{},#'|>%@-\0é", *WORDS]) + text[at:]
                case 2:
                    text = "\n".join([*lines[: line + 1], *lines[line:]])
                case 3:
                    text = "\n".join(
                        [*lines[:line], " " * draw.randint(0, 3) + lines[line], *lines[line + 1 :]]
                    )
                case 4:
                    text = re.sub(r"(?<=: )[\w.]+", lambda _: draw.choice(WORDS), text, count=1)
                case 5:
                    text = text[:at]
        yield text


def single_options(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Every option, with one or two values among which most cannot be."""
    for name, value in options(parse_config(["--config", str(TINY)])).items():
        values = NASTY.get(type(value), NASTY[str])
        for chosen in draw.sample(values, 2 if isinstance(value, (int, float)) else 1):
            yield name, str(chosen)


def networks(draw: random.Random) -> Iterator[list[str]]:
    """Both networks at random, small, about half of them possible."""
    for _ in range(NETWORKS):
        dc, levels, depth = draw.random() < 0.5, draw.choice([1, 2, 2, 2, 3]), draw.choice([1, 2, 2, 3])
        step = draw.choice([4, 8, 8, 12])
        widths = draw.choice([[step] * levels, [step * 2**i for i in range(levels)]])
        if draw.random() < 0.15:
            widths[draw.randrange(levels)] = draw.choice([1, 6, 7, 10])
        blocks = [draw.choice([0, 1, 2]) for _ in range(levels)] if dc else [draw.choice([1, 1, 2])] * levels
        base = draw.choice([8, 16])
        chosen = {
            "data.resolution": draw.choice([8, 12, 16, 16, 16, 20, 32]),
            "data.channels": draw.choice([1, 3]),
            "autoencoder.kind": "AutoencoderDC" if dc else "AutoencoderKL",
            "autoencoder.widths": widths,
            "autoencoder.blocks": blocks[draw.random() < 0.05 :],
            "autoencoder.latent_channels": draw.choice([1, 2, 4, 4, 5]),
            "autoencoder.equivariance": draw.choice([0.0, 0.5]),
            "denoiser.widths": [base * draw.choice([1, 2]) for _ in range(depth)],
            "denoiser.attention": [
                draw.choice(["true", "false"]) for _ in range(depth + (draw.random() < 0.05))
            ],
            "denoiser.layers_per_block": draw.choice([1, 2]),
            "denoiser.attention_head_dim": draw.choice([4, 8, 8, 16]),
            "denoiser.norm_groups": draw.choice([2, 4, 8, 8, 16, 5]),
            "denoiser.class_conditional": draw.choice(["true", "false", "null"]),
            "denoiser.prediction_type": draw.choice(["epsilon", "v_prediction", "flow_prediction"]),
            "denoiser.beta_schedule": draw.choice(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "denoiser.zero_terminal_snr": draw.choice(["true", "false", "false", "false"]),
            "denoiser.loss_weight": draw.choice(["none", "min_snr", "uncertainty"]),
            "denoiser.gradient_accumulation_steps": draw.choice([1, 1, 1, 2, 3]),
        }
        yield [f"--{name}={str(value).replace(chr(39), '')}" for name, value in chosen.items()]


@cache
def digits(labelled: bool) -> ImageData:
    data = load_images(DataConfig("digits"))
    return data if labelled else replace(data, id2label=None)


@cache
@torch.no_grad()
def run_through(described: str) -> None:
    """One image through both networks of `CONFIGS[described]`, once."""
    config, labelled = CONFIGS[described]
    autoencoder = new_autoencoder(config).eval()
    images = torch.zeros(1, config.data.channels, config.data.resolution, config.data.resolution)
    latents = encode(autoencoder, images)[0]
    decoded = autoencoder.decode(latents).sample
    assert decoded.shape == images.shape and decoded.isfinite().all()
    unet = new_denoiser(config, digits(labelled), tuple(latents.shape[1:])).eval()
    predicted = denoise(unet, latents, torch.tensor([500]), Condition.null(unet, 1, "cpu"))
    assert predicted.shape == latents.shape and predicted.isfinite().all()


def outcome(argv: list[str], names: tuple[str, ...], labelled: bool = True) -> str:
    """ "accepted", and then it builds, or "refused" in the words of a user.

    Args:
        argv: the command line.
        names: one of these must be in the text of a refusal.
        labelled: whether the images have labels.

    Raises:
        AssertionError: for every other outcome, with the command line.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config = parse_config(argv)
            built = check_networks(config, digits(labelled), *check_shapes(config, 1))
    except SystemExit as stop:
        text, ours = printed.getvalue(), stop.code == 2
    except ValueError as error:
        text = str(error)
        ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(ROOT)
    except BaseException as error:
        raise AssertionError(f"{argv}: {error!r}") from error
    else:
        try:
            build_scheduler(objective_of(config.denoiser))
            if sum(p.numel() for network in built for p in network.parameters()) < LARGE:
                key = str((*(network.config for network in built), config.data.resolution))
                CONFIGS[key] = config, labelled
                run_through(key)
        except Exception as error:
            raise AssertionError(f"accepted, but {argv}: {error!r}") from error
        return "accepted"
    assert ours and any(name in text for name in names) and "Traceback" not in text, (argv, text)
    return "refused"


def outcomes() -> Counter:
    """How many configurations of each kind had each outcome."""
    draw, counts = random.Random(0), Counter()
    every = tuple({word for name in options(Config()) for word in name.split(".")})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mutated.yaml"
        for text in mutated_texts(draw):
            file.write_bytes(text.encode())
            try:
                counts["text", outcome(["--config", str(file)], ("mutated.yaml", "accept", *every))] += 1
            except AssertionError as error:
                raise AssertionError(f"{error}\n{text}") from error
    for name, value in single_options(draw):
        argv = ["--config", str(TINY), f"--{name}={value}"]
        counts["option", outcome(argv, (name.split(".")[-1],))] += 1
    for number, argv in enumerate(networks(draw)):
        argv = ["--config", str(TINY), *argv]
        counts["networks", outcome(argv, every, labelled=number % 4 > 0)] += 1
    return counts
