"""Which column of a data set holds the images, which the classes, and what these are."""

import re
import warnings
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from training.config import DataConfig

LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_label", "target", "category", "cls")
CLASS_TYPES = re.compile("u?int(8|16|32|64)|bool|(large_)?string")
MAX_CLASSES = 100_000


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
    if chosen is None and (unused := [name for name in features if name.lower() in LABEL_NAMES]):
        text = f"The column {unused[0]!r} holds no classes (wanted: integers or names) and is not used"
        warnings.warn(f"{text}: {_listing(features)}", stacklevel=2)
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
    kinds = {name: getattr(feature, "_type", "struct") for name, feature in features.items()}
    kinds |= {name: feature.dtype for name, feature in features.items() if isinstance(feature, Value)}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


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
    named = "string" in feature.dtype
    count = len(values) if named else 1 + int(max(values, default=-1))
    if count > MAX_CLASSES:
        raise ValueError(
            f"Column {column!r} makes {count:,} classes, more than {MAX_CLASSES:,}: is it another kind of "
            "number or text? Choose another column (--data.label_column)."
        )
    return sorted(values) if named else [str(number) for number in range(count)]


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
