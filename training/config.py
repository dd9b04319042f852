"""The configuration of a run: a tree of dataclasses, read from one YAML file and dotted options.

An option's type with its range, default, help (the text below it) and resume rule stand at its field. Errors,
`--help` and the comparison of a run with its continuation are derived from there.
"""

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NoReturn

from training.options import (
    BelowOne,
    Finite,
    NonNegative,
    NonNegativeInt,
    Parser,
    Positive,
    PositiveInt,
    Range,
    RunError,
    Share,
    Text,
    default_of,
    free,
    in_range,
    new_parser,
    option,
    options,
    tunable,
    wanted,
    written,
)

LOCK = ".ldm_run"  # marks a folder as ours from the first moment, and is locked while a process works there
DEFAULT_MINUTES = 60
LPIPS_SMALLEST = 16  # VGG halves images four times

# NumPy takes no larger seed, and the noise schedule has 1000 steps.
Seed = Annotated[int, Range(f"a whole number from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)]
SamplingSteps = Annotated[int, Range("a whole number from 1 to 1000", lambda value: 1 <= value <= 1000)]
Pixels = Annotated[int, Range("a whole number, 8 or more", lambda value: value >= 8)]
Samples = Annotated[int, Range("a whole number, 10 or more", lambda value: value >= 10)]
SamplesOrNone = Annotated[int, Range("0, or a whole number, 10 or more", lambda v: v == 0 or v >= 10)]
PositiveShare = Annotated[float, Range("a number above 0, at most 1", lambda value: 0 < value <= 1)]
TaskName = Annotated[
    str,
    Range(
        "inpaint, superres, superres:FACTOR (2 or more), colorize, deblur, enhance or column:NAME",
        lambda name: (
            re.fullmatch(r"inpaint|superres(:([2-9]|[1-9]\d+))?|colorize|deblur|enhance|column:.+", name)
            is not None
        ),
    ),
]
Norm = Annotated[float, Range("a number above 0 (.inf: no clipping)", lambda value: value > 0)]


def redact(text: str) -> str:
    """`text` without access tokens: those of the Hub's form, in addresses, and those of the environment."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return re.sub(r"hf_\w{8,}|(?<=://)[^/@\s]+(?=@)", "***", text)


def fail(error: ValueError) -> NoReturn:
    """Exit with code 2 and the message alone; with several processes it names the rank."""
    sys.stdout.flush()
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{rank}error: {redact(str(error))}", file=sys.stderr, flush=True)
    sys.exit(2)


@dataclass
class DataConfig:
    """The images."""

    dataset: Text = option("uoft-cs/cifar10", resume="free", basic=True)
    """Hub id, folder of images, or parquet, arrow or webdataset files. A folder may have one folder per
    class, or folders train and test, or be written by save_to_disk. "digits" is scikit-learn's set of
    handwritten digits, which needs no download."""
    subset: Text | None = option(None, ignored_if=("dataset", "digits"))
    """Name of the Hub dataset's configuration, if it has several."""
    train_split: Text = option("train", ignored_if=("dataset", "digits"))
    """Split to train on."""
    test_split: Text | None = option(None, ignored_if=("dataset", "digits"))
    """Split for held-out metrics. Default: found by name (test, validation)."""
    held_out: BelowOne = 0.05
    """Share of the training split held out (at most 2,000 images) if there is no other split."""
    max_images: PositiveInt | None = None
    """Images to train on, at most, drawn at random, and a tenth as many held-out ones. Default: all; with
    --minutes as many as the denoiser has time to see."""
    image_column: Text | None = option(None, ignored_if=("dataset", "digits"))
    """Column of the images (type Image, or encoded bytes). Default: found by type."""
    label_column: Text | None = option(None, basic=True, ignored_if=("dataset", "digits"))
    """Column of the class labels (ClassLabel, integers or names). Default: found by type or a usual name; a
    dataset without one is unlabelled."""
    caption_column: Text | None = option(None, ignored_if=("dataset", "digits"))
    """Column of the captions (texts or lists of texts), for --denoiser.text_encoder. Default: found by name
    (text, caption, captions, prompt, description), or files .txt beside images of the same name."""
    resolution: Pixels = option(32, basic=True)
    """Height and width in pixels. The shorter side is resized to it, then the centre is cropped."""
    channels: Literal[1, 3] = option(3, basic=True)
    """1 for grey images, 3 for RGB."""
    horizontal_flip: bool = option(True, basic=True)
    """Train on mirrored images too. Set it to false if left and right mean something (digits, text)."""
    num_workers: NonNegativeInt = free(0)
    """Processes that decode images. 0 decodes in the training process."""
    scan: Literal["full", "sample"] = free("full")
    """Images that are decoded before the first step, to report and leave out unreadable ones: all, or a
    sample of a few thousand."""


@dataclass
class OptimizationConfig:
    """Length and pace of the training of a network."""

    batch_size: PositiveInt = 128
    """Images per optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: PositiveInt = free(1)
    """Parts of a process's share of the batch, computed one after another to save memory."""
    max_steps: PositiveInt = tunable(10_000, basic=True)
    """Optimizer steps in all."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon (Keller Jordan, 2024): orthogonal steps for the matrices and convolutions inside of the
    networks, AdamW's for everything else, both at AdamW's learning rate (arXiv:2502.16982). A step takes
    longer, and a matrix has one moment instead of two. Not with FSDP."""
    learning_rate: Positive = tunable(1e-3)
    """Peak learning rate, for both optimizers."""
    warmup_steps: NonNegativeInt = tunable(200)
    """Steps in which the learning rate rises linearly from zero."""
    decay_fraction: Share = tunable(0.4)
    """Last part of the steps, in which the learning rate falls linearly to zero."""
    adam_betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    """Decay of AdamW's first and second moments."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Norm = tunable(1.0)
    """Gradients are clipped to this norm."""
    ema_fraction: PositiveShare = 0.05
    """Half-life of the EMA weights, as a share of the images seen so far (EDM2, arXiv:2312.02696)."""
    ema_half_life: PositiveInt = 500_000
    """Upper bound of that half-life, in images."""
    compile: bool = free(False)
    """Compile the network with torch.compile."""
    log_every: PositiveInt = free(50)
    """Steps between two lines of metrics.jsonl."""
    validate_every: PositiveInt = free(1000)
    """Steps between two validations on held-out images."""
    sample_every: PositiveInt = free(1000)
    """Steps between two grids of pictures."""
    checkpoint_every: PositiveInt = free(1000)
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = free(1)
    """Number of checkpoints that are kept, the newest ones."""
    keep_every: NonNegativeInt = free(0)
    """Checkpoints at multiples of this step are never deleted; 0: none."""

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0): warm-up, plateau, linear decay."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = min(1.0, (self.max_steps - step) / max(1.0, self.decay_fraction * self.max_steps))
        return self.learning_rate * min(rise, fall)


@dataclass
class AutoencoderConfig(OptimizationConfig):
    """Stage 1: images to latents and back."""

    pretrained: Text | None = option(None, basic=True)
    """Local folder or Hub id of an existing AutoencoderKL or AutoencoderDC, used instead of training."""
    kind: Literal["AutoencoderKL", "AutoencoderDC"] = "AutoencoderKL"
    """Class of the network. AutoencoderDC (arXiv:2410.10733) learns faster and has no posterior."""
    widths: list[PositiveInt] = option([64, 128])
    """Channels by level. Every level after the first halves the resolution: [64, 128] downsamples by 2."""
    blocks: list[NonNegativeInt] = option([1, 1])
    """Residual blocks by level. AutoencoderKL wants one number everywhere; AutoencoderDC takes 0 as well."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    """Pixel error, averaged over all elements."""
    kl_weight: NonNegative = 1e-6
    """Weight of the KL divergence in the convention of LDM (arXiv:2112.10752): KL and pixel error both
    summed over an image. Internally both are means, and the weight is multiplied by latent / image elements.
    AutoencoderDC has no posterior: there it weighs half the mean square of the latents, which keeps them from
    growing, and can be a thousand times larger."""
    lpips_weight: NonNegative = 0.0
    """Weight of the perceptual distance LPIPS (arXiv:1801.03924); needs the extra "lpips"."""
    gan_weight: NonNegative = 0.0
    """Weight of the PatchGAN loss, on top of the adaptive weight of VQGAN (arXiv:2012.09841, eq. 7)."""
    gan_start: NonNegativeInt = option(5000, ignored_if=("gan_weight", 0))
    """Step at which the discriminator starts. A dip of PSNR there is normal."""
    latent_noise: NonNegative = 0.0
    """Deviation of the noise added to the latents before decoding, relative to the latents' own deviation
    over the images that are computed at once."""
    equivariance: Share = 0.0
    """Share of the steps of the second half in which latents and images are both halved in size before they
    are compared: a scale-equivariant latent space is easier to diffuse (EQ-VAE, arXiv:2502.09509)."""


@dataclass
class LatentsConfig:
    """Stage 2: the latents of every image and its mirror image."""

    batch_size: PositiveInt = free(256)
    """Images encoded at once by one process."""
    shard_size: PositiveInt = 8192
    """Images in one safetensors file."""
    resident: Literal["auto", "device", "disk"] = free("auto")
    """Where training reads them: all on the device, or memory-mapped. auto: device if a quarter suffices."""


@dataclass
class DenoiserConfig(OptimizationConfig):
    """Stage 3: the diffusion model of the latents."""

    widths: list[PositiveInt] = option([128, 256, 256], basic=True)
    """Channels of the U-Net by level. Every level after the first halves the resolution."""
    layers_per_block: PositiveInt = 2
    """Residual blocks per level."""
    attention: list[bool] = option([False, True, True])
    """Levels with self-attention."""
    attention_head_dim: PositiveInt = 64
    """Channels of one attention head."""
    norm_groups: PositiveInt = 32
    """Groups of the group normalisation; must divide every width."""
    dropout: BelowOne = 0.0
    """Dropout probability in the residual blocks."""
    class_conditional: bool | None = None
    """Whether labels are a condition. Default: if the dataset has them."""
    label_dropout: Share = option(0.1, ignored_if=("class_conditional", False))
    """Share of the images trained with the null class, for classifier-free guidance (arXiv:2207.12598)."""
    text_encoder: Text | None = option(None, basic=True)
    """Captions are a condition, encoded by this text encoder of transformers, a local folder or Hub id such
    as google-t5/t5-small or openai/clip-vit-base-patch32, which is not trained. "words" is a small encoder
    with a vocabulary of its own, trained with the denoiser: for data of few different words."""
    text_max_length: PositiveInt | None = option(None, ignored_if=("text_encoder", None))
    """Tokens of a caption, at most. Default: as many as the encoder takes, 77 if it has no limit."""
    cut_captions: bool = option(False, ignored_if=("text_encoder", None))
    """Cut captions of more tokens, which are an error otherwise."""
    text_dropout: Share = option(0.1, ignored_if=("text_encoder", None))
    """Share of the images trained with the empty caption, for classifier-free guidance. With classes too,
    half of the smaller of both shares lose caption and class."""
    cross_attention_dim: PositiveInt = option(256, ignored_if=("text_encoder", None))
    """Width to which encoded captions are projected, for the attention of the denoiser."""
    task: TaskName | None = option(None, basic=True)
    """An image as a condition, beside classes and captions. inpaint: with holes (strokes, boxes, or all of
    it). superres: at 1/4 of its size; superres:2 at 1/2. colorize: its grey. deblur: blurred.
    enhance: blurred, small, noisy and compressed. column:NAME: the picture in another column of the data,
    such as a sketch or a depth map; palette pictures and those of few colours keep their edges."""
    prediction_type: Literal["epsilon", "v_prediction", "flow_prediction"] = "flow_prediction"
    """Target of the network: the noise, velocity (arXiv:2202.00512) or flow (arXiv:2209.03003)."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option(
        "linear", ignored_if=("prediction_type", "flow_prediction")
    )
    """Noise schedule of epsilon and v_prediction; squaredcos_cap_v2 is the cosine (arXiv:2102.09672)."""
    zero_terminal_snr: bool = option(False, ignored_if=("prediction_type", "flow_prediction"))
    """Rescale the schedule of v_prediction so that its last step is pure noise (arXiv:2305.08891)."""
    timestep_density: Literal["uniform", "logit_normal"] = "logit_normal"
    """Density of the training timesteps; logit_normal is that of Stable Diffusion 3 (arXiv:2403.03206)."""
    logit_mean: Finite = option(0.0, ignored_if=("timestep_density", "uniform"))
    """Mean of the logit-normal density; larger is noisier."""
    logit_std: Positive = option(1.0, ignored_if=("timestep_density", "uniform"))
    """Deviation of the logit-normal density."""
    loss_weight: Literal["none", "min_snr", "uncertainty"] = "none"
    """Weight by timestep: none, min-SNR (arXiv:2303.09556), learned uncertainty (EDM2, arXiv:2312.02696)."""
    min_snr_gamma: Positive = option(5.0, ignored_if=("loss_weight", "none", "uncertainty"))
    """Clamp of min-SNR."""
    sample_steps: SamplingSteps = free(20)
    """Inference steps of the grids, and the default of the finished pipeline."""
    guidance_scale: Finite = free(1.5)
    """Guidance scale of grids by class or caption, and the default of the finished pipeline; 1 is off."""
    guidance_interval: tuple[Share, Share] = free((0.0, 1.0))
    """Lowest and highest noise level at which these are guided (arXiv:2404.07724); 0 is clean, 1 is noise."""
    guide_step: NonNegativeInt = free(0)
    """Step of an early checkpoint, which stays, and whose EMA weights become the pipeline's `guide_unet`: the
    weaker network of autoguidance (arXiv:2406.02507). 0: none. A finished run can add a checkpoint that it
    has kept."""
    evaluate_every: NonNegativeInt = free(0)
    """Steps between two evaluations of samples of the EMA weights by --evaluation.features; 0: none."""
    evaluate_samples: Samples = free(1000, ignored_if=("evaluate_every", 0))
    """Samples of such an evaluation."""

    @property
    def trains_text_encoder(self) -> bool:
        """Whether captions are encoded by an encoder that is trained with the denoiser."""
        return self.text_encoder == "words"


@dataclass
class EvaluationConfig:
    """Stage 4: metrics and pictures of the finished model. Its results are kept per setting, so that every
    option may change."""

    pipeline: Text | None = free(None)
    """Local folder or Hub id of a pipeline to evaluate instead of the run's own."""
    num_images: PositiveInt = free(2000)
    """Held-out images, at most, for PSNR, SSIM, LPIPS, the validation loss and the autoencoder's Frechet
    distance."""
    batch_size: PositiveInt = free(100)
    """Images at once. Results are kept batch by batch, so another size starts anew."""
    num_samples: SamplesOrNone = free(50_000, basic=True)
    """Samples to generate for metrics, over all processes; 0: none. Metrics of fewer than 10,000 samples
    carry the number in their names."""
    features: Text = free("inception", basic=True)
    """Network whose features compare samples with training images: inception, digits or a model. "inception"
    is that of FID (extra "fid"); "digits" is for that dataset. A model is a local folder or Hub id of an
    image model of transformers such as facebook/dinov2-base, a TorchScript file, or module:callable, Python
    code that returns a torch.nn.Module (on the command line only). The last two take float32 images
    (N, 3, R, R) in [0, 1] and return features (N, D), or these and class logits (N, K)."""
    clip: Text | None = free(None, ignored_if=("num_samples", 0))
    """Model of images and texts (CLIP, SigLIP) of transformers, a local folder or Hub id such as
    openai/clip-vit-base-patch32, which judges how well samples agree with their captions."""
    schedulers: list[str] = free([], ignored_if=("num_samples", 0))
    """Schedulers of Diffusers to sample with, such as [UniPCMultistep, DDIM]. Default: the pipeline's own.
    Several schedulers, steps or scales make a sweep: all combinations, and all metrics of the best one."""
    num_inference_steps: list[SamplingSteps] = free([], ignored_if=("num_samples", 0))
    """Numbers of steps. Default: the pipeline's own."""
    guidance_scales: list[Finite] = free([], ignored_if=("num_samples", 0))
    """Guidance scales; 1 is off. Default: the pipeline's own."""
    guidance_intervals: list[list[Share]] = free([], ignored_if=("num_samples", 0))
    """Noise levels that are guided (arXiv:2404.07724), such as [[0, 1], [0.2, 0.8]]; 0 is clean, 1 is noise.
    At all others one evaluation is enough. Default: the pipeline's own."""
    guidance_rescales: list[Share] = free([], ignored_if=("num_samples", 0))
    """Shares of the deviation that guidance adds and rescaling takes back (arXiv:2305.08891). Default: the
    pipeline's own."""
    guidance_kinds: list[str] = free([], ignored_if=("num_samples", 0))
    """Kinds of guidance: classifier_free; autoguidance, if there is a `guide_unet`; or a guider of Diffusers,
    such as AdaptiveProjected, at every noise level and without rescaling. Default: the pipeline's own."""
    save_best: bool = free(False, ignored_if=("num_samples", 0))
    """Store the best setting of a sweep as the default of the run's pipeline."""
    save_samples: Literal["png", "npz"] | None = free(None, ignored_if=("num_samples", 0))
    """Keep the samples: a folder of PNG files with their parameters, or one npz of uint8 (N, H, W, C)."""
    lpips: bool = free(False)
    """Compute LPIPS of reconstructions (arXiv:1801.03924, AlexNet); needs the extra "lpips"."""


@dataclass
class Config:
    """Train a latent diffusion model: images in, a Diffusers pipeline out."""

    output_dir: Text | None = option(None, resume="unrecorded", basic=True)
    """Run folder. Default: runs/<name of the config file, or of the dataset>, or the folder of a run's own
    config.yaml."""
    seed: Seed = option(0, basic=True)
    """Seed of everything random: weights, order, noise, pictures."""
    minutes: Positive | None = option(None, basic=True)
    """Minutes of the whole job: every option that is not given is chosen for them, by steps timed on this
    machine. Default: 60, unless --config is given. A run that is continued keeps its choice."""
    mixed_precision: Literal["auto", "no", "bf16"] = free("auto", basic=True)
    """Arithmetic of the networks: auto, no or bf16. Weights stay float32; auto is bf16 if the hardware has
    it."""
    num_threads: PositiveInt | None = free(None)
    """CPU threads per process. Default: the cores that it may use; in a continued run, as many as before."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = free([], basic=True)
    """Loggers beside metrics.jsonl: [tensorboard, trackio, wandb]. They need the extra "trackers"."""
    redo: list[Literal["autoencoder", "latents", "denoiser", "evaluation"]] = option(
        [], resume="unrecorded", basic=True
    )
    """Stages to do again from the start: [autoencoder, latents, denoiser, evaluation]. The stages after them
    are done again too."""
    dry_run: bool = option(False, resume="unrecorded", basic=True)
    """Scan the data, print the plan, save a picture of the networks' input, and stop."""
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    given: ClassVar[frozenset[str]] = frozenset()  # names of the options in the file and the command line
    started: ClassVar[float] = 0.0  # time.monotonic() when they were read


def check_config(config: Config, together: bool = True) -> None:
    """Refuse values out of range, and values that cannot work together.

    Args:
        together: False before the options that nobody gave are chosen.

    Raises:
        RunError: with what was found, what is wanted and the option that changes it.
    """
    for name, entry in options(Config).items():
        found = attrgetter(name)(config)
        if found is None and entry.default is not None:  # YAML's empty value, which passes as any type
            raise RunError(f"--{name} has no value: give one, or leave it out for its default")
        if not in_range(found, entry.type) or (found == [] and default_of(entry)):
            raise RunError(f"--{name} {written(found)}: want {wanted(entry.type)}")
    if not together:
        return
    if not config.autoencoder.pretrained:
        _check_schedule("autoencoder", config.autoencoder)
        _check_losses(config.autoencoder, config.data.resolution)
    _check_schedule("denoiser", config.denoiser)
    _check_task(config.denoiser.task, config.data)
    low, high = config.denoiser.guidance_interval
    if low >= high:
        raise RunError(f"--denoiser.guidance_interval [{low}, {high}]: want two rising noise levels")
    if config.evaluation.lpips and find_spec("lpips") is None:
        raise RunError(
            "--evaluation.lpips needs the package lpips: pip install -e '.[lpips]' in the checkout"
        )
    if config.evaluation.save_best and config.evaluation.pipeline:
        raise RunError(
            "--evaluation.save_best writes into a run's own pipeline: leave out --evaluation.pipeline"
        )
    if config.denoiser.guide_step and config.denoiser.trains_text_encoder:
        raise RunError(
            f"--denoiser.guide_step {config.denoiser.guide_step}: --denoiser.text_encoder words is trained "
            "with the network, and an early network does not know what becomes of it; set it to 0"
        )
    if config.denoiser.zero_terminal_snr and config.denoiser.prediction_type == "epsilon":
        raise RunError(
            "--denoiser.zero_terminal_snr with --denoiser.prediction_type epsilon: at pure noise the noise "
            "says nothing about the image; use v_prediction"
        )


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


def _check_task(task: str | None, data: DataConfig) -> None:
    kind, _, factor = (task or "").partition(":")
    if kind == "superres" and data.resolution % int(factor or 4):
        raise RunError(
            f"--denoiser.task {task}: --data.resolution {data.resolution} is no multiple of {factor or 4}"
        )
    if kind == "colorize" and data.channels == 1:
        raise RunError("--denoiser.task colorize: grey images have no colours; set --data.channels to 3")


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


def check_ignored(config: Config, given: set[str], file: bool = True) -> None:
    """Refuse options that differ from their default and have no effect.

    An option of the configuration file may lose its effect by one of the command line: that is meant.

    Args:
        given: the names of the options on the command line.
        file: whether those of the file are looked at.

    Raises:
        RunError: with the option and the one that turns it off.
    """
    for name, entry in options(Config).items():
        section, _, own = name.rpartition(".")
        rules = [entry.metadata.get("ignored_if", ())]
        if section == "autoencoder" and own != "pretrained" and config.autoencoder.pretrained:
            rules.append(("pretrained", config.autoencoder.pretrained))
        for other, *values in filter(None, rules):
            other, value = f"{section}.{other}", attrgetter(name)(config)
            off = attrgetter(other)(config) in values and value != default_of(entry)
            if off and (name in given or (file and other not in given)):
                raise RunError(
                    f"--{name} {written(value)} would have no effect, because --{other} is "
                    f"{written(attrgetter(other)(config))}: leave it out, or change that"
                )


@cache
def _config_parser() -> Parser:
    parser = new_parser(Config, "python training/train_ldm.py [--config FILE] [--OPTION VALUE] ...")
    parser.add_argument("--config", action="config", help="YAML file of the run; later options override it.")
    return parser


def parse_config(argv: list[str] | None = None, stages: Sequence[str] | None = None) -> Config:
    """The checked configuration of the command line (by default the process's own).

    Without `--config` all that is not given is sized for `DEFAULT_MINUTES`; see recipes.py. Prints and exits
    for `--help`, `--help_all` and `--print_config`.

    Args:
        stages: the stages of this script, which can redo no others. Default: all.

    Raises:
        RunError: for options that are unknown, wrong, without effect, or that cannot work together.
    """
    started = time.monotonic()
    argv, parser = sys.argv[1:] if argv is None else argv, _config_parser()
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    ours = [] if "config" in given else ["--minutes", str(DEFAULT_MINUTES)]
    parsed = parser.parse_args([*ours, *argv])
    if None in (parsed.config or []):
        parser.error("--config wants a file; give single options by their names, such as --seed 1")
    files = [Path(str(file)) for file in parsed.config or []]
    parsed = parser.instantiate(parsed)
    config = Config(**{f.name: getattr(parsed, f.name) for f in fields(Config)})
    known = _names(parser.parse_args(argv, defaults=False).as_dict()) if argv else ()
    config.given, config.started = frozenset(known), started
    own = bool(files) and (files[-1].parent / LOCK).exists()  # a run folder's configuration means that run
    if config.output_dir is None:
        name = files[-1].stem if files else Path(config.data.dataset).absolute().stem
        config.output_dir = str(files[-1].parent) if own else f"runs/{name}"
    check_config(config, together=config.minutes is None)
    check_ignored(config, given, file=not own)  # what a run has stored was checked when it began
    if stages and (unknown := set(config.redo) - set(stages)):
        raise RunError(f"--redo {sorted(unknown)}: this script does {', '.join(stages)}; use train_ldm.py")
    return config


def _names(tree: dict, prefix: str = "") -> Iterator[str]:
    """The dotted names of the options in a tree."""
    for key, value in tree.items():
        yield from _names(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def command_line(*stages: str) -> Config:
    """The configuration of this process's command line; exits with code 2 for what its user can mend.

    Args:
        stages: stages that this script runs. Default: all.
    """
    try:
        config = parse_config(stages=stages)
    except RunError as error:
        fail(error)
    if config.minutes is not None:
        # Read as torch is imported: threads that wait for each other leave their cores to other programs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return config


def objective_of(config: DenoiserConfig) -> dict:
    """The prediction of the network and its noise path: the `objective` of an LDMPipeline."""
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
