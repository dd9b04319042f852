"""Datasets of images: found on the Hub, in local files or in scikit-learn; their splits."""

import glob
import hashlib
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import HfApi, constants
from PIL import Image

from training.config import DataConfig, RunError

Result = TypeVar("Result")
HELD_OUT_NAMES = ("test", "validation", "valid", "val", "dev", "eval", "evaluation", "testing")
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)  # not Pillow's own list: asking for it makes Pillow try its rarest formats first
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
FORMS = """\
It may be a Hub id such as uoft-cs/cifar10 (with --data.subset if it has several configurations), a folder of
images (with or without one folder per class, or with the folders train and test), a .parquet, .arrow or .tar
(webdataset) file, a folder of those, a folder written by save_to_disk, or "digits"."""

# SECURITY.md: members of an archive that would be unpickled stay bytes. datasets 5 unpickles .pth alone.
for suffix in ("pickle", "pkl", "pyd", "pth", "pt", "joblib"):
    WebDataset.DECODERS.pop(suffix, None)


def load_splits(config: DataConfig) -> tuple[dict[str, Dataset], Any]:
    """Open the dataset that `config` names.

    Returns:
        The splits by name, and the identity of their content: JSON values that do not depend on the machine's
        caches. It is the commit for the Hub, and the files' names, sizes and times of change for local files.

    Raises:
        RunError: it does not exist, cannot be reached or read, or holds no images.
    """
    if config.dataset == "digits":
        return _load_digits()
    path = Path(config.dataset).expanduser()
    if path.exists():
        names = _files(path, config) if path.is_dir() else [path.name]
        folder = path if path.is_dir() else path.parent
        identity = [[name, *_size_and_time(folder / name)] for name in names]
        return _load_local(path, names, config), identity
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.dataset) or path.suffix in BUILDERS:
        raise _refusal(config, f"there is no such file or folder (looked for {path.absolute()})")
    return _load_from_hub(config)


def folders_of(config: DataConfig) -> tuple[str, ...]:
    """Folders that may hold the files which a dataset names by their paths: its own, or the Hub's caches."""
    path = Path(config.dataset).expanduser()
    if config.dataset == "digits" or not path.exists():
        caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
        return tuple(os.path.abspath(folder) for folder in caches)
    folder = path if path.is_dir() else path.parent
    return os.path.abspath(folder), os.path.realpath(folder)


def _refusal(config: DataConfig, reason: str) -> RunError:
    return RunError(f"--data.dataset {config.dataset!r} cannot be loaded: {reason}\n{FORMS}")


def _read(config: DataConfig, function: Callable[..., Result], *arguments, **options) -> Result:
    """The result of a function of `datasets`; RunError for its errors over bad files, of nearly any kind."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        # A DatasetGenerationError says only that there was another error.
        cause = (isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__) or error
        raise _refusal(config, f"{type(cause).__name__}: {cause}") from error


def _load_digits() -> tuple[dict[str, Dataset], Any]:
    from sklearn.datasets import load_digits  # here, because no other dataset needs scikit-learn

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    features = {"image": ImageFeature(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    identity = hashlib.sha256(pixels.tobytes() + digits.target.astype("<i8").tobytes()).hexdigest()
    return {"train": Dataset.from_dict(columns, features=Features(features))}, identity


def _load_from_hub(config: DataConfig) -> tuple[dict[str, Dataset], Any]:
    try:
        HfApi().dataset_info(config.dataset, timeout=10)  # a single GET; datasets would retry for 20 seconds
    except Exception as error:  # of httpx or httpx2, by the version of huggingface_hub, or the Hub's refusal
        names = {"repo_id": config.dataset, "dataset_name": config.dataset.split("/")[-1]}
        try:
            builder = Cache(**names, config_name=config.subset, hash="auto", version="auto")
        except ValueError as missing:
            reason = f"it is no local path, and the Hub does not give it ({type(error).__name__}: {error})"
            raise _refusal(config, f"{reason}, nor is there a cached copy ({missing})") from error
    else:
        builder = _read(config, datasets.load_dataset_builder, config.dataset, config.subset)
    splits = _prepare(builder, config)
    return splits, [config.dataset, builder.config.name, builder.hash]  # the hash is that of the Hub's commit


def _prepare(builder: datasets.DatasetBuilder, config: DataConfig) -> dict[str, Dataset]:
    """Convert a builder's files to Arrow in the cache, unless they are there, and open them."""
    _read(config, builder.download_and_prepare)
    return _read(config, builder.as_dataset)


def _load_local(path: Path, names: list[str], config: DataConfig) -> dict[str, Dataset]:
    """The splits of a file, or of a folder of the files `names`."""
    if not path.is_dir():
        if path.suffix not in BUILDERS:
            raise _refusal(config, f"a single file must end in {', '.join(BUILDERS)}")
        file = glob.escape(str(path.absolute()))
        builder = _read(config, datasets.load_dataset_builder, BUILDERS[path.suffix], data_files=file)
        return _prepare(builder, config)
    if {"dataset_dict.json", "state.json"} & set(names):
        stored = _read(config, datasets.load_from_disk, str(path))
        splits = dict(stored) if isinstance(stored, DatasetDict) else {"train": stored}
        _check_inside([file["filename"] for rows in splits.values() for file in rows.cache_files], config)
        return splits
    suffixes = Counter(Path(name).suffix for name in names)
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    found = ", ".join(f"{suffix or 'no suffix'} ({count:,})" for suffix, count in suffixes.most_common(10))
    if not images and not suffixes.keys() & BUILDERS.keys():
        raise _refusal(config, f"the folder holds no images (files found: {found or 'none'})")
    described = any(re.fullmatch(r"metadata\.(csv|jsonl|parquet)", Path(name).name) for name in names)
    if images and not described:
        stems = {name.rpartition(".")[0] for name in images}
        texts = {name for name in names if name.endswith(".txt") and name.removesuffix(".txt") in stems}
        if others := len(names) - len(images) - len(texts):
            warnings.warn(f"{others:,} files are no images by their suffix; all files: {found}", stacklevel=2)
        return _load_image_folder(path, images, texts, config)
    builder = _read(config, datasets.load_dataset_builder, str(path.absolute()), config.subset)
    _check_inside([name for files in builder.config.data_files.values() for name in files], config)
    return _prepare(builder, config)


def _check_inside(files: Iterable[str], config: DataConfig) -> None:
    """RunError where a dataset's own description (README.md, state.json) names a file outside its folder."""
    folders = tuple(os.path.join(folder, "") for folder in folders_of(config))
    for name in files:
        if "://" in name or not os.path.abspath(name).startswith(folders):
            raise _refusal(config, f"its description names a file outside its folder: {name}")


def _load_image_folder(
    root: Path, names: list[str], texts: set[str], config: DataConfig
) -> dict[str, Dataset]:
    """The images `names` below `root`, with captions if there are `texts`, files of the same names.

    Not by datasets' imagefolder, which guesses splits from file names and drops images that fit none: one
    "test_shot.jpg" among holiday pictures would become the whole dataset.
    """
    parts = [name.split("/") for name in names]
    depth = 1 if _has_split_folders(parts, config) else 0
    folders = [part[depth] if len(part) > depth + 1 else "" for part in parts]
    classes = sorted(set(folders))
    features = {"image": ImageFeature()}
    if len(classes) > 1 and "" not in classes:
        features["label"] = ClassLabel(names=classes)
    if texts:
        features["text"] = Value("string")
    columns: dict[str, dict[str, list]] = defaultdict(lambda: {name: [] for name in features})
    for name, part, folder in zip(names, parts, folders, strict=True):
        split = columns[part[0] if depth else "train"]
        split["image"].append(str(root.absolute() / name))
        if "label" in features:
            split["label"].append(folder)
        if texts:
            beside = name.rpartition(".")[0] + ".txt"
            split["text"].append(_read_text(root / beside) if beside in texts else None)
    features = Features(features)
    return {split: _read(config, Dataset.from_dict, rows, features) for split, rows in columns.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the caption {path} cannot be read: {error}") from error


def _has_split_folders(parts: list[list[str]], config: DataConfig) -> bool:
    """Whether the folders at the top are splits, not classes: "train" alone, or beside one like "test"."""
    tops = {part[0] for part in parts if len(part) > 1}
    held_out = {config.test_split, *HELD_OUT_NAMES} - {config.train_split}
    if config.train_split not in tops or (tops != {config.train_split} and not tops & held_out):
        return False
    others = sorted(tops - held_out - {config.train_split}) + [part[0] for part in parts if len(part) == 1]
    if others:
        splits = ", ".join(sorted(tops - set(others)))
        raise _refusal(
            config, f"beside the folders of splits ({splits}) there is {others[0]!r}: move it away"
        )
    return True


def _files(root: Path, config: DataConfig) -> list[str]:
    """Names of all visible files below `root`, relative to it, sorted. Links are followed."""

    def refuse(error: OSError):  # `os.walk` alone would leave the folder out
        raise _refusal(config, str(error)) from error

    found = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a link that leads nowhere: the scan reports it if it should be an image
        return -1, -1
    return found.st_size, found.st_mtime_ns


def split_names(splits: dict[str, Dataset], config: DataConfig) -> tuple[str, str | None]:
    """The names of the training split and of the held-out split, None if there is no other.

    Raises:
        RunError: a split that the configuration names does not exist, or both are the same.
    """
    found = ", ".join(f"{name} ({len(rows)} images)" for name, rows in splits.items())
    for option, name in (("train_split", config.train_split), ("test_split", config.test_split)):
        if name is not None and name not in splits:
            raise RunError(f"{config.dataset!r} has no split {name!r}, only {found}: set --data.{option}")
    if config.test_split == config.train_split:
        raise RunError(f"--data.test_split and --data.train_split are both {config.test_split!r}")
    others = [name for name in HELD_OUT_NAMES if name in splits and name != config.train_split]
    return config.train_split, config.test_split or next(iter(others), None)
