"""A data set from a stranger runs no code, reads no other files, and loses no image without a word."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fuzz_images import check_refused, encoded, six_images, write_sets, write_tar
from PIL import Image

from training.config import DataConfig
from training.data import sources
from training.data.images import ImageData, load_images
from training.data.scan import scan


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
    """The text of the error that `path` ends in."""
    with pytest.raises(ValueError) as caught:
        load(path, **options)
    check_refused(caught.value, path)
    return str(caught.value)


def write_table(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def reasons(data: ImageData) -> list[str]:
    return [entry["reason"] for entry in scan(data).unreadable]


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
    header = buffer.getvalue()[:-8].replace(b"'<f8'", b"'|O' ")
    return header + trap


def packed_archive(trap: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.npy", packed_array(trap))
    return buffer.getvalue()


def packed_tensor(trap: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", trap)
        file.writestr("archive/version", "3")
    return buffer.getvalue()


PACKED = {
    **dict.fromkeys(("pkl", "pickle", "pyd", "PKL", "json.pkl", "pt", "joblib"), lambda trap: trap),
    "pth": packed_tensor,
    "npy": packed_array,
    "npz": packed_archive,
    "png": lambda trap: trap,
}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("place", [0, 5])
def test_no_pickle_of_an_archive_is_read(suffix, place, folder, trap):
    members = {}
    for number, image in enumerate(six_images()[0]):
        members[f"{number}.jpg"] = image
        if number == place:
            members[f"{number}.{suffix}"] = PACKED[suffix](trap)
    if suffix == "png" or place == 0 or suffix == "npz":
        for number in range(6):
            members.setdefault(f"{number}.{suffix}", PACKED[suffix](trap))
        members = dict(sorted(members.items()))
    path = write_tar(folder / "set.tar", members)
    if suffix == "npz":  # datasets opens it without its content
        with pytest.raises(ValueError):
            load(path)
    elif suffix == "png":
        assert "Several columns" in refused(path)
        with pytest.raises(ValueError, match="no image format"):
            scan(load(path, image_column="png"))
    else:
        assert suffix in refused(path) or "Object arrays cannot be loaded" in refused(path)


def test_the_traps_for_arrays_and_tensors_work(tmp_path):
    fired = tmp_path / "fired"
    content = pickle.dumps(Trap(fired))
    for kind, read in {
        "npy": lambda file: np.load(file, allow_pickle=True),
        "npz": lambda file: np.load(file, allow_pickle=True)["a"],
        "pth": lambda file: torch.load(file, weights_only=False),
    }.items():
        try:
            read(io.BytesIO(PACKED[kind](content)))
        except Exception as error:
            assert fired.exists(), error
        assert fired.exists()
        fired.unlink()


def test_pickles_beside_data_files_are_not_read(folder, trap):
    for path in write_sets(folder)[1:3]:
        path.unlink()
    for name in ("more.pkl", "data.pickle", "set.pt"):
        (folder / name).write_bytes(trap)
        (folder / "saved" / name).write_bytes(trap)
    assert reasons(load(folder / "saved")) == []
    (folder / "saved").rename(folder.parent / "saved")
    assert reasons(load(folder)) == []
    (folder / "set.parquet").unlink()
    assert "holds no images (files found: .pickle, .pkl, .pt)" in refused(folder)


@pytest.mark.parametrize(
    "name", ["arrow.py_extension_type", "datasets.features.features.Array2DExtensionType"]
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_extension_types_unpickle_nothing(name, suffix, folder, trap):
    images, _ = six_images()
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": trap}
    extra = pyarrow.field("extra", pyarrow.binary(), metadata=metadata)
    schema = pyarrow.schema([pyarrow.field("image", pyarrow.binary()), extra])
    table = pyarrow.table({"image": images, "extra": images}, schema=schema)
    path = folder / f"set.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), schema) as writer:
            writer.write_table(table)
    if "Array2D" in name:  # that of datasets reads JSON
        assert "utf-8" in refused(path)
    else:
        assert reasons(load(path, image_column="image")) == []


@pytest.mark.parametrize("kind", ["os.system", "Path", "Trap", "generate_from_dict", "Features"])
def test_features_name_no_code(kind, folder, trap):
    write_sets(folder)
    path = folder / "saved" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["features"]["image"] = {"_type": kind, "command": "true", "obj": {}}
    path.write_text(json.dumps(info))
    assert "damaged" in refused(folder / "saved")


def test_scripts_in_a_folder_are_not_run(folder, tmp_path):
    path = write_sets(folder)[0]
    for other in write_sets(folder)[1:3]:
        other.unlink()
    (folder / "saved").rename(tmp_path / "saved")
    code = f"open({str(tmp_path / 'fired')!r}, 'w')"
    for name in ("dataset.py", "conftest.py", "__init__.py"):
        (path.parent / name).write_text(code)
    assert reasons(load(folder)) == []
    (folder / f"{folder.name}.py").write_text(code)  # where scripts once had to be
    assert "scripts are no longer supported" in refused(folder)
    assert not (tmp_path / "fired").exists()


OUTSIDE = ["/etc/passwd", "../secret.png", "sub/../../secret.png", "file:///etc/passwd", "ABSOLUTE", "COPY"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("form", ["parquet", "arrow", "saved"])
def test_rows_cannot_name_files_outside(path, form, folder, tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(Image.new("RGB", (8, 8), "red")))
    (tmp_path / "setcopy").mkdir()
    (tmp_path / "setcopy" / "secret.png").write_bytes(secret.read_bytes())
    monkeypatch.chdir(tmp_path)
    path = {"ABSOLUTE": str(secret), "COPY": str(folder) + "copy/secret.png"}.get(path, path)
    images, _ = six_images()
    rows = [{"bytes": image, "path": None} for image in images] + [{"bytes": None, "path": path}]
    table = pyarrow.table({"image": rows})
    file = folder / f"set.{'parquet' if form == 'parquet' else 'arrow'}"
    if form == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    if form == "saved":
        state = {"_data_files": [{"filename": file.name}], "_fingerprint": "0", "_format_columns": None}
        state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    (found,) = reasons(load(folder if form == "saved" else file))
    assert "leaves the data set's folder" in found or "No such file" in found and "file:" in path


def test_rows_may_name_files_inside_wherever_the_command_starts(folder, monkeypatch):
    for number, image in enumerate(six_images()[0]):
        (folder / f"{number}.png").write_bytes(image)
    paths = [f"{n}.png" if n % 2 else str(folder / f"{n}.png") for n in range(6)]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    rows = pyarrow.array([{"bytes": None, "path": name} for name in paths], kind)
    path = write_table(folder / "set.parquet", image=rows)
    monkeypatch.chdir("/")
    assert reasons(load(path)) == []


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "file:///etc/passwd"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_metadata_cannot_name_files_outside(name, form, folder):
    (folder.parent / "secret.png").write_bytes(encoded(Image.new("RGB", (8, 8), "red")))
    names = [f"{n}.png" for n in range(6)]
    for file, image in zip(names, six_images()[0], strict=True):
        (folder / file).write_bytes(image)
    lines = ["file_name", *names] if form == "csv" else [json.dumps({"file_name": n}) for n in names]
    (folder / f"metadata.{form}").write_text("\n".join(lines))
    assert reasons(load(folder)) == []
    lines.append(name if form == "csv" else json.dumps({"file_name": name}))
    (folder / f"metadata.{form}").write_text("\n".join(lines))
    try:
        found = reasons(load(folder))
    except ValueError as error:
        check_refused(error, name)
        found = [str(error)]
    assert any("leaves the data set" in reason or "Invalid metadata file_name" in reason for reason in found)


def test_images_that_metadata_does_not_name_are_counted(folder):
    for number, image in enumerate(six_images()[0]):
        (folder / f"{number}.png").write_bytes(image)
    (folder / "metadata.csv").write_text("file_name\n0.png\n1.png\n2.png\n")
    with pytest.warns(UserWarning, match="3 of 6 images are in no metadata file"):
        assert reasons(load(folder)) == []


def test_a_card_cannot_name_files_outside(folder, tmp_path):
    write_table(tmp_path / "secret.parquet", image=six_images()[0])
    write_table(folder / "set.parquet", image=six_images()[0])
    card = "---\nconfigs:\n- config_name: default\n  data_files: ../secret.parquet\n---\n"
    (folder / "README.md").write_text(card)
    assert "outside its folder" in refused(folder)


def test_a_saved_set_cannot_name_files_outside(folder, tmp_path):
    (tmp_path / "other").mkdir()
    write_sets(tmp_path / "other")
    write_sets(folder)
    path = folder / "saved" / "state.json"
    state = json.loads(path.read_text())
    state["_data_files"][0]["filename"] = "../../other/set.arrow"
    path.write_text(json.dumps(state))
    assert "outside its folder" in refused(folder / "saved")


@pytest.mark.parametrize("prefix", ["", "sub/", "../", "/", "./"])
def test_an_archive_gives_its_own_images_whatever_their_names(prefix, folder, tmp_path, monkeypatch):
    work = tmp_path / "work" / "deep"
    (work / "sub").mkdir(parents=True)
    monkeypatch.chdir(work)
    stem = str(work / "sub") + "/" if prefix == "/" else prefix
    for number in range(6):  # what datasets alone would read instead
        Image.new("RGB", (8, 8), "white").save(f"{stem}{number}.png")
    black = encoded(Image.new("RGB", (8, 8)))
    data = load(write_tar(folder / "set.tar", {f"{stem}{number}.png": black for number in range(6)}))
    assert reasons(data) == []
    assert all(data.train[i, False]["images"].max() == -1 for i in range(len(data.train)))


def test_links_in_an_archive_are_refused(folder):
    path = write_tar(folder / "set.tar", {f"{n}.png": image for n, image in enumerate(six_images()[0])})
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo("7.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    assert "7.png" in refused(path)


def test_archives_joined_without_their_ends_removed_are_refused(folder):
    path = write_tar(folder / "set.tar", {f"{n}.png": image for n, image in enumerate(six_images()[0])})
    path.write_bytes(path.read_bytes() * 2)
    assert "cut off or damaged" in refused(path)


def test_a_broken_offset_in_a_saved_set_is_no_crash(folder):
    path = next((write_sets(folder)[0].parent / "saved").glob("*.arrow"))
    sizes = np.cumsum([0] + [len(image) for image in six_images()[0]]).astype("<i4").tobytes()
    content = path.read_bytes()
    assert content.count(sizes) == 1
    wrong = np.frombuffer(sizes, "<i4").copy()
    wrong[3] = 2**31 - 1
    path.write_bytes(content.replace(sizes, wrong.tobytes()))
    assert "offset" in refused(folder / "saved").lower()


def test_data_files_that_no_split_takes_are_named(folder):
    for name in ("train-0.parquet", "test-0.parquet", "more.parquet"):
        write_table(folder / name, image=six_images()[0])
    assert "more.parquet" in refused(folder)
    (folder / "more.parquet").rename(folder / "more.arrow")
    assert "several kinds" in refused(folder) or "ARROW" in refused(folder).upper()


IMAGES = six_images()[0]
COLUMNS = {
    "no images": (dict(text=["a"] * 6), {}, "No column is of type Image"),
    "no rows": (dict(image=pyarrow.array([], pyarrow.binary())), {}, "set.parquet: it has no rows"),
    "one row": (dict(image=IMAGES[:1]), {}, "too few to hold out"),
    "two images": (dict(image=IMAGES, thumb=IMAGES), {}, "image, thumb.*--data.image_column"),
    "two labels": (dict(image=IMAGES, label=[0] * 6, cls=[0] * 6), {}, "label, cls.*--data.label_column"),
    "no label": (dict(image=IMAGES, label=[0, 1, None] * 2), {}, "2 of 6 labels.*None"),
    "only none": (dict(image=IMAGES, label=pyarrow.nulls(6, pyarrow.int64())), {}, "6 of 6 labels.*None"),
    "no name": (dict(image=IMAGES, label=["a", "b", None] * 2), {}, "2 of 6 labels.*None"),
    "negative": (dict(image=IMAGES, label=[0, 1, -1] * 2), {}, "2 of 6 labels.*-1"),
    "all negative": (dict(image=IMAGES, label=[-1] * 6), {}, "6 of 6 labels.*-1"),
    "identifiers": (dict(image=IMAGES, label=[4_000_000_000] * 6), {}, "4,000,000,001 classes.*label_column"),
    "float": (dict(image=IMAGES, label=[0.5] * 6), dict(label_column="label"), "holds no classes.*float64"),
    "lists": (dict(image=IMAGES, label=[[0]] * 6), dict(label_column="label"), "holds no classes"),
    "no column": (dict(image=IMAGES), dict(label_column="label"), "no column 'label'"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_do_not_fit_are_named(case, folder):
    columns, options, message = COLUMNS[case]
    path = write_table(folder / "set.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        load(path, **options)


@pytest.mark.parametrize("labels", [[0.0, 1.0] * 3, [[0], [1]] * 3])
def test_a_label_column_without_classes_is_not_passed_over_in_silence(labels, folder):
    path = write_table(folder / "set.parquet", image=IMAGES, label=labels)
    with pytest.warns(UserWarning, match="'label' holds no classes"):
        assert load(path).id2label is None


def test_rows_of_strange_types_are_reported(folder):
    rows = [{"bytes": image, "path": 5} for image in IMAGES] + [{"bytes": None, "path": 5}, None]
    found = reasons(load(write_table(folder / "set.parquet", image=rows)))
    assert len(found) == 2 and all("no image" in reason for reason in found)


def test_a_stored_format_changes_nothing(folder):
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "label": [0, 1] * 3}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for kind in ("torch", "numpy"):
        stored = datasets.Dataset.from_dict(rows, features=features).with_format(kind)
        stored.save_to_disk(folder / kind)
        data = load(folder / kind)
        assert reasons(data) == [] and data.id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "tar"])
def test_a_file_that_is_something_else_or_has_a_strange_name(suffix, folder):
    for name, content in {"empty": b"", "text": b"hello" * 100, "zip": packed_archive(b"")}.items():
        (folder / f"{name}.{suffix}").write_bytes(content)
        assert f"{name}.{suffix}" in refused(folder / f"{name}.{suffix}")
    write_sets(folder)
    for name in ("a b.", "[1].", "*.", "ä☃.", "{x}."):
        path = (folder / f"set.{suffix}").rename(folder / (name + suffix))
        assert reasons(load(path)) == [], name
        path.rename(folder / f"set.{suffix}")
    assert "a::b" in refused((folder / f"set.{suffix}").rename(folder / f"a::b.{suffix}"))  # not by datasets


def test_a_pipe_is_no_data_set(folder):
    os.mkfifo(folder / "set.tar")
    assert "any data files" in refused(folder)
    assert "set.tar" in refused(folder / "set.tar")


def write_packed(path: Path, trap: bytes) -> Path:
    """An archive of six images, each with a tensor that a pickle makes up."""
    images = six_images()[0]
    members = {f"{n}.png": image for n, image in enumerate(images)}
    members |= {f"{n}.pth": packed_tensor(trap) for n in range(6)}
    return write_tar(path, dict(sorted(members.items())))


@pytest.mark.parametrize("place", ["b.tar.gz", ".hidden/b.tar", "b.TAR"])
def test_no_archive_of_a_folder_escapes_the_search_for_pickles(place, folder, tmp_path, trap):
    write_tar(folder / "a.tar", {f"{n}.png": image for n, image in enumerate(IMAGES)})
    content = write_packed(tmp_path / "b.tar", trap).read_bytes()
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(gzip.compress(content) if place.endswith("gz") else content)
    if place.startswith("."):  # datasets reads it where a card says so
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n"
        (folder / "README.md").write_text(card)
    assert f"{Path(place).name}" in refused(folder)


def test_a_card_cannot_put_an_archive_in_the_place_of_images(folder, trap):
    for number, image in enumerate(IMAGES):
        (folder / f"{number}.png").write_bytes(image)
    (folder / "metadata.csv").write_text("file_name\n" + "".join(f"{n}.png\n" for n in range(6)))
    write_packed(folder / "b.tar", trap)
    card = "---\nconfigs:\n- config_name: default\n  data_files: b.tar\n---\n"
    (folder / "README.md").write_text(card)
    assert "instead of the images" in refused(folder) and "b.tar" in refused(folder)


def test_archives_that_are_not_searched_beforehand_stay_packed(folder, trap):
    path = write_packed(folder / "b.tar", trap)  # as one of the Hub: it is read as it comes
    rows = sources._prepare(datasets.load_dataset_builder("webdataset", data_files=str(path)))["train"]
    assert rows[0]["pth"] == packed_tensor(trap)


@pytest.mark.parametrize("name", [".data.arrow", "data.bin", ".hidden/data.arrow"])
def test_a_saved_set_cannot_hide_its_data_from_the_checks(name, folder):
    write_sets(folder)
    saved = folder / "saved"
    path = next(saved.glob("*.arrow"))
    (saved / name).parent.mkdir(exist_ok=True)
    sizes = np.cumsum([0] + [len(image) for image in IMAGES]).astype("<i4")
    wrong = np.full(7, 2**30, "<i4").tobytes()  # to look there would end the process by a signal
    (saved / name).write_bytes(path.read_bytes().replace(sizes.tobytes(), wrong))
    path.unlink()
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (saved / "state.json").write_text(json.dumps(state))
    assert Path(name).name in refused(saved)


def test_other_files_in_the_place_of_data_files_are_named(folder):
    write_table(folder / "set.parquet", image=IMAGES)
    for name in ("a.txt", "b.txt"):  # datasets takes the commonest kind
        (folder / name).write_text("hello")
    assert "a.txt" in refused(folder) and "data file itself" in refused(folder)
    assert reasons(load(folder / "set.parquet")) == []


@pytest.mark.parametrize("column", ["image", "label"])
def test_columns_of_the_same_name_are_refused(column, folder):
    table = pyarrow.table({"image": IMAGES, "label": [0, 1] * 3})
    table = table.append_column(column, table[column])
    pyarrow.parquet.write_table(table, folder / "set.parquet")
    assert column in refused(folder / "set.parquet")
