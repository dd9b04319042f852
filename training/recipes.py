"""Recipes: networks for a resolution and a number of images, and the figures by which plan.py chooses.

docs/recipes.md has the measurements behind every figure, and says which are not measured.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

from training.config import Config, OptimizationConfig

AUTOENCODER_SHARE = 0.2  # of the time for training, at most
AUTOENCODER_BATCH, DENOISER_BATCH = (0.05, 8), (0.1, 16)  # factor of the images' root, and the least
AMPLE = 5  # times the images that an autoencoder needs; beyond, what it sees grows with the root of the time
PARAMETERS_PER_IMAGE = 4000  # of the denoiser, at most: few images are learnt by heart
EPOCHS_WITHOUT_DROPOUT = 100
COPIES = 5000, 400  # below so many images and above so many epochs expect copies


@dataclass(frozen=True)
class Autoencoder:
    """An AutoencoderDC, and the images that it must see to be worth its time."""

    need: int
    widths: list[int]
    blocks: list[int]
    learning_rate: float = 1.5e-3


# By resolution, one for every machine and one for a fast one. f2 below 64 pixels, f4 at 64, f8 above.
AUTOENCODERS = {
    16: (Autoencoder(2_000, [16, 32], [0, 2], 2e-3), Autoencoder(1_000_000, [32, 64], [0, 2])),
    32: (Autoencoder(4_000, [32, 64], [0, 2]), Autoencoder(1_000_000, [64, 128], [0, 3])),
    64: (
        Autoencoder(5_000, [32, 64, 128], [0, 1, 1]),
        Autoencoder(1_000_000, [64, 128, 256], [0, 2, 3]),
    ),
    128: (
        Autoencoder(10_000, [16, 32, 64, 128], [0, 1, 1, 1]),
        Autoencoder(1_000_000, [32, 64, 128, 256], [0, 1, 2, 2]),
    ),
}


@dataclass(frozen=True)
class UNet:
    """A denoiser, and the images that it must see to be better than the smaller one in the same time.

    `attends`: at 8x8 and below; else only its middle block does.
    """

    need: int
    widths: list[int]
    layers: int
    learning_rate: float = 1e-3
    attends: bool = True


UNETS = (
    UNet(2_000, [32, 64], 1, 2e-3, attends=False),
    UNet(5_000, [64, 128], 1, attends=False),
    UNet(300_000, [64, 128, 256], 1),
    UNet(1_000_000, [128, 256, 256], 2),
    UNet(2_000_000, [192, 384, 384], 3, 8e-4),
    UNet(5_000_000, [256, 512, 512], 3, 6e-4),
)


@dataclass(frozen=True)
class Facts:
    """The images and the machine, as far as the choice depends on them.

    Args:
        images, held_out: their numbers.
        side: pixels that the shorter sides of nine of ten images have.
        grey, drawn: whether they have no colours; whether they have areas of one colour, as drawings do.
        classes: 0 without.
        decoding: seconds until an image is read, decoded and transformed.
        readers: processes that decode beside the training; 0: it decodes itself.
        scanning: seconds of the scan.
        captions: seconds to encode all of them.
        judging: seconds of the feature network for an image; None without one.
        processes: they share a batch.
        sharded: whether they share the weights too (FSDP), of which Muon needs whole matrices.
        typical_batch: batch size at which networks are compared.
    """

    images: int
    held_out: int
    side: int
    grey: bool = False
    drawn: bool = False
    classes: int = 0
    decoding: float = 0.0
    readers: int = 0
    scanning: float = 0.0
    captions: float = 0.0
    judging: float | None = None
    processes: int = 1
    sharded: bool = False
    typical_batch: int = 32

    def of(self, images: int) -> "Facts":
        """The same of at most so many images, with a tenth as many held-out ones, as `--data.max_images`."""
        share = min(1.0, images / self.images)
        held_out = self.held_out if share == 1 else min(self.held_out, max(1, images // 10))
        times = {"scanning": share * self.scanning, "captions": share * self.captions}
        return replace(self, images=min(images, self.images), held_out=held_out, **times)


@dataclass(frozen=True)
class Speed:
    """Seconds per image of a network.

    Args:
        step: a training step of all processes together.
        evaluate: without gradients on one process: one evaluation of a denoiser, or a reconstruction by an
            autoencoder with its PSNR and SSIM.
        encode, decode: of an autoencoder on one process.
        side: of an autoencoder's latents.
        compiling: seconds, of all passes together.
    """

    step: float
    evaluate: float
    parameters: int
    encode: float = 0.0
    decode: float = 0.0
    side: int = 0
    compiling: float = 0.0


Measure = Callable[[Config, str], Speed]  # of the "autoencoder" or the "denoiser" of a configuration


def seen(stage: OptimizationConfig) -> int:
    """Images that a stage trains on, each as often as it occurs."""
    return stage.max_steps * stage.batch_size


def expects_copies(stage: OptimizationConfig, images: int) -> bool:
    """Whether so few images are seen so often that samples will be copies of them."""
    return images < COPIES[0] and seen(stage) / images > COPIES[1]


def put(config: Config, options: dict) -> None:
    """Set options by their dotted names, but for those that the user gave."""
    for name, value in options.items():
        if name not in config.given:
            section, _, own = name.rpartition(".")
            setattr(attrgetter(section)(config) if section else config, own, value)


def recipes_at(resolution: int) -> tuple[Autoencoder, Autoencoder]:
    """The autoencoders for a resolution."""
    return AUTOENCODERS[max((side for side in AUTOENCODERS if side <= resolution), default=16)]


def autoencoder_options(config: Config, facts: Facts, resolution: int, recipe: Autoencoder) -> dict:
    """The options of an autoencoder, with the resolution."""
    kl = config.autoencoder.kind == "AutoencoderKL" and "autoencoder.kind" in config.given
    levels = len(config.autoencoder.widths if "autoencoder.widths" in config.given else recipe.widths)
    blocks = recipe.blocks if levels == len(recipe.blocks) else [0] + [1] * (levels - 1)
    own = {
        "kind": "AutoencoderDC",  # reaches a linear code in a fifth of AutoencoderKL's time
        "widths": recipe.widths,
        "blocks": [1] * levels if kl else blocks,
        # At 64 pixels thin lines and letters need more than photographs.
        "latent_channels": 8 if resolution >= 128 or resolution >= 64 and facts.drawn else 4,
        "latent_noise": 0.1,
        "kl_weight": 1e-6 if kl else 1e-3,  # holds the latents' scale; AutoencoderDC has no posterior
        "learning_rate": recipe.learning_rate,
        "batch_size": facts.typical_batch,
    }
    return {"data.resolution": resolution} | {f"autoencoder.{name}": value for name, value in own.items()}


def unets_of(config: Config) -> tuple[UNet, ...]:
    """The U-Nets to choose from: all, those of as many levels as given attention has, or the one that is
    nearest to given widths."""
    if "denoiser.widths" in config.given:
        given = config.denoiser.widths

        def distances(recipe: UNet) -> list[float]:
            return [abs(math.log(size(given) / size(recipe.widths))) for size in (max, sum)]

        return (min(UNETS, key=distances),)
    if "denoiser.attention" in config.given:
        return tuple(r for r in UNETS if len(r.widths) == len(config.denoiser.attention)) or UNETS
    return UNETS


def denoiser_options(config: Config, recipe: UNet, side: int, batch_size: int) -> dict:
    """The options of a U-Net for latents of `side`."""
    widths = config.denoiser.widths if "denoiser.widths" in config.given else recipe.widths
    own = {
        "widths": widths,
        "layers_per_block": recipe.layers,
        "attention": [recipe.attends and level > 0 and side >> level <= 8 for level in range(len(widths))],
        "attention_head_dim": math.gcd(64, *widths),
        "norm_groups": math.gcd(32, *widths),
        "learning_rate": recipe.learning_rate,
        "batch_size": batch_size,
    }
    return {f"denoiser.{name}": value for name, value in own.items()}


def smallest(config: Config, size: int) -> Config:
    """A copy of `config` with the smallest networks, for batches of `size` images of 32 pixels."""
    draft = copy.deepcopy(config)
    put(draft, autoencoder_options(draft, Facts(1, 1, 32, typical_batch=size), 32, AUTOENCODERS[32][0]))
    put(draft, denoiser_options(draft, unets_of(draft)[0], 16, size))
    put(draft, {"autoencoder.warmup_steps": 0, "denoiser.warmup_steps": 0})
    return draft


def sampling_options(config: Config, facts: Facts, need: int) -> dict:
    """Steps and guidance of samples by a U-Net that needs so many images: the better it is, the weaker."""
    text = config.denoiser.text_encoder is not None
    by_class = not text and facts.classes > 0 and config.data.dataset != "digits"
    scale = 3.0 if need < 1_000_000 else 2.0
    return {
        "denoiser.sample_steps": 8 if config.data.resolution <= 32 else 12,
        "denoiser.guidance_scale": 5.0 if text else scale if by_class else 1.0,
        "denoiser.guidance_interval": (0.2, 0.8) if by_class else (0.0, 1.0),
    }


def batch_size(factor: float, least: int, images: float, facts: Facts) -> int:
    """A batch that grows with the root of the images seen: a power of two from `least` to 1024, if there are
    as many images, and a multiple of the processes."""
    grown = round(math.log2(max(least, factor * max(1.0, images) ** 0.5)))
    power = min(10, grown, int(math.log2(facts.images)))
    size = max(2**power, facts.processes)
    return size - size % facts.processes


def cadence_options(name: str, steps: int, checks: int, saves: int) -> dict:
    """Warm-up, lines of the log, validations with grids, and checkpoints of a stage."""
    own = {
        "warmup_steps": min(1000, round(0.07 * steps)),
        "log_every": min(50, max(1, steps // 20)),
        "validate_every": math.ceil(steps / checks),
        "sample_every": math.ceil(steps / checks),
        "checkpoint_every": math.ceil(steps / saves),
    }
    return {f"{name}.{option}": value for option, value in own.items()}
