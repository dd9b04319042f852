"""The latent cache: posterior moments of every image and its mirror image on disk, and their statistics."""

import json
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_pipeline.pipeline import normalize_latents
from training.config import RunError


def encode(autoencoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Posterior mean and standard deviation, `(N, c, h, w)` each, of images `(N, C, H, W)`.

    AutoencoderDC has no posterior: its deviation is None.
    """
    encoded = autoencoder.encode(images)
    if hasattr(encoded, "latent"):
        return encoded.latent, None
    return encoded.latent_dist.mean, encoded.latent_dist.std


def shard_problem(path: Path, shapes: dict[str, list[int]]) -> str | None:
    """Why a file is not a shard with tensors of these shapes, or None; reads the header only."""
    try:
        with safe_open(path, "pt") as shard:
            present = {name: shard.get_slice(name).get_shape() for name in shard.keys()}
    except (OSError, SafetensorError) as error:
        return f"it is damaged ({error})"
    return None if present == shapes else f"it holds {present}, wanted {shapes}"


def channel_statistics(shards: list[Path]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, `(c,)` float64, of posterior samples of all images.

    Args:
        shards: files with "mean" and "std" `(n, 2 or 1, c, ...)`, as `encode_latents.py` writes them.
    """
    count, total, squares = 0, 0.0, 0.0
    for shard in shards:
        moments = {key: value.double() for key, value in load_file(shard).items() if key != "class_labels"}
        mean = moments["mean"]
        dims = [dim for dim in range(mean.ndim) if dim != 2]
        count += mean.numel() // mean.shape[2]
        total = total + mean.sum(dims)
        squares = squares + mean.square().sum(dims)
        if "std" in moments:
            squares = squares + moments["std"].square().sum(dims)
    mean = total / count
    return mean, (squares / count - mean**2).sqrt()


class LatentDataset:
    """One split of the cache, as batches of normalised latents.

    Args:
        folder: the run's latents folder, written by `encode_latents.py`.
        split: "train" or "held_out".
        autoencoder: its config holds the statistics that normalise.
        device: of the batches.
        resident: "device" keeps the split there, "disk" maps the files into memory, "auto" is "device" if the
            split takes less than a quarter of its memory.

    Raises:
        RunError: if the manifest is damaged or names files outside the folder.
    """

    def __init__(self, folder: Path, split: str, autoencoder: nn.Module, device: torch.device, resident: str):
        path = folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            names, self.shape = manifest[split], tuple(manifest["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error!r}): --redo '[latents]'") from error
        if any(Path(name).name != name for name in names):
            raise RunError(f"{path} names files outside {folder}: --redo '[latents]'")
        self.autoencoder = autoencoder
        self.device = device
        shards = [load_file(folder / name) for name in names]
        self.shard_size = len(shards[0]["mean"])
        size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        self.resident = in_device_memory(size, device, resident)
        if self.resident:
            shards = [{key: torch.cat([s[key] for s in shards]).to(device) for key in shards[0]}]
            self.shard_size = len(shards[0]["mean"])
        self.shards = shards

    def __len__(self) -> int:
        return sum(len(shard["mean"]) for shard in self.shards)

    def _gather(self, key: str, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        if self.resident:
            tensor, indices = self.shards[0][key], indices.to(self.device)
            return tensor[indices] if flips is None else tensor[indices, flips.to(self.device)]
        rows = [self.shards[i // self.shard_size][key][i % self.shard_size] for i in indices.tolist()]
        if flips is not None:
            rows = [row[flip] for row, flip in zip(rows, flips.tolist(), strict=True)]
        with torch.autocast("cpu", enabled=False):  # which cannot stack float16
            return torch.stack(rows).to(self.device)

    def batch(self, indices: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        """Normalised latents `(N, c, h, w)`, float32: samples of their posteriors.

        Args:
            indices: `(N,)` images.
            flips: int64 `(N,)`, 1 for the mirror image; ignored if none is cached.
            noise: standard normal `(N, c, h, w)`.
        """
        flips = flips % self.shards[0]["mean"].shape[1]
        latents = self._gather("mean", indices, flips).float()
        if "std" in self.shards[0]:
            latents = latents + self._gather("std", indices, flips).float() * noise
        return normalize_latents(self.autoencoder, latents)

    def class_labels(self, indices: Tensor) -> Tensor | None:
        """Labels `(N,)`, or None if the data has none."""
        return self._gather("class_labels", indices) if "class_labels" in self.shards[0] else None


def in_device_memory(size: int, device: torch.device, resident: str) -> bool:
    """Whether a cache of `size` bytes is kept in the device's memory; `resident` as for `LatentDataset`."""
    if resident != "auto":
        return resident == "device"
    if device.type == "cuda":
        return size < torch.cuda.get_device_properties(device).total_memory / 4
    return size < psutil.virtual_memory().total / 4
