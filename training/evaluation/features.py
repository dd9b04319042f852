"""Feature networks, and the features of real images."""

import hashlib
import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import model_info
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, interpolate
from torch.utils.data import DataLoader

from ldm_pipeline.pipeline import tokenize
from training.config import DataConfig, RunError
from training.data.images import ImageData, load_images
from training.evaluation.plots import to_uint8
from training.evaluation.store import BatchStore, cache_key
from training.runtime.accelerator import on_main_process
from training.runtime.signals import leave_signals_to_parent

CHOICES = """\
Choose "inception", "digits", a local folder or Hub id of an image model of transformers such as
facebook/dinov2-base, a TorchScript file, or module:callable on the command line (see --help_all)."""


class FeaturesUnavailable(RunError):
    """The feature network is a possible one, but a package or a download is missing here and now."""

    def __init__(self, spec: str, reason: str):
        super().__init__(
            f"the feature network of --evaluation.features {spec} is not available: {reason}. Choose another "
            "network, or --evaluation.num_samples 0 to leave the metrics of samples out"
        )


class FeatureNetwork(nn.Module):
    """A network that turns images into features.

    Args:
        name: its name in tables.
        module: takes the output of `prepare`; returns features `(N, D)`, or these and class logits `(N, K)`.
        resize: method by which `prepare` scales images, in words.
        prepare: a function of float32 images `(N, 3, R, R)` in [0, 1]; by default they stay as they are.
        source: further bytes that the features depend on; hashed with the weights into `sha256`.
    """

    def __init__(self, name: str, module: nn.Module, resize: str = "none", prepare=None, source: bytes = b""):
        super().__init__()
        self.name, self.resize, self.prepare = name, resize, prepare
        self.module = module.eval()
        self.sha256 = weights_sha256(module, source)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """ "features" `(N, D)` and perhaps "logits" `(N, K)` of images uint8 `(N, 1 or 3, R, R)`."""
        pixels = images.expand(-1, 3, -1, -1).float() / 255
        outputs = self.module(pixels if self.prepare is None else self.prepare(pixels))
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return {name: value.float() for name, value in zip(("features", "logits"), outputs, strict=False)}


def weights_sha256(module: nn.Module, source: bytes = b"") -> str:
    """Hexadecimal SHA-256 of a module's weights, with their names, and of `source`."""
    digest = hashlib.sha256(source)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache  # the check before the first stage and two stages ask for it
def load_network(spec: str) -> FeatureNetwork:
    """The network that `--evaluation.features` names, tried on two images.

    Raises:
        FeaturesUnavailable: a package is missing, or the Hub is out of reach and the cache lacks it.
        RunError: `spec` names no network, or it returns no features.
    """
    try:
        network = _load(spec)
        outputs = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    except RunError:
        raise
    except Exception as error:  # other people's code and files
        raise RunError(
            f"--evaluation.features {spec!r} gives no network: {type(error).__name__}: {error}\n{CHOICES}"
        ) from error
    if any(value.ndim != 2 or len(value) != 2 for value in outputs.values()):
        shapes = {name: tuple(value.shape) for name, value in outputs.items()}
        raise RunError(f"--evaluation.features {spec!r} returns {shapes} for two images\n{CHOICES}")
    return network


def why_unavailable(accelerator: Accelerator, spec: str) -> str | None:
    """The reason why `load_network` cannot have a network here and now, or None if it can.

    One process asks, and downloads, for all. RunError as `load_network`.
    """

    def ask() -> str | None:
        try:
            load_network(spec)
        except FeaturesUnavailable as error:
            return str(error)
        return None

    return on_main_process(accelerator, ask)


def _load(spec: str) -> FeatureNetwork:
    if spec == "inception":
        return _inception()
    if spec == "digits":
        return FeatureNetwork(spec, DigitReader(), source=inspect.getsource(DigitReader).encode())
    if Path(spec).is_file():
        return FeatureNetwork(Path(spec).name, torch.jit.load(spec, "cpu"), source=Path(spec).read_bytes())
    if Path(spec).is_dir():
        return _image_model(spec, Path(spec).name)
    if ":" in spec:
        module, _, name = spec.partition(":")
        code = import_module(module)
        return FeatureNetwork(spec, getattr(code, name)(), source=inspect.getsource(code).encode())
    return _from_hub(spec)


def _inception() -> FeatureNetwork:
    if missing := [name for name in ("torch_fidelity", "torchvision") if find_spec(name) is None]:
        raise FeaturesUnavailable(
            "inception", f"it needs {' and '.join(missing)}: pip install -e '.[fid]' in the package's folder"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3  # here, because it is an extra

    class Inception(NoTrainInceptionV3):
        def forward(self, images):
            return self._torch_fidelity_forward(images)

    try:
        # Published FIDs scale images as TensorFlow 1 did, without antialiasing.
        network = Inception("inception-v3-compat", ["2048", "logits_unbiased"], antialias=False)
    except OSError as error:  # its weights come from GitHub
        raise FeaturesUnavailable("inception", f"its weights cannot be downloaded ({error})") from error
    resize = "299x299, bilinear as in TensorFlow 1"
    return FeatureNetwork("inception", network, resize, lambda pixels: (pixels * 255).round().byte())


def _from_hub(spec: str) -> FeatureNetwork:
    try:
        return _image_model(spec, spec, local_files_only=True)  # does not wait for a network
    except OSError:
        pass  # not in the cache
    try:
        model_info(spec, timeout=10)  # one request: transformers would retry for a minute
    except (HFValidationError, RepositoryNotFoundError):
        raise
    except Exception as error:  # of every layer below HTTP
        raise FeaturesUnavailable(spec, f"not in the cache, and the Hub is out of reach ({error})") from error
    return _image_model(spec, spec)


def _image_model(source: str, name: str, **options) -> FeatureNetwork:
    from transformers import AutoModel  # here, because it takes seconds to import
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(source, **options)
    model = AutoModel.from_pretrained(source, use_safetensors=True, **options)
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    size = size or model.config.image_size
    size = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    mean, std = (torch.tensor(settings[f"image_{key}"]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def prepare(pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != size:
            pixels = interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - mean.to(pixels)) / std.to(pixels)

    resize = f"{size}x{size}, bicubic with antialiasing"
    return FeatureNetwork(name, _Pooled(model), resize, prepare, f"{size} {mean} {std}".encode())


class ClipScore:
    """The agreement of images with texts: 100 times the cosine of their features (arXiv:2104.08718).

    Args:
        network: a model of images and texts.
        tokenizer: the model's.
    """

    def __init__(self, network: FeatureNetwork, tokenizer):
        self.network, self.tokenizer, self.sha256 = network, tokenizer, network.sha256

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        """Scores `(N,)` of images uint8 `(N, 1 or 3, R, R)` and their texts; longer texts are cut."""
        model = self.network.to(images.device).module.model
        ids, mask = (each.to(images.device) for each in tokenize(self.tokenizer, model, texts))
        found = model.get_text_features(input_ids=ids, attention_mask=mask.long())
        found = found if torch.is_tensor(found) else found.pooler_output
        return 100 * cosine_similarity(self.network(images)["features"], found.float())


@cache
def load_clip(spec: str) -> ClipScore:
    """The model that `--evaluation.clip` names. RunError if there is none, or it is not of both."""
    from transformers import AutoTokenizer  # here, because it takes seconds to import

    try:
        network = load_network(spec)
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)  # no code, and no question
    except (RunError, OSError, ValueError) as error:
        reason = str(error).replace("--evaluation.features", "--evaluation.clip")
        raise RunError(f"--evaluation.clip {spec} cannot be used: {reason}") from error
    if not hasattr(getattr(network.module, "model", None), "get_text_features"):
        raise RunError(f"--evaluation.clip {spec} is no model of images and texts of transformers")
    return ClipScore(network, tokenizer)


class _Pooled(nn.Module):
    """An image model of transformers, reduced to one vector per image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        # CLIP and the like also have text; older versions of transformers return its features alone.
        call = getattr(self.model, "get_image_features", self.model)
        outputs = call(pixel_values=pixels)
        if torch.is_tensor(outputs):
            return outputs
        pooled = getattr(outputs, "pooler_output", None)
        return outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class DigitReader(nn.Module):
    """A feature network for scikit-learn's digits that needs no download.

    Features are the images at the dataset's own 8x8 pixels. The logit of a class is the negative squared
    distance to its nearest training image.
    """

    def __init__(self):
        super().__init__()
        train = load_images(DataConfig(dataset="digits", resolution=8, channels=1)).train
        images = torch.stack([train[index, False]["images"] for index in range(len(train))])
        self.register_buffer("digits", images.flatten(1) / 2 + 0.5)
        self.register_buffer("labels", train.labels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(N, 64)` and logits `(N, 10)` of float32 images `(N, 3, R, R)` in [0, 1]."""
        features = adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        distances = torch.cdist(features, self.digits)
        nearest = [distances[:, self.labels == digit].amin(1) for digit in range(10)]
        return features, -torch.stack(nearest, 1).square()


def real_features(
    store: BatchStore,
    network: FeatureNetwork,
    data: ImageData,
    split: str,
    num_workers: int = 0,
    count: int | None = None,
) -> dict[str, Tensor]:
    """Features, and logits of a classifier, of the first `count` images of a split, on the CPU."""
    images, device = getattr(data, split), store.accelerator.device
    network.to(device)

    def compute(batches: list[range]) -> Iterator[dict[str, Tensor]]:
        loader = DataLoader(
            images,
            batch_sampler=[[(index, 0) for index in batch] for batch in batches],
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_parent,
        )
        for batch in loader:
            yield network(to_uint8(batch["images"].to(device)))

    name = f"real-{split}-{cache_key(data=data.fingerprint, split=split, network=network.sha256)}"
    return store.compute(name, min(count or len(images), len(images)), compute, f"features of {split}")
