"""The networks in whose features images are compared, and the features of real images."""

import hashlib
import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from training.config import RunError
from training.data.images import ImageDataset
from training.evaluation import digit_reader
from training.evaluation.plots import to_bytes
from training.evaluation.stream import read_batches, stream
from training.runtime.run import Run
from training.runtime.signals import leave_signals_to_parent

KINDS = """\
It may be "inception" (the network of FID), "digits" (for that data set alone), a local folder or Hub id of an
image model of transformers such as facebook/dinov2-base, a TorchScript file, or, on the command line alone,
module:callable, Python code that returns a torch.nn.Module. The last two take float32 images (N, 3, R, R) in
[0, 1] and return features (N, D), or these and class logits (N, K)."""


class FeatureNetwork(nn.Module):
    """A network that turns images into features, with a hash of all that they depend on.

    Args:
        name: what to call it.
        module: see `KINDS`; it takes what `prepare` makes of float32 images `(N, 3, R, R)` in [0, 1].
        resize: how `prepare` scales images, in words.
        source: bytes of the code, beside the weights, on which the features depend.
    """

    def __init__(self, name: str, module: nn.Module, resize: str = "none", prepare=None, source: bytes = b""):
        super().__init__()
        self.name, self.resize, self.prepare = name, resize, prepare
        self.module = module.eval()
        self.sha256 = sha256_of(module, source)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Of uint8 images `(N, 1 or 3, R, R)` "features" `(N, D)` and, of classifiers, "logits" `(N, K)`."""
        pixels = images.expand(-1, 3, -1, -1).float() / 255
        found = self.module(pixels if self.prepare is None else self.prepare(pixels))
        found = found if isinstance(found, (tuple, list)) else (found,)
        return dict(zip(("features", "logits"), (each.float() for each in found), strict=False))


def sha256_of(module: nn.Module, source: bytes = b"") -> str:
    """Hexadecimal SHA-256 of a module's weights, with their names, and of `source`."""
    digest = hashlib.sha256(source)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache  # a run asks for it before the first stage, and in the stages that need it
def load_network(spec: str) -> FeatureNetwork:
    """The network that `--evaluation.features` names, tried on an image.

    Raises:
        RunError: if there is none, a package is missing, or it returns no features.
    """
    try:
        network = _load(spec)
        with torch.no_grad():
            found = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    except RunError:
        raise
    except Exception as error:  # somebody else's code and files
        raise RunError(
            f"--evaluation.features {spec!r} gives no network: {type(error).__name__}: {error}\n{KINDS}"
        ) from error
    if any(value.ndim != 2 or len(value) != 2 for value in found.values()):
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        raise RunError(f"--evaluation.features {spec!r} returns {shapes} of two images\n{KINDS}")
    return network


def _load(spec: str) -> FeatureNetwork:
    if spec == "inception":
        return _inception()
    if spec == "digits":
        source = inspect.getsource(digit_reader).encode()
        return FeatureNetwork(spec, digit_reader.DigitReader(), source=source)
    if Path(spec).is_file():
        return FeatureNetwork(Path(spec).name, torch.jit.load(spec, "cpu"), source=Path(spec).read_bytes())
    module, colon, name = spec.partition(":")
    if colon and not Path(spec).exists():
        code = import_module(module)
        return FeatureNetwork(spec, getattr(code, name)(), source=inspect.getsource(code).encode())
    return _from_transformers(spec)


def _inception() -> FeatureNetwork:
    if missing := [name for name in ("torch_fidelity", "torchvision") if find_spec(name) is None]:
        raise RunError(
            f"--evaluation.features inception needs {' and '.join(missing)}: "
            "pip install -e '.[fid]' in the checkout. Or choose another network, or "
            f"--evaluation.num_samples 0 to leave out the figures of samples.\n{KINDS}"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3  # here, because it is an extra

    class Inception(NoTrainInceptionV3):
        def forward(self, images):
            return self._torch_fidelity_forward(images)

    # As TensorFlow 1 scaled images, without antialiasing: so are the published figures.
    network = Inception("inception-v3-compat", ["2048", "logits_unbiased"], antialias=False)
    return FeatureNetwork(
        "inception",
        network,
        "299x299, bilinear as in TensorFlow 1",
        prepare=lambda pixels: (pixels * 255).round().byte(),
    )


def _from_transformers(spec: str) -> FeatureNetwork:
    from transformers import AutoModel  # here, because it takes seconds to import
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(spec)
    model = AutoModel.from_pretrained(spec, use_safetensors=True)
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    size = size or model.config.image_size
    size = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    mean, std = (torch.tensor(settings[f"image_{key}"]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def prepare(pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != size:
            pixels = interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - mean.to(pixels)) / std.to(pixels)

    resize = f"{size}x{size}, bicubic with antialiasing"
    name = Path(spec).name if Path(spec).exists() else spec
    return FeatureNetwork(name, _Pooled(model), resize, prepare, f"{size} {mean} {std}".encode())


class _Pooled(nn.Module):
    """The one vector a picture that an image model of transformers offers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):  # CLIP and its like
            found = self.model.get_image_features(pixel_values=pixels)
            return found if torch.is_tensor(found) else found.pooler_output
        found = self.model(pixel_values=pixels)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def real_features(
    run: Run, network: FeatureNetwork, split: str, limit: int | None = None
) -> dict[str, Tensor]:
    """Features, and logits of a classifier, of the first `limit` images of a split, on the CPU.

    Cached in the run folder by data, transform and network. Every process does its share, and gets all.
    """
    images: ImageDataset = getattr(run.data, split)
    count, size = min(limit or len(images), len(images)), run.config.evaluation.batch_size
    key = {"data and transform": run.data.fingerprint, "split": split, "network": network.sha256}
    folder = run.folder / "evaluation" / f"real-{split}-{short(key)}"
    network.to(run.device)

    def compute(parts: list[range]) -> Iterator[dict[str, Tensor]]:
        loader = DataLoader(
            images,
            batch_sampler=[[(index, 0) for index in part] for part in parts],
            num_workers=run.config.data.num_workers,
            worker_init_fn=leave_signals_to_parent,
        )
        for batch in loader:
            yield network(to_bytes(batch["images"].to(run.device)))

    stream(run, folder, count, size, compute, f"features of {split}")
    return read_batches(folder, count, size)


def short(key: dict) -> str:
    """A name for what depends on `key`."""
    return hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:12]
