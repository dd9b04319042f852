"""The configuration of a run: a tree of dataclasses, read from one YAML file and dotted options."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

LOCK = ".ldm_run"  # marks a folder as ours from the first moment, and is locked while a process works there
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "cifar10.yaml"


class RunError(ValueError):
    """What stops a run for a reason that its user can mend.

    Its message says what was found, what is wanted and which option changes it; scripts print it without a
    traceback.
    """


def redact(text: str) -> str:
    """`text` without access tokens: those of the Hub's form, in addresses, and those of the environment."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return re.sub(r"hf_\w{8,}|(?<=://)[^/@\s]+(?=@)", "***", text)


def fail(error: RunError) -> NoReturn:
    """Exit with code 2 and the message alone; with several processes it names the rank."""
    sys.stdout.flush()
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{rank}error: {redact(str(error))}", file=sys.stderr, flush=True)
    sys.exit(2)


@dataclass
class DataConfig:
    """The images."""

    dataset: str = "uoft-cs/cifar10"
    """A Hub id, a local folder of images (with or without one folder a class, or with folders train and
    test), a local parquet, arrow or webdataset file or folder of these, a folder by save_to_disk, or "digits"
    (scikit-learn's handwritten digits, which need no download)."""
    subset: str | None = None
    """Name of the Hub data set's configuration, where it has several."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str | None = None
    """Split for held-out figures. Found by name (test, validation) if none is given."""
    held_out: float = 0.05
    """Share of the training split held out (at most 2,000 images) where there is no other split."""
    image_column: str | None = None
    """Column of the images (type Image, or encoded bytes). Found by type if none is given."""
    label_column: str | None = None
    """Column of the class labels (ClassLabel, integers, names). Found by type or a usual name if none
    is given; a data set without one is unlabelled."""
    resolution: int = 32
    """Height and width in pixels: the shorter side is resized to it, then the centre is cropped."""
    channels: Literal[1, 3] = 3
    """1 for grey images, 3 for RGB."""
    horizontal_flip: bool = True
    """Train on mirrored images too. Off where left and right mean something (digits, text)."""
    num_workers: int = 0
    """Processes that decode images. 0 decodes in the training process."""
    scan: Literal["full", "sample"] = "full"
    """Images that are decoded before the first step, to report and leave out unreadable ones: all, or a
    sample of a few thousand. May change between a run and its continuation."""


@dataclass
class OptimizationConfig:
    """How long and how fast a network is trained. These may change between a run and its continuation."""

    batch_size: int = 128
    """Images of one optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Parts in which a process computes its share of the batch, one after another, to save memory."""
    max_steps: int = 10_000
    """Optimizer steps in all."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 200
    """Steps in which the rate rises linearly from zero."""
    decay_fraction: float = 0.4
    """Last part of the run in which the rate falls linearly to zero."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_fraction: float = 0.05
    """Half-life of the weight average, as a share of the images seen so far (EDM2, arXiv:2312.02696)."""
    ema_half_life: int = 500_000
    """Upper bound of that half-life, in images."""
    compile: bool = False
    """Compile the network with torch.compile."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    validate_every: int = 1000
    """Steps between two measurements on held-out images."""
    sample_every: int = 1000
    """Steps between two picture grids."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 1
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0: none."""

    def learning_rate_at(self, step: int) -> float:
        """The rate of optimizer step `step` (from 0): warm-up, plateau, linear decay; the same everywhere."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = min(1.0, (self.max_steps - step) / max(1.0, self.decay_fraction * self.max_steps))
        return self.learning_rate * min(rise, fall)


@dataclass
class AutoencoderConfig(OptimizationConfig):
    """Stage 1: images to latents and back."""

    pretrained: str | None = None
    """Local folder or Hub id of an existing AutoencoderKL or AutoencoderDC, used instead of training."""
    kind: Literal["AutoencoderKL", "AutoencoderDC"] = "AutoencoderKL"
    """Class of the network. AutoencoderDC (arXiv:2410.10733) learns faster and has no posterior."""
    widths: list[int] = field(default_factory=lambda: [64, 128])
    """Channels by level. Every level after the first halves the resolution: [64, 128] downsamples by 2."""
    blocks: list[int] = field(default_factory=lambda: [1, 1])
    """Residual blocks by level. AutoencoderKL wants one number everywhere; AutoencoderDC takes 0 as well."""
    latent_channels: int = 4
    """Channels of the latents."""
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    """Pixel error, averaged over all elements."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence in the convention of LDM (arXiv:2112.10752): KL and pixel error both
    summed over an image. Internally both are means, and the weight is multiplied by latent / image elements.
    AutoencoderDC has no posterior: there it weighs half the mean square of the latents, which keeps them from
    growing, and can be a thousand times larger."""
    lpips_weight: float = 0.0
    """Weight of the perceptual distance LPIPS (arXiv:1801.03924); needs the extra "lpips"."""
    gan_weight: float = 0.0
    """Weight of the PatchGAN loss, on top of the adaptive weight of VQGAN (arXiv:2012.09841, eq. 7)."""
    gan_start: int = 5000
    """Step at which the discriminator starts. A dip of PSNR there is normal."""
    latent_noise: float = 0.0
    """Deviation of noise added to the latents before decoding, relative to their own deviation over the
    images that are computed at once."""
    equivariance: float = 0.0
    """Share of the steps of the second half in which latents and images are both halved in size before they
    are compared: a scale-equivariant latent space is easier to diffuse (EQ-VAE, arXiv:2502.09509)."""


@dataclass
class LatentsConfig:
    """Stage 2: the latents of every image and its mirror image."""

    batch_size: int = 256
    """Images encoded at once by one process."""
    shard_size: int = 8192
    """Images in one safetensors file."""
    resident: Literal["auto", "device", "disk"] = "auto"
    """Where training reads them: all on the device, or memory-mapped. auto: device if a quarter suffices."""


@dataclass
class DenoiserConfig(OptimizationConfig):
    """Stage 3: the diffusion model of the latents."""

    widths: list[int] = field(default_factory=lambda: [128, 256, 256])
    """Channels of the U-Net by level. Every level after the first halves the resolution."""
    layers_per_block: int = 2
    """Residual blocks in a level."""
    attention: list[bool] = field(default_factory=lambda: [False, True, True])
    """Levels with self-attention."""
    attention_head_dim: int = 64
    """Channels of one attention head."""
    norm_groups: int = 32
    """Groups of the group normalisation; must divide every width."""
    dropout: float = 0.0
    """Dropout in the residual blocks. Every process draws its own."""
    class_conditional: bool | None = None
    """Whether labels are a condition. Unset: if the data set has them."""
    label_dropout: float = 0.1
    """Share of the images trained with the null class, for classifier-free guidance (arXiv:2207.12598)."""
    prediction_type: Literal["epsilon", "v_prediction", "flow_prediction"] = "flow_prediction"
    """What the network predicts: the noise, velocity (arXiv:2202.00512) or flow (arXiv:2209.03003)."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule of epsilon and v_prediction; squaredcos_cap_v2 is the cosine (arXiv:2102.09672)."""
    zero_terminal_snr: bool = False
    """Rescale that schedule so that its last step is pure noise (arXiv:2305.08891); not with epsilon."""
    timestep_density: Literal["uniform", "logit_normal"] = "logit_normal"
    """Density of the training timesteps; logit_normal is that of Stable Diffusion 3 (arXiv:2403.03206)."""
    logit_mean: float = 0.0
    """Mean of the logit-normal density; larger is noisier."""
    logit_std: float = 1.0
    """Deviation of the logit-normal density."""
    loss_weight: Literal["none", "min_snr", "uncertainty"] = "none"
    """Weight by timestep: none, min-SNR (arXiv:2303.09556), learned uncertainty (EDM2, arXiv:2312.02696)."""
    min_snr_gamma: float = 5.0
    """Clamp of min-SNR."""
    sample_steps: int = 20
    """Steps of a picture in the grids, and by default in the finished pipeline."""
    guidance_scale: float = 1.5
    """Guidance of the class-conditional grids, and by default of the finished pipeline; 1 is off."""
    evaluate_every: int = 0
    """Steps between two measurements of samples of the averaged weights by --evaluation.features; 0: none."""
    evaluate_samples: int = 1000
    """Samples of such a measurement."""


@dataclass
class EvaluationConfig:
    """Stage 4: figures and pictures of the finished model."""

    pipeline: str | None = None
    """Local folder or Hub id of a pipeline to judge instead of the run's own."""
    num_images: int = 2000
    """Held-out images for PSNR, SSIM, LPIPS, the validation loss and the autoencoder's Frechet distance, at
    most."""
    batch_size: int = 100
    """Images at once. What is done is kept batch by batch, so another size starts anew."""
    num_samples: int = 50_000
    """Samples to draw for their figures, over all processes; 0: none. Below 10,000 the figures carry the
    number in their names."""
    features: str = "inception"
    """Network in whose features samples are compared with training images: "inception" (that of FID; extra
    "fid"), "digits" (for that data set), a local folder or Hub id of an image model of transformers such as
    facebook/dinov2-base, a TorchScript file, or, on the command line alone, module:callable, Python code that
    returns a torch.nn.Module. The last two take float32 images (N, 3, R, R) in [0, 1] and return features
    (N, D), or these and class logits (N, K)."""
    schedulers: list[str] = field(default_factory=list)
    """Schedulers of Diffusers to draw with, such as [UniPCMultistep, DDIM]. Default: the pipeline's own.
    Several schedulers, steps or scales make a sweep: all combinations, and of the best all figures."""
    num_inference_steps: list[int] = field(default_factory=list)
    """Numbers of steps. Default: the pipeline's own."""
    guidance_scales: list[float] = field(default_factory=list)
    """Guidance scales; 1 is off. Default: the pipeline's own."""
    save_best: bool = False
    """Make the best setting of a sweep what the run's pipeline draws with by itself."""
    save_samples: Literal["png", "npz"] | None = None
    """Keep the samples: a folder of PNG files with their parameters, or one npz of uint8 (N, H, W, C)."""
    lpips: bool = False
    """Measure LPIPS of reconstructions (arXiv:1801.03924, AlexNet); needs the extra "lpips"."""


@dataclass
class Config:
    """Train a latent diffusion model: images in, a Diffusers pipeline out."""

    output_dir: str | None = None
    """Run folder. Default: runs/<name of the config file>, or the folder of a run's own config.yaml."""
    seed: int = 0
    """Seed of everything random: weights, order, noise, pictures."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Arithmetic of the networks; weights stay float32. auto: bf16 where the hardware has it, else no."""
    num_threads: int | None = None
    """CPU threads of a process. Unset: the cores that it may use; in a continued run, as many as before."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Loggers beside metrics.jsonl; need the extra "trackers"."""
    redo: list[Literal["autoencoder", "latents", "denoiser", "evaluation"]] = field(default_factory=list)
    """Stages to do again from the start. What depends on them is done again too."""
    dry_run: bool = False
    """Scan the data, print the plan, draw what the network will see, and stop."""
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


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
        raise RunError(
            "--evaluation.lpips needs the package lpips: pip install -e '.[lpips]' in the checkout"
        )
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
            "pip install -e '.[lpips]' in the checkout, or set the weight to 0"
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


set_loader("yaml", read_yaml, (yaml.YAMLError,))


class _Parser(ArgumentParser):
    """Says in which file something is wrong, and which known option an unknown one resembles."""

    _file: str | None = None

    def parse_path(self, path, *args, **kwargs):
        self._file = str(path)
        try:
            if not Path(path).is_file():
                self.error("want a file")
            content = read_yaml(Path(path).read_text("utf-8"))
            if not isinstance(content, dict):
                self.error("holds no options: want lines such as `seed: 1`; training/configs has examples")
            for entry in fields(Config):
                # jsonargparse fails in a section of nothing, and imports what a name in its place names.
                if is_dataclass(entry.default_factory) and not isinstance(content.get(entry.name, {}), dict):
                    self.error(f"{entry.name}: want a mapping of options, not {content[entry.name]!r}")
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"want a YAML file in UTF-8; {error}", error)
        except yaml.YAMLError as error:
            self.error(f"not read as YAML: {error}", error)
        finally:
            self._file = None

    def error(self, message: str, ex: Exception | None = None):
        """Exit with code 2, not listing all options as usual."""
        known = [action.dest for action in self._actions]
        for group, option in re.findall(
            r"(?:Group '([\w.]+)' does not accept option|--|^Option)[ ']*([\w.]+)", message
        ):
            name = f"{group}.{option}" if group else option
            if name not in known and (near := difflib.get_close_matches(name, known, n=1, cutoff=0.5)):
                message += f". {name} is unknown; did you mean {near[0]}?"
        message = message.replace("Unexpected config:", "--config wants a file, not")
        message = message if len(message) < 2000 else f"{message[:1000]} ..."  # they repeat what was given
        where = f"--config {self._file}: " if self._file else ""
        self.exit(2, f"error: {where}{message}\nAll options: --help\n")


@cache
def _parser() -> _Parser:
    parser = _Parser(description=Config.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of the run; later options override it.")
    parser.add_class_arguments(Config)
    return parser


def parse_config(argv: list[str] | None = None, stages: Sequence[str] | None = None) -> Config:
    """The checked configuration of the command line (by default the process's own).

    Without `--config` it starts from `training/configs/cifar10.yaml`. Prints the resolved run and exits for
    `--print_config`; exits with code 2 and a message for what is unknown or of a wrong type.

    Args:
        stages: what this script does; it cannot do others again. Default: all.

    Raises:
        RunError: for values out of range, or that cannot work together.
    """
    argv, parser = sys.argv[1:] if argv is None else argv, _parser()
    if not any(argument.split("=")[0] == "--config" for argument in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    parsed = parser.parse_args(argv)
    if None in parsed.config:
        parser.error("--config wants a file; give single options by their names, such as --seed 1")
    file = Path(str(parsed.config[-1]))
    parsed = parser.instantiate(parsed)
    config = Config(**{f.name: getattr(parsed, f.name) for f in fields(Config)})
    if config.output_dir is None:
        own = (file.parent / LOCK).exists()  # the configuration that a run folder keeps means that run
        config.output_dir = str(file.parent) if own else f"runs/{file.stem}"
    check_config(config)
    if stages and (unknown := set(config.redo) - set(stages)):
        raise RunError(f"--redo {sorted(unknown)}: this script does {', '.join(stages)}; use train_ldm.py")
    return config


def command_line(*stages: str) -> Config:
    """The configuration of this process's command line; exits with code 2 for what its user can mend.

    Args:
        stages: what this script does. Default: all.
    """
    try:
        return parse_config(stages=stages)
    except RunError as error:
        fail(error)


def objective_of(config: DenoiserConfig) -> dict:
    """What the network will predict and on which noise path: the `objective` of an LDMPipeline."""
    if config.prediction_type == "flow_prediction":
        return {"prediction_type": "flow_prediction"}
    beta_start, beta_end = (0.00085, 0.012) if config.beta_schedule == "scaled_linear" else (0.0001, 0.02)
    return {
        "prediction_type": config.prediction_type,
        "num_train_timesteps": 1000,
        "beta_schedule": config.beta_schedule,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }
