"""The columns of images and of classes in a dataset, and the classes' names."""

import re
import warnings
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from training.config import DataConfig, RunError

LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_label", "target", "category", "cls")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description")
CLASS_TYPES = re.compile("u?int(8|16|32|64)|bool|(large_)?string")
MAX_CLASSES = 100_000


def image_column(features: Features, config: DataConfig, paired: str | None = None) -> str:
    """The column of images: of type Image, else of encoded bytes.

    Args:
        paired: the column of `--denoiser.task`, which is that of images only if no other is.

    Raises:
        RunError: there is none or several, or `paired` holds no images.
    """
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    encoded = [name for name, feature in features.items() if _is_encoded(feature)]
    possible = images + encoded
    if paired is not None and paired not in possible:
        raise RunError(
            f"--denoiser.task column:{paired}: {paired!r} is no column of images; found: {_listing(features)}"
        )
    found = [name for name in images or encoded if name != paired] or possible
    chosen = _choose(features, "image_column", config.image_column, found, possible)
    if chosen is None:
        raise RunError(f"No column is of type Image or of encoded bytes: {_listing(features)}")
    return chosen


def label_column(features: Features, config: DataConfig) -> str | None:
    """The column of classes: of type ClassLabel, else with a usual name, else None.

    Raises:
        RunError: there are several, or one with a usual name holds fractions.
    """
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    possible = classes + [name for name, feature in features.items() if _is_class(feature)]
    usual = [name for name in features if name.lower() in LABEL_NAMES]
    found = classes or [name for name in usual if name in possible]
    chosen = _choose(features, "label_column", config.label_column, found, possible)
    if chosen is None and usual:
        text = f"The column {usual[0]!r} holds no classes (integers or names): {_listing(features)}."
        if "float" in str(getattr(features[usual[0]], "dtype", "")):  # perhaps classes, read as fractions
            raise RunError(
                f"{text} Convert it to integers, choose another column by --data.label_column, or, to train "
                "without classes, remove it (Dataset.remove_columns, then save_to_disk)."
            )
        warnings.warn(f"{text} The model will have no classes (--data.label_column).", stacklevel=2)
    return chosen


def caption_column(features: Features, config: DataConfig) -> str:
    """The column of captions, texts or lists of texts, by its name. RunError if there is none or several."""
    possible = [name for name, feature in features.items() if _is_text(getattr(feature, "feature", feature))]
    found = [name for name in possible if name.lower() in CAPTION_NAMES]
    chosen = _choose(features, "caption_column", config.caption_column, found, possible)
    if chosen is None:
        raise RunError(
            f"--denoiser.text_encoder wants captions, but no column is named {', '.join(CAPTION_NAMES)}: "
            f"{_listing(features)}. Name it by --data.caption_column, or put a .txt file beside each image"
        )
    return chosen


def captions(rows: Dataset, column: str, split: str) -> list[tuple[str, ...]]:
    """The captions of every row, at least one each. RunError if a row has none that is not blank."""
    found = [[value] if isinstance(value, str) else value or [] for value in _column_values(rows, column)]
    found = [tuple(text for text in map(str.strip, filter(None, texts)) if text) for texts in found]
    if empty := [row for row, texts in enumerate(found) if not texts]:
        raise RunError(
            f"{len(empty)} of {len(found)} images of {split!r} have no caption in column {column!r}; the "
            f"first is row {empty[0]}: write captions, leave these images out, or choose another column "
            "(--data.caption_column)"
        )
    return found


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def _choose(
    features: Features, option: str, wanted: str | None, found: list[str], possible: list[str]
) -> str | None:
    """The column `wanted`, which must be among `possible`, else the only one of `found`, or None."""
    content = {"image_column": "images", "label_column": "classes", "caption_column": "captions"}[option]
    if wanted is not None and wanted not in possible:
        raise RunError(f"--data.{option} {wanted!r} is no column of {content}; found: {_listing(features)}")
    if wanted is None and len(found) > 1:
        raise RunError(f"Several columns may hold {content}: {', '.join(found)}. Choose by --data.{option}")
    return wanted or next(iter(found), None)


def _listing(features: Features) -> str:
    kinds = {name: f.dtype if isinstance(f, Value) else type(f).__name__ for name, f in features.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def _is_encoded(feature: Any) -> bool:
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _is_class(feature: Any) -> bool:
    return isinstance(feature, Value) and CLASS_TYPES.fullmatch(feature.dtype) is not None


def _column_values(rows: Dataset, column: str) -> list:
    """All values of one column, without touching the others."""
    return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()


def class_names(rows: Dataset, column: str) -> list[str]:
    """Names of the classes by number: the column's own, its sorted strings, or numbers up to the largest."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(_column_values(rows, column)) - {None}
    named = "string" in feature.dtype
    count = len(values) if named else 1 + int(max(values, default=-1))
    if count > MAX_CLASSES:
        raise RunError(
            f"Column {column!r} makes {count:,} classes, more than {MAX_CLASSES:,}: does it hold identifiers "
            "or texts? Choose another column (--data.label_column)."
        )
    return sorted(values) if named else [str(number) for number in range(count)]


def class_numbers(rows: Dataset, column: str, names: list[str], split: str) -> list[int]:
    """The class of every row. RunError if one is not among `names`."""
    known = {name: number for number, name in enumerate(names)}
    values = [known.get(value, value) for value in _column_values(rows, column)]
    wrong = [value for value in values if not isinstance(value, int) or not 0 <= value < len(names)]
    if wrong:
        raise RunError(
            f"{len(wrong)} of {len(values)} labels in column {column!r} of split {split!r} are not among the "
            f"{len(names)} classes, the first is {wrong[0]!r}. Choose another column or split "
            "(--data.label_column, --data.train_split, --data.test_split)."
        )
    return [int(value) for value in values]
