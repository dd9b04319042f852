"""A dataset from a stranger runs no code and reads no other files; what does not fit is named."""

import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fuzz_images import encoded, noise
from PIL import Image
from test_data import (
    write_arrow_file,
    write_metadata,
    write_parquet_file,
    write_saved,
    write_tar,
    write_webdataset,
)

from training.config import DataConfig, RunError
from training.data.images import ImageData, load_images
from training.data.scan import scan

RNG = np.random.default_rng(0)
IMAGES = [encoded(noise("RGB", (24, 24), RNG)) for _ in range(6)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def load(path: Path, **options) -> ImageData:
    return load_images(DataConfig(dataset=str(path), resolution=8, held_out=0.3, **options))


def refused(path: Path, **options) -> str:
    """The message of the RunError in which `path` ends."""
    with pytest.raises(RunError) as caught:
        load(path, **options)
    return str(caught.value)


def reasons(data: ImageData) -> list[str]:
    return [entry["reason"] for entry in scan(data).unreadable]


def write_table(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    path = tmp_path / "fired"
    content = pickle.dumps(Trap(path))
    pickle.loads(content)
    assert path.exists()  # the trap works
    path.unlink()
    yield content
    assert not path.exists()


def packed_array(trap: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1))
    return buffer.getvalue()[:-8].replace(b"'<f8'", b"'|O' ") + trap


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "pth", "json.pkl", "npy"])
def test_no_pickle_of_an_archive_is_read(suffix, folder, trap):
    members = {f"{number}.png": image for number, image in enumerate(IMAGES)}
    members |= {f"{number}.{suffix}": packed_array(trap) if suffix == "npy" else trap for number in range(6)}
    path = write_tar(folder / "set.tar", dict(sorted(members.items())))
    if suffix == "npy":
        assert "Object arrays cannot be loaded" in refused(path)
    else:
        assert reasons(load(path)) == []


def test_pickles_and_scripts_beside_data_files_are_left_alone(folder, trap, tmp_path):
    write_table(folder / "set.parquet", image=IMAGES)
    (folder / "data.pickle").write_bytes(trap)
    (folder / "dataset.py").write_text(f"open({str(tmp_path / 'fired')!r}, 'w')")
    assert reasons(load(folder)) == []
    (folder / "set.parquet").unlink()
    assert "holds no images (files found: .pickle (1), .py (1))" in refused(folder)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "sub/../../secret.png", "COPY"])
def test_rows_cannot_name_files_outside(path, folder, tmp_path, monkeypatch):
    for secret in (tmp_path / "secret.png", tmp_path / "setcopy" / "secret.png"):
        secret.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(secret)
    monkeypatch.chdir(tmp_path)
    path = str(folder) + "copy/secret.png" if path == "COPY" else path
    rows = [{"bytes": image, "path": None} for image in IMAGES] + [{"bytes": None, "path": path}]
    (found,) = reasons(load(write_table(folder / "set.parquet", image=rows)))
    assert "leaves the dataset's folder" in found


def test_rows_may_name_files_inside_wherever_the_command_starts(folder, monkeypatch):
    for number, image in enumerate(IMAGES):
        (folder / f"{number}.png").write_bytes(image)
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    paths = [f"{n}.png" if n % 2 else str(folder / f"{n}.png") for n in range(6)]
    rows = pyarrow.array([{"bytes": None, "path": name} for name in paths], kind)
    path = write_table(folder / "set.parquet", image=rows)
    monkeypatch.chdir("/")
    assert reasons(load(path)) == []


def test_descriptions_cannot_name_files_outside(folder, tmp_path):
    write_table(tmp_path / "secret.parquet", image=IMAGES)
    write_table(folder / "set.parquet", image=IMAGES)
    card = "---\nconfigs:\n- config_name: default\n  data_files: ../secret.parquet\n---\n"
    (folder / "README.md").write_text(card)
    assert "outside its folder" in refused(folder)
    (tmp_path / "other").mkdir()
    other, saved = write_arrow_file(tmp_path / "other"), write_saved(folder)
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"][0]["filename"] = f"../../other/saved/{other.name}"
    (saved / "state.json").write_text(json.dumps(state))
    assert "outside its folder" in refused(saved)


def test_metadata_cannot_name_files_outside(folder):
    (folder.parent / "secret.png").write_bytes(IMAGES[0])
    write_metadata(folder)
    with open(folder / "metadata.csv", "a") as file:
        file.write("\n../secret.png,a")
    try:
        found = reasons(load(folder))
    except RunError as error:
        found = [str(error)]
    assert any("leaves the dataset" in reason or "Invalid metadata file_name" in reason for reason in found)


@pytest.mark.parametrize("write", [write_parquet_file, write_arrow_file, write_webdataset, write_saved])
def test_damaged_files_are_refused_with_the_cause(write, folder):
    path = write(folder)
    for file in [path] if path.is_file() else path.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:700])
    message = refused(path)
    assert f"--data.dataset {str(path)!r} cannot be loaded" in message and "It may be a Hub id" in message


def test_names_with_the_marks_of_patterns_are_names(folder):
    for name in ("[1].parquet", "*.parquet", "a b.parquet"):
        assert reasons(load(write_table(folder / name, image=IMAGES))) == []


COLUMNS = {
    "no images": (dict(text=["a"] * 6), {}, "No column is of type Image"),
    "one row": (dict(image=IMAGES[:1]), {}, "too few to hold out"),
    "two images": (dict(image=IMAGES, thumb=IMAGES), {}, "image, thumb.*--data.image_column"),
    "two labels": (dict(image=IMAGES, label=[0] * 6, cls=[0] * 6), {}, "label, cls.*--data.label_column"),
    "no label": (dict(image=IMAGES, label=[0, 1, None] * 2), {}, "2 of 6 labels.*None"),
    "negative": (dict(image=IMAGES, label=[0, 1, -1] * 2), {}, "2 of 6 labels.*-1"),
    "identifiers": (dict(image=IMAGES, label=[4_000_000_000] * 6), {}, "4,000,000,001 classes.*label_column"),
    "fractions": (dict(image=IMAGES, label=[0.5] * 6), {}, r"label \(float64\).*--data.label_column"),
    "asked for": (
        dict(image=IMAGES, size=[0.5] * 6),
        dict(label_column="size"),
        r"no.*classes.*size \(float64",
    ),
    "lists": (dict(image=IMAGES, label=[[0]] * 6), dict(label_column="label"), "no column of classes"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_do_not_fit_are_named(case, folder):
    columns, options, message = COLUMNS[case]
    with pytest.raises(RunError, match=message):
        load(write_table(folder / "set.parquet", **columns), **options)


def test_a_column_of_labels_that_are_no_classes_is_not_passed_over_in_silence(folder):
    path = write_table(folder / "set.parquet", image=IMAGES, labels=[[0], [1]] * 3)
    with pytest.warns(UserWarning, match="'labels' holds no classes.*will have no classes"):
        assert load(path).id2label is None


def test_a_stored_format_changes_nothing(folder):
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "label": [0, 1] * 3}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    stored = datasets.Dataset.from_dict(rows, features=features).with_format("torch")
    stored.save_to_disk(folder / "saved")
    data = load(folder / "saved")
    assert reasons(data) == [] and data.id2label == {0: "a", 1: "b"}
