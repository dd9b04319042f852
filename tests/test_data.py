"""What a user relies on when bringing images: every source loads, every picture is seen right."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from tests.hub_server import HubServer, Refusal, Repository
from training.config import DataConfig
from training.data import sources
from training.data.images import load_images
from training.data.order import StepSampler, batch_indices, batch_slices, seeded_generator
from training.data.scan import Scan, scan
from training.data.transform import transform
from training.evaluation.plots import save_grid

GREYS = [0, 40, 80, 120, 160, 200]  # one image each; those of class "a" come first
CLASSES = ["a", "a", "a", "b", "b", "b"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(grey: int, size=(10, 8)) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, kind, **options)))


def hub_style() -> datasets.Dataset:
    features = datasets.Features({"pic": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    columns = {"pic": [picture(grey) for grey in GREYS], "kind": CLASSES}
    return datasets.Dataset.from_dict(columns, features=features)


def write_folder(root: Path, with_classes: bool = True) -> Path:
    for grey, name in zip(GREYS, CLASSES, strict=True):
        path = root / (name if with_classes else "") / f"test_{grey}.png"  # a file's name makes no split
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(grey).save(path)
    (root / ".hidden.png").write_bytes(b"")
    return root


def write_split_folders(root: Path) -> Path:
    write_folder(root / "train")
    write_folder(root / "test")
    return root


def write_parquet_file(root: Path) -> Path:
    hub_style().to_parquet(root / "pictures.parquet")
    return root / "pictures.parquet"


def write_parquet_folder(root: Path) -> Path:
    for split in ("train", "test"):
        hub_style().to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def write_plain_parquet(root: Path) -> Path:
    images = [{"bytes": encoded(picture(grey)), "path": None} for grey in GREYS]
    table = pyarrow.table({"image": images, "label": [ord(name) - ord("a") for name in CLASSES]})
    pyarrow.parquet.write_table(table, root / "plain.parquet")
    return root / "plain.parquet"


def write_named_classes(root: Path) -> Path:
    table = pyarrow.table({"data": [encoded(picture(grey)) for grey in GREYS], "label": CLASSES})
    pyarrow.parquet.write_table(table, root / "named.parquet")
    return root / "named.parquet"


def write_saved(root: Path) -> Path:
    hub_style().save_to_disk(root / "saved")
    return root / "saved"


def write_saved_splits(root: Path) -> Path:
    datasets.DatasetDict(train=hub_style(), validation=hub_style()).save_to_disk(root / "saved")
    return root / "saved"


def write_arrow_file(root: Path) -> Path:
    return next(write_saved(root).glob("*.arrow"))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_webdataset(root: Path) -> Path:
    members = {}
    for grey, name in zip(GREYS, CLASSES, strict=True):
        members[f"{grey:03}.png"] = encoded(picture(grey))
        members[f"{grey:03}.cls"] = str(ord(name) - ord("a")).encode()
    return write_tar(root / "shard.tar", members)


def write_metadata(root: Path) -> Path:
    for grey in GREYS:
        picture(grey).save(root / f"{grey}.png")
    rows = [f"{grey}.png,{name}" for grey, name in zip(GREYS, CLASSES, strict=True)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    return root


WRITERS = {
    write_folder: ("a", "b"),
    write_split_folders: ("a", "b"),
    write_parquet_file: ("a", "b"),
    write_parquet_folder: ("a", "b"),
    write_plain_parquet: ("0", "1"),
    write_named_classes: ("a", "b"),
    write_saved: ("a", "b"),
    write_saved_splits: ("a", "b"),
    write_arrow_file: ("a", "b"),
    write_webdataset: ("0", "1"),
    write_metadata: ("a", "b"),
}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_source_gives_the_same_images_and_classes(write, tmp_path):
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data")
    data = load_images(DataConfig(dataset=str(path), resolution=8, held_out=0.3))
    two_splits = write in (write_split_folders, write_parquet_folder, write_saved_splits)
    assert (len(data.train), len(data.held_out)) == ((6, 6) if two_splits else (4, 2))
    samples = [split[i, False] for split in (data.train, data.held_out) for i in range(len(split))]
    found = {(round((s["images"].mean().item() + 1) * 127.5), int(s["class_labels"])) for s in samples}
    assert found == {(grey, ord(name) - ord("a")) for grey, name in zip(GREYS, CLASSES, strict=True)}
    assert data.id2label == dict(enumerate(WRITERS[write]))
    assert all(s["images"].shape == (3, 8, 8) and s["images"].dtype == torch.float32 for s in samples)
    assert data.train.labels.tolist() == [int(s["class_labels"]) for s in samples[: len(data.train)]]
    assert scan(data).unreadable == []


def test_a_folder_without_class_folders_has_no_labels(tmp_path):
    data = load_images(DataConfig(dataset=str(write_folder(tmp_path / "data", with_classes=False))))
    assert data.id2label is None and data.train.labels is None and len(data.train) == 5
    assert sorted(data.train[0, False]) == ["images", "indices"]


def test_digits():
    data = load_images(DataConfig(dataset="digits", resolution=8, channels=1))
    found = scan(data)
    assert (len(data.train), len(data.held_out)) == (1707, 90)
    assert list(data.id2label.values()) == list("0123456789")
    images = torch.stack([data.train[i, False]["images"] for i in range(50)])
    assert images.shape == (50, 1, 8, 8) and images.min() == -1 and images.max() == 1
    assert found.modes == {"L": 1797} and sum(found.classes.values()) == 1707
    assert Scan(**asdict(found)) == found


MISTAKES = {
    "split": (dict(train_split="training"), r"training.*train \(6 images\).*test.*--data.train_split"),
    "test split": (dict(test_split="val"), "val.*--data.test_split"),
    "same split": (dict(test_split="train"), "--data.test_split and --data.train_split"),
    "image column": (dict(image_column="img"), r"--data.image_column.*img.*pic \(Image\), kind"),
    "not images": (dict(image_column="kind"), "--data.image_column.*kind"),
    "label column": (dict(label_column="pic"), "--data.label_column.*pic"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_is_named_with_what_there_is(mistake, tmp_path):
    options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        load_images(DataConfig(dataset=str(write_parquet_folder(tmp_path)), **options))


def test_folders_that_are_neither_classes_nor_splits_are_refused(tmp_path):
    write_folder(write_split_folders(tmp_path) / "masks")
    with pytest.raises(ValueError, match="test, train.*masks"):
        load_images(DataConfig(dataset=str(tmp_path)))


def test_missing_paths_and_an_unreachable_hub_end_at_once(tmp_path, monkeypatch):
    for dataset in ("./missing", str(tmp_path / "missing"), "~/missing/pictures", "missing.parquet"):
        with pytest.raises(ValueError, match="(?s)--data.dataset.*no such file or folder.*digits"):
            load_images(DataConfig(dataset=dataset))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_images(DataConfig(dataset=str(tmp_path / "empty")))
    monkeypatch.setattr(sources.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    with pytest.raises(
        ValueError, match="(?s)--data.dataset 'org/pictures'.*Hub does not give it.*refused.*folder"
    ):
        load_images(DataConfig(dataset="org/pictures"))
    assert time.perf_counter() - start < 2


class Proxy(HubServer):
    """A Hub behind a proxy that refuses HEAD for pages; its model repositories pose as datasets."""

    def answer(self, request):
        if request.method == "HEAD" and "/resolve/" not in request.path:
            raise Refusal(405, "Method Not Allowed")
        if request.path.endswith("/data"):  # of the tree: no such folder
            raise Refusal(404, "data does not exist", "EntryNotFound")
        request.path = request.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        return super().answer(request)


def test_a_dataset_of_the_hub_is_downloaded_once_and_then_taken_from_the_cache(tmp_path):
    code = (
        "from training.config import DataConfig; from training.data import images, sources;"
        "load = lambda: images.load_images(DataConfig(dataset='me/pictures', resolution=8));"
        "data = load(); sources.constants.ENDPOINT = 'http://127.0.0.1:9'; again = load();"
        "print(len(data.train), data.id2label, data.fingerprint == again.fingerprint)"
    )
    with Proxy({}) as hub:
        hub.repositories["me/pictures"] = repository = Repository(private=False)
        file = repository.store(write_parquet_file(tmp_path).read_bytes())
        repository.commit("main", "pictures", {"train.parquet": file})
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        env |= {"PYTHONPATH": str(Path(__file__).parents[1])}
        other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert other.stdout.split("\n")[0] == "5 {0: 'a', 1: 'b'} True", other.stderr[-2000:]


def colours(tensor: torch.Tensor) -> list[int]:
    return ((tensor.mean((1, 2)) + 1) * 127.5).round().int().tolist()


def with_palette(transparency: int | None) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    options = {} if transparency is None else {"transparency": transparency}
    return decoded(image, **options)


RED, PINK = (255, 0, 0), (255, 128, 128)
MODES = {
    "1": (Image.new("1", (8, 8), 1), [255, 255, 255]),
    "L": (Image.new("L", (8, 8), 100), [100, 100, 100]),
    "LA": (decoded(Image.new("LA", (8, 8), (0, 0))), [255, 255, 255]),
    "P": (with_palette(None), [255, 0, 0]),
    "P transparent": (with_palette(1), [255, 255, 255]),
    "L transparent": (decoded(Image.new("L", (8, 8), 7), transparency=7), [255, 255, 255]),
    "RGB": (Image.new("RGB", (8, 8), RED), [255, 0, 0]),
    "RGBA": (decoded(Image.new("RGBA", (8, 8), (*RED, 127))), list(PINK)),
    "CMYK": (decoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), [255, 0, 0]),
    "YCbCr": (Image.new("RGB", (8, 8), (90, 90, 90)).convert("YCbCr"), [90, 90, 90]),
    "I;16": (decoded(Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))), [100, 100, 100]),
    "I": (decoded(Image.fromarray(np.full((8, 8), 257 * 100, np.int32)), "TIFF"), [100, 100, 100]),
    "F": (decoded(Image.fromarray(np.full((8, 8), 0.4, np.float32)), "TIFF"), [102, 102, 102]),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_and_grey(mode):
    image, expected = MODES[mode]
    assert image.mode == mode.split()[0]
    rgb, grey = transform(image.copy(), 8, 3, False), transform(image.copy(), 8, 1, False)
    assert colours(rgb) == expected and rgb.min() >= -1 and rgb.max() <= 1
    luma = round(0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2])
    assert abs(colours(grey)[0] - luma) <= 1


def test_deep_grey_values_out_of_range_are_refused():
    for value in (-1.0, 1e6, float("nan")):
        with pytest.raises(ValueError, match="grey values"):
            transform(Image.fromarray(np.full((8, 8), value, np.float32)), 8, 1, False)


def test_a_turned_photograph_stands_upright():
    pixels = np.full((16, 16), 255, np.uint8)
    pixels[:8, :8] = 0  # stored top left; orientation 6 turns it by 90 degrees, to the top right
    exif = Image.Exif()
    exif[0x0112] = 6
    image = transform(decoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95), 2, 1, False)
    assert (image[0] > 0).tolist() == [[True, False], [True, True]]


def test_the_centre_is_cropped_and_native_pixels_are_kept():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 13, 3), np.uint8)
    seen = transform(Image.fromarray(pixels), 8, 3, False)
    expected = torch.from_numpy(pixels[:, 2:10]).permute(2, 0, 1) / 127.5 - 1
    assert (seen - expected).abs().max() < 1e-6
    assert torch.equal(transform(Image.fromarray(pixels), 8, 3, True), seen.flip(-1))
    large = transform(Image.fromarray(pixels).resize((26, 16), Image.Resampling.BOX), 8, 3, True)
    assert torch.equal(large, transform(Image.fromarray(pixels).resize((26, 16), 4), 8, 3, False).flip(-1))


def test_a_large_jpeg_is_decoded_small_without_changing_the_picture():
    ramp = np.broadcast_to(np.linspace(0, 255, 512).astype(np.uint8), (512, 512))
    seen = transform(decoded(Image.fromarray(ramp), "JPEG", quality=95), 16, 1, False)
    exact = transform(Image.fromarray(ramp), 16, 1, False)
    assert (seen - exact).abs().max() < 0.02


def test_the_first_frame_of_an_animation_counts():
    image = decoded(picture(50), "GIF", save_all=True, append_images=[picture(200)])
    assert colours(transform(image, 8, 3, False)) == [50, 50, 50]


def test_unreadable_files_are_reported_and_left_out(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", with_classes=False)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (root / "a_empty.png").write_bytes(b"")
    (root / "b_text.jpg").write_text("not a picture")
    (root / "c_truncated.jpg").write_bytes(encoded(noise, "JPEG")[:-900])
    (root / "d_truncated.png").write_bytes(encoded(noise)[:-900])
    Image.new("1", (4000, 4000)).save(root / "e_bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    data = load_images(DataConfig(dataset=str(root), held_out=0.5))
    order = [data.train.name_of(i) for i in range(len(data.train))]
    found = scan(data)
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in found.unreadable}
    assert len(reasons) == 5 and "empty" in reasons["a_empty.png"] and "no image" in reasons["b_text.jpg"]
    assert "truncated" in reasons["c_truncated.jpg"] and "DecompressionBomb" in reasons["e_bomb.png"]
    text = found.describe()
    assert "5 images cannot be read" in text and str(root / "b_text.jpg") in text
    assert "images are below --data.resolution 32 and will be enlarged" in text and "expect copies" in text
    data.drop(found.unreadable)
    kept = [data.train.name_of(i) for i in range(len(data.train))]
    assert kept == [name for name in order if Path(name).name not in reasons]
    assert scan(data).unreadable == [] and scan(data).counts == found.counts


def test_rows_without_an_image_are_reported(tmp_path):
    table = pyarrow.table({"image": [*(encoded(picture(grey)) for grey in GREYS), None]})
    pyarrow.parquet.write_table(table, tmp_path / "gap.parquet")
    found = scan(load_images(DataConfig(dataset=str(tmp_path / "gap.parquet"), held_out=0.3)))
    assert [entry["name"] for entry in found.unreadable] == ["train[6]"]
    assert "no image" in found.unreadable[0]["reason"] and found.classes is None


def test_a_data_set_without_a_readable_image_is_refused(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="No train image.*--data.dataset.*no image format"):
        scan(load_images(DataConfig(dataset=str(tmp_path))))


def test_the_fingerprint_names_content_and_transform(tmp_path):
    root = write_folder(tmp_path / "data")
    config = DataConfig(dataset=str(root), resolution=8)
    first = load_images(config).fingerprint
    assert load_images(config).fingerprint == first
    assert load_images(DataConfig(dataset=str(root), resolution=4)).fingerprint != first
    assert load_images(DataConfig(dataset=str(root), resolution=8, channels=1)).fingerprint != first
    moved = root.rename(tmp_path / "moved")
    assert load_images(DataConfig(dataset=str(moved), resolution=8)).fingerprint == first
    picture(77).save(moved / "a" / "test_0.png")
    assert load_images(DataConfig(dataset=str(moved), resolution=8)).fingerprint != first


def test_scanned_images_are_known_by_their_bytes_and_classes(tmp_path):
    def found(root: Path) -> str:
        return scan(load_images(DataConfig(dataset=str(root), resolution=8))).fingerprint

    root = write_folder(tmp_path / "data")
    first = found(root)
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # as downloaded again
    for path in copy.rglob("*.png"):
        os.utime(path, (0, 0))
    assert found(copy) == first
    (copy / "a").rename(copy / "c")
    assert found(copy) != first  # other classes
    path = root / CLASSES[0] / f"test_{GREYS[0]}.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert found(root) != first


def test_some_of_the_images_are_always_the_same_and_no_others(tmp_path):
    config = DataConfig(dataset="digits", resolution=8, channels=1)
    whole = load_images(config)
    some = load_images(replace(config, max_images=50))
    assert (len(some.train), len(some.held_out)) == (50, 5) and some.fingerprint != whole.fingerprint
    assert torch.equal(some.train.rows, load_images(replace(config, max_images=50)).train.rows)
    assert set(some.train.rows.tolist()) < set(whole.train.rows.tolist())
    assert set(some.held_out.rows.tolist()) < set(whole.held_out.rows.tolist())
    assert len(load_images(replace(config, max_images=10**6)).held_out) == len(whole.held_out)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (3, 8)])
def test_the_order_is_an_endless_sequence_of_different_permutations(count, batch_size):
    batches = [batch_indices(0, step, batch_size, count) for step in range(30)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    sequence = torch.cat(batches)
    epochs = sequence[: len(sequence) // count * count].view(-1, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    other = [batch_indices(1, step, batch_size, count) for step in range(30)]
    assert not torch.equal(sequence, torch.cat(other))
    start = time.perf_counter()
    batch_indices(0, 10**12, batch_size, count)  # no earlier step is replayed
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 3)])
def test_shares_of_all_processes_make_the_same_global_batches(processes, accumulation):
    whole = list(StepSampler(50, 24, 0, range(6), flips=True))
    shares = [
        list(StepSampler(50, 24, 0, range(2, 6), True, batch_slices(24, rank, processes, accumulation)))
        for rank in range(processes)
    ]
    for number, batch in enumerate(whole[2:]):  # a start at step 2 is the tail of the straight sequence
        parts = [share[number * accumulation + micro] for share in shares for micro in range(accumulation)]
        assert [pair for part in parts for pair in part] == batch
        assert {len(part) for part in parts} == {24 // processes // accumulation}
    assert 0.3 < np.mean([flip for batch in whole for _, flip in batch]) < 0.7
    assert not any(flip for batch in StepSampler(50, 24, 0, range(6)) for _, flip in batch)


def test_generators_depend_on_every_part_of_their_key():
    keys = [(0, "noise", 1), (0, "noise", 2), (1, "noise", 1), (0, "time", 1), (0, "noise1"), (0, 1)]
    drawn = [torch.rand(1, generator=seeded_generator("cpu", *key)).item() for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn[0] == torch.rand(1, generator=seeded_generator("cpu", 0, "noise", 1)).item()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_enlarged(channels, tmp_path):
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, channels, 32, 32)
    save_grid(images, tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == ("L" if channels == 1 else "RGB") and 500 <= grid.width <= 900
        assert np.asarray(grid)[0, 0].max() == 0 and np.asarray(grid)[-1, -1].min() == 255
    assert [path.name for path in tmp_path.glob("*")] == ["grid.png"]
    with pytest.raises(ValueError, match="finite"):
        save_grid(images * float("nan"), tmp_path / "grid.png")
