"""Where images come from: the Hub, local files or scikit-learn; their splits."""

import glob
import hashlib
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from PIL import Image

from training.config import DataConfig
from training.data.data_files import PICKLES, check_data_files, check_inside

HELD_OUT_NAMES = ("test", "validation", "valid", "val", "dev", "eval", "evaluation", "testing")
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
            identity = _files_identity(path)
            return _load_local(path, config), identity
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.dataset) or path.suffix in BUILDERS:
            raise ValueError(f"there is no such file or folder (looked for {path.absolute()})")
        return _load_from_hub(config)
    except Exception as error:  # datasets, pyarrow and tarfile raise nearly every kind on broken files
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        kind = "" if type(cause) is ValueError else f"{type(cause).__name__}: "
        raise ValueError(
            f"--data.dataset {config.dataset!r} cannot be loaded: {kind}{cause}\n{FORMS}"
        ) from error


def _load_digits() -> tuple[dict[str, Dataset], Any]:
    from sklearn.datasets import load_digits  # here, because no other data set needs scikit-learn

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    features = {"image": ImageFeature(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    identity = hashlib.sha256(pixels.tobytes() + digits.target.astype("<i8").tobytes()).hexdigest()
    return {"train": Dataset.from_dict(columns, features=Features(features))}, identity


def _load_local(path: Path, config: DataConfig) -> dict[str, Dataset]:
    if not path.is_dir():
        if path.suffix not in BUILDERS:
            raise ValueError(f"a single file must end in {', '.join(BUILDERS)}")
        name = glob.escape(str(path.absolute()))
        return _prepare(datasets.load_dataset_builder(BUILDERS[path.suffix], data_files=name), [path])
    names = _files(path)
    tables = [name for name in names if Path(name).suffix.lower() in BUILDERS]
    if odd := [name for name in tables if Path(name).suffix not in BUILDERS]:
        raise ValueError(f"datasets would pass over {odd[0]}: write its suffix in small letters")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        check_data_files([path / name for name in tables])
        return _load_saved(path, tables, config)
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    described = any(re.fullmatch(r"metadata\.(csv|jsonl|parquet)", Path(name).name) for name in names)
    if described and (images or not tables):
        return _load_described(path, images, config)  # with the labels of that file
    if tables and images:
        raise ValueError(f"the folder mixes images ({images[0]}) and data files ({tables[0]})")
    if tables:
        return _load_tables(path, tables, config)
    if not images:
        found = ", ".join(sorted({Path(name).suffix or "no suffix" for name in names}))
        raise ValueError(f"the folder holds no images (files found: {found or 'none'})")
    _warn_of_others(names)
    return _load_folder(path, images, config)


def _warn_of_others(names: list[str]) -> None:
    suffixes = Counter(Path(name).suffix.lower() for name in names)
    if others := {suffix: count for suffix, count in suffixes.items() if suffix not in IMAGE_SUFFIXES}:
        found = ", ".join(f"{suffix or 'no suffix'} ({others[suffix]:,})" for suffix in sorted(others)[:10])
        text = f"{sum(others.values()):,} files are no images by their suffix and left out: {found}"
        warnings.warn(text, stacklevel=2)


def _load_saved(path: Path, tables: list[str], config: DataConfig) -> dict[str, Dataset]:
    try:
        stored = datasets.load_from_disk(str(path))
    except Exception as error:  # of json, pyarrow or datasets; few name the file
        raise ValueError(
            f"the folder by save_to_disk is damaged ({type(error).__name__}: {error})"
        ) from error
    splits = dict(stored) if isinstance(stored, DatasetDict) else {"train": stored}
    used = [file["filename"] for rows in splits.values() for file in rows.cache_files]
    _check_used(used, path, tables, config)
    return splits


def _load_tables(path: Path, tables: list[str], config: DataConfig) -> dict[str, Dataset]:
    if len(kinds := {Path(name).suffix for name in tables}) > 1:
        raise ValueError(f"the folder mixes data files of several kinds: {', '.join(sorted(kinds))}")
    builder = datasets.load_dataset_builder(str(path.absolute()), config.subset)
    lost = _check_used(_used_files(builder), path, tables, config)
    card = path / "README.md"
    chosen = card.exists() and "configs:" in card.read_text("utf-8", errors="replace")
    if lost and not chosen:
        raise ValueError(
            f"{len(lost)} of {len(tables)} data files belong to no split, the first is {lost[0]}, while "
            "others have the name of one: name them all like train-0.parquet and test-0.parquet, or none"
        )
    return _prepare(builder, [path / name for name in tables])


def _used_files(builder: datasets.DatasetBuilder) -> list[str]:
    return [name for names in builder.config.data_files.values() for name in names]


def _check_used(files: Iterable[str], path: Path, listed: list[str], config: DataConfig) -> list[str]:
    """Those of `listed` that are not among `files`, which datasets reads; ValueError if it reads others."""
    files = list(files)
    check_inside(files, config)
    used = {os.path.abspath(name) for name in files}
    places = {os.path.abspath(folder / name): name for folder in (path, path.resolve()) for name in listed}
    if others := sorted(used - places.keys()):  # hidden, or of a form that `check_data_files` does not know
        raise ValueError(
            f"datasets would read {os.path.basename(others[0])}, which is no visible file with the suffix "
            f"{', '.join(BUILDERS)}: move it away, or set --data.dataset to the data file itself"
        )
    return sorted(set(listed) - {places[name] for name in used})


def _load_described(path: Path, images: list[str], config: DataConfig) -> dict[str, Dataset]:
    builder = datasets.load_dataset_builder(str(path.absolute()), config.subset)
    check_inside(used := _used_files(builder), config)
    if not isinstance(builder, ImageFolder):
        raise ValueError(
            f"instead of the images and their metadata file datasets would read {os.path.basename(used[0])}: "
            "move it away, or correct README.md"
        )
    splits = _prepare(builder)
    lost = len(images) - sum(len(rows) for rows in splits.values())
    if lost > 0:
        warnings.warn(
            f"{lost:,} of {len(images):,} images are in no metadata file and left out", stacklevel=2
        )
    return splits


def _prepare(builder: datasets.DatasetBuilder, files: Iterable[Path] = ()) -> dict[str, Dataset]:
    """Find the builder's Arrow files, or check `files` and make them of these, and open them."""
    if not os.path.exists(builder.cache_dir):
        check_data_files(files)
    if hasattr(builder, "DECODERS"):  # webdataset's; archives of the Hub are not looked through beforehand
        kept = {suffix: read for suffix, read in builder.DECODERS.items() if suffix not in PICKLES}
        type(builder).DECODERS = kept
    generate = getattr(builder, "_generate_examples", None)
    if generate is not None:
        builder._generate_examples = lambda **options: _with_own_bytes(generate(**options))
    builder.download_and_prepare()
    return builder.as_dataset()


def _with_own_bytes(examples: Iterable[tuple[Any, dict]]) -> Iterator[tuple[Any, dict]]:
    """The examples of an archive, so that datasets does not replace an image by the file that has the same
    name where the command was started (`encode_example` of its feature Image does)."""
    for key, example in examples:
        for value in example.values():
            if isinstance(value, dict) and value.keys() == {"path", "bytes"} and value["bytes"] is not None:
                value["path"] = None if os.path.isfile(str(value["path"])) else value["path"]
        yield key, example


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
    for name in names:
        if not name.isascii() and name != os.fsencode(name).decode(errors="replace"):
            raise ValueError(f"the name of {name!r} is not UTF-8: rename it")
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
    """Names of all visible files below `root`, relative to it, sorted. Links are followed."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in filter(os.path.islink, (os.path.join(folder, name) for name in folders)):
            if Path(folder).resolve().is_relative_to(os.path.realpath(link)):
                raise ValueError(f"the link {link} leads back to a folder that holds it: remove it")
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error  # `os.walk` itself would leave the folder out


def _files_identity(path: Path) -> list:
    names = _files(path) if path.is_dir() else [path.name]
    folder = path if path.is_dir() else path.parent
    return [[name, *_size_and_time(folder / name)] for name in names]


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a link that leads nowhere: the scan reports it if it should be an image
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _load_from_hub(config: DataConfig) -> tuple[dict[str, Dataset], Any]:
    problem, before = _hub_problem(), datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or problem is not None  # straight to the cache: retries take 20 s
    try:
        builder = datasets.load_dataset_builder(config.dataset, config.subset)
        splits = _prepare(builder)
        identity = [config.dataset, builder.config.name, builder.hash]  # the hash is that of the Hub's commit
        return splits, identity
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
