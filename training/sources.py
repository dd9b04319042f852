"""Where images come from: the Hub, local files or scikit-learn; their splits and columns."""

import hashlib
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from PIL import Image

from training.config import DataConfig

HELD_OUT_NAMES = ("test", "validation", "valid", "val", "dev", "eval", "evaluation", "testing")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_label", "target", "category", "cls")
CLASS_TYPES = re.compile("u?int(8|16|32|64)|bool|(large_)?string")
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)  # not Pillow's own list: asking for it makes Pillow try its rarest formats first
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
FORMS = """\
It may be a Hub id such as uoft-cs/cifar10 (with --data.subset if it has several configurations), a folder of
images (with or without one folder a class, or with the folders train and test), a .parquet, .arrow or .tar
(webdataset) file, a folder of those, a folder written by save_to_disk, or "digits"."""


def load_splits(config: DataConfig) -> tuple[dict[str, Dataset], Any]:
    """Open the data set that `config` names.

    Returns:
        The splits by name, and what identifies their content: JSON values that do not depend on the machine's
        caches. It is the commit for the Hub, and the files' names, sizes and times of change for local files.

    Raises:
        ValueError: it does not exist, cannot be reached or holds no images.
    """
    if config.dataset == "digits":
        return _load_digits()
    path = Path(config.dataset).expanduser()
    try:
        if path.exists():
            return _load_local(path, config), _files_identity(path)
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.dataset) or path.suffix in BUILDERS:
            raise ValueError(f"there is no such file or folder (looked for {path.absolute()})")
        return _load_from_hub(config)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"--data.dataset {config.dataset!r} cannot be loaded: {error}\n{FORMS}") from error


def _load_digits() -> tuple[dict[str, Dataset], Any]:
    from sklearn.datasets import load_digits  # here, because no other data set needs scikit-learn

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    features = {"image": ImageFeature(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    identity = hashlib.sha256(pixels.tobytes() + digits.target.astype("<i8").tobytes()).hexdigest()
    return {"train": Dataset.from_dict(columns, features=Features(features))}, identity


def _load_local(path: Path, config: DataConfig) -> dict[str, Dataset]:
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"a single file must end in {', '.join(BUILDERS)}")
        return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path.absolute()))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        stored = datasets.load_from_disk(str(path))
        return stored if isinstance(stored, DatasetDict) else {"train": stored}
    names = _files(path)
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    tables = [name for name in names if Path(name).suffix in BUILDERS]
    if any(re.fullmatch(r"metadata\.(csv|jsonl|parquet)", Path(name).name) for name in names):
        return datasets.load_dataset(str(path.absolute()), config.subset)  # with the labels of that file
    if tables and images:
        raise ValueError(f"the folder mixes images ({images[0]}) and data files ({tables[0]})")
    if tables:
        return datasets.load_dataset(str(path.absolute()), config.subset)
    if not images:
        found = ", ".join(sorted({Path(name).suffix or "no suffix" for name in names}))
        raise ValueError(f"the folder holds no images (files found: {found or 'none'})")
    return _load_folder(path, images, config)


def _load_folder(root: Path, names: list[str], config: DataConfig) -> dict[str, Dataset]:
    """The images `names` below `root`. Not by datasets' imagefolder, which guesses splits from file names and
    drops what fits none: one "test_shot.jpg" among holiday pictures would become the whole data set."""
    parts = [name.split("/") for name in names]
    depth = 1 if _has_split_folders(parts, config) else 0
    folders = [part[depth] if len(part) > depth + 1 else "" for part in parts]
    classes = sorted(set(folders))
    features = {"image": ImageFeature()}
    if len(classes) > 1 and "" not in classes:
        features["label"] = ClassLabel(names=classes)
    columns: dict[str, dict[str, list]] = defaultdict(lambda: {name: [] for name in features})
    for name, part, folder in zip(names, parts, folders, strict=True):
        split = columns[part[0] if depth else "train"]
        split["image"].append(str(root.absolute() / name))
        if "label" in features:
            split["label"].append(folder)
    features = Features(features)
    return {split: Dataset.from_dict(values, features=features) for split, values in columns.items()}


def _has_split_folders(parts: list[list[str]], config: DataConfig) -> bool:
    """Whether the folders at the top are splits, not classes: "train" alone, or beside one like "test"."""
    tops = {part[0] for part in parts if len(part) > 1}
    held_out = {config.test_split, *HELD_OUT_NAMES} - {config.train_split}
    if config.train_split not in tops or (tops != {config.train_split} and not tops & held_out):
        return False
    others = sorted(tops - held_out - {config.train_split}) + [part[0] for part in parts if len(part) == 1]
    if others:
        splits = ", ".join(sorted(tops - set(others)))
        raise ValueError(f"beside the folders of splits ({splits}) there is {others[0]!r}: move it away")
    return True


def _files(root: Path) -> list[str]:
    """Names of all visible files below `root`, relative to it, sorted."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _files_identity(path: Path) -> list:
    names = [path.name] if path.is_file() else _files(path)
    stats = [((path.parent if path.is_file() else path) / name).stat() for name in names]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]


def _load_from_hub(config: DataConfig) -> tuple[dict[str, Dataset], Any]:
    problem, before = _hub_problem(), datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or problem is not None  # straight to the cache: retries take 20 s
    try:
        builder = datasets.load_dataset_builder(config.dataset, config.subset)
        builder.download_and_prepare()
        identity = [config.dataset, builder.config.name, builder.hash]  # the hash is that of the Hub's commit
        return builder.as_dataset(), identity
    except ConnectionError as error:
        raise ValueError(
            f"it is no local path, the Hub does not answer ({problem or error}), and there is no cached copy"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_problem() -> str | None:
    """Why the Hub cannot be reached, or None: one request without retries."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface_hub
        return f"{type(error).__name__}: {error}"
    return None


def split_names(splits: dict[str, Dataset], config: DataConfig) -> tuple[str, str | None]:
    """The names of the training split and of the held-out split, None if there is no other.

    Raises:
        ValueError: a split that the configuration names does not exist, or both are the same.
    """
    found = ", ".join(f"{name} ({len(rows)} images)" for name, rows in splits.items())
    for option, name in (("train_split", config.train_split), ("test_split", config.test_split)):
        if name is not None and name not in splits:
            raise ValueError(f"{config.dataset!r} has no split {name!r}, only {found}: set --data.{option}")
    if config.test_split == config.train_split:
        raise ValueError(f"--data.test_split and --data.train_split are both {config.test_split!r}")
    others = [name for name in HELD_OUT_NAMES if name in splits and name != config.train_split]
    return config.train_split, config.test_split or next(iter(others), None)


def image_column(features: Features, config: DataConfig) -> str:
    """The column of images: of type Image, else of encoded bytes. ValueError if there is none or several."""
    candidates = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    candidates = candidates or [name for name, feature in features.items() if _is_encoded(feature)]
    chosen = _choose("images", "image_column", config.image_column, candidates, features)
    if chosen is None:
        raise ValueError(f"No column is of type Image or of encoded bytes: {_listing(features)}")
    if not (isinstance(features[chosen], ImageFeature) or _is_encoded(features[chosen])):
        raise ValueError(f"--data.image_column {chosen!r} holds no images: {_listing(features)}")
    return chosen


def label_column(features: Features, config: DataConfig) -> str | None:
    """The column of classes: of type ClassLabel, else with a usual name, else None. ValueError if several."""
    candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    named = [name for name, feature in features.items() if name.lower() in LABEL_NAMES and _is_class(feature)]
    candidates = candidates or named
    chosen = _choose("classes", "label_column", config.label_column, candidates, features)
    if chosen is not None and not (isinstance(features[chosen], ClassLabel) or _is_class(features[chosen])):
        raise ValueError(f"--data.label_column {chosen!r} holds no classes: {_listing(features)}")
    return chosen


def _choose(
    content: str, option: str, wanted: str | None, found: list[str], features: Features
) -> str | None:
    if wanted is not None and wanted not in features:
        raise ValueError(f"There is no column {wanted!r} (--data.{option}), only {_listing(features)}")
    if wanted is None and len(found) > 1:
        raise ValueError(f"Several columns may hold {content}: {', '.join(found)}. Choose by --data.{option}")
    return wanted or next(iter(found), None)


def _listing(features: Features) -> str:
    return ", ".join(f"{name} ({getattr(feature, '_type', 'struct')})" for name, feature in features.items())


def _is_encoded(feature: Any) -> bool:
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _is_class(feature: Any) -> bool:
    return isinstance(feature, Value) and CLASS_TYPES.fullmatch(feature.dtype) is not None


def column_values(rows: Dataset, column: str) -> list:
    """All values of one column, without touching the others."""
    return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()


def class_names(rows: Dataset, column: str) -> list[str]:
    """Names of the classes by number: the column's own, its sorted strings, or numbers up to the largest."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(column_values(rows, column)) - {None}
    if "string" in feature.dtype:
        return sorted(values)
    return [str(number) for number in range(1 + int(max(values, default=-1)))]


def class_numbers(rows: Dataset, column: str, names: list[str], split: str) -> list[int]:
    """The class of every row. ValueError if one is not among `names`."""
    known = {name: number for number, name in enumerate(names)}
    values = [known.get(value, value) for value in column_values(rows, column)]
    wrong = [value for value in values if not isinstance(value, int) or not 0 <= value < len(names)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(values)} labels in column {column!r} of split {split!r} are not among the "
            f"{len(names)} classes, the first is {wrong[0]!r}. Choose another column or split "
            "(--data.label_column, --data.train_split, --data.test_split)."
        )
    return [int(value) for value in values]
