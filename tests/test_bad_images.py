"""No image stops a run without a word: it is used, or the scan names it and says why not."""

import functools
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from fuzz_images import EPS, good_images, noise, unusable_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torch._utils import ExceptionWrapper

import training.data.scan
from training.config import DataConfig, RunError
from training.data.images import ImageData, ImageDataset, load_images
from training.data.scan import Scan, _Inspection, scan
from training.data.transform import transform

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")  # Pillow's, about the damage
    for text in ("Image size", "Corrupt EXIF", "Truncated File", "Tag data", "Metadata Warning")
]
GOOD = [content for _, content in good_images(np.random.default_rng(0))]


def load(folder: Path, good: int = 4, **options) -> ImageData:
    """The images of `folder` after so many sound ones were added."""
    for number in range(good):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"good {number}.png")
    return load_images(DataConfig(dataset=str(folder), resolution=16, held_out=0.3, **options))


def reported(data: ImageData) -> dict[str, str]:
    return {Path(entry["name"]).name: entry["reason"] for entry in scan(data).unreadable}


def test_images_of_every_format_are_used_and_unusable_ones_reported(tmp_path):
    for number, content in enumerate(GOOD):
        (tmp_path / f"{number} sound.png").write_bytes(content)
    bad = list(unusable_images())
    for number, (kind, content) in enumerate(bad):
        (tmp_path / f"{number} {kind}.png").write_bytes(content)
    reasons = reported(load(tmp_path))
    assert sorted(reasons) == sorted(f"{number} {kind}.png" for number, (kind, _) in enumerate(bad))
    assert re.search("10000x10000.*pixels.*smaller", reasons[f"{len(bad) - 1} huge.png"])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0.01, 1),
    st.sampled_from([1, 3]),
)
def test_a_damaged_image_is_used_or_reported(content, edits, kept, channels):
    content = bytearray(content)
    for place, value in edits:
        content[int(place * len(content))] = value
    stored = [{"image": {"bytes": bytes(content[: int(kept * len(content))]), "path": None}}]
    split = ImageDataset(stored, "image", None, "train", 8, channels)
    found = _Inspection(split)[0]
    if isinstance(found, str):
        assert " at 0x" not in found
    else:
        image = split[0, False]["images"]
        assert image.shape == (channels, 8, 8) and image.isfinite().all() and image.abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV", "LAB", "RGBX", "I;16B"])
def test_rare_modes_become_pixels(mode, channels):
    image = transform(Image.new(mode, (20, 16)), 16, channels, False)
    assert image.shape == (channels, 16, 16) and -1 <= image.min() <= image.max() <= 1


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_the_centre_of_an_extreme_shape_is_shown(size):
    picture = Image.new("RGB", size, "blue")
    middle = [side // 2 for side in size]
    picture.paste("red", (middle[0] - 5, middle[1] - 5, middle[0] + 5, middle[1] + 5))
    image = transform(picture, 16, 3, False)
    assert image[0].min() > 0.9 and image[2].max() < -0.9


def test_a_photograph_of_many_pixels_is_used_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    Image.new("RGB", (250, 250), "red").save(tmp_path / "photo.jpg")
    Image.new("RGB", (250, 250), "red").save(tmp_path / "drawing.png")
    assert list(reported(load(tmp_path))) == ["drawing.png"]


def test_links_are_followed_and_hidden_files_left_out(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / ".cache").mkdir(parents=True)
    (folder / ".cache" / "old.png").write_bytes(b"")
    elsewhere.mkdir()
    noise("RGB", (9, 9), np.random.default_rng(0)).save(elsewhere / "mine.png")
    (folder / "linked.png").symlink_to(elsewhere / "mine.png")
    (folder / "dangling.png").symlink_to(elsewhere / "gone.png")
    data = load(folder)
    assert list(reported(data)) == ["dangling.png"]
    names = [Path(split.name_of(i)).name for split in (data.train, data.held_out) for i in range(len(split))]
    assert sorted(names) == ["dangling.png", *(f"good {n}.png" for n in range(4)), "linked.png"]


def test_files_that_are_no_images_by_their_name_are_counted(tmp_path):
    for name in ("photo.heic", "photo2.heic", "notes"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"3 files are no images.*\.heic \(2\), no suffix \(1\)"):
        load(tmp_path)


def test_one_class_folder_is_no_class(tmp_path):
    (tmp_path / "only").mkdir()
    load(tmp_path / "only")
    data = load_images(DataConfig(dataset=str(tmp_path), held_out=0.3))
    assert data.id2label is None and len(data.train) + len(data.held_out) == 4


DAMAGES = {
    "deleted": (Path.unlink, "No such file"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:45]), "truncated|no image format"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_breaks_while_training_stops_the_run_with_advice(damage, tmp_path):
    data = load(tmp_path)
    path, (break_it, reason) = Path(data.train.name_of(1)), DAMAGES[damage]
    break_it(path)
    with pytest.raises(RunError, match=f"(?s){re.escape(str(path))}.*({reason}).*Restore.*--data.scan full"):
        data.train[1, False]
    again = load(tmp_path, good=0)  # "the same command": the scan that is stored no longer counts
    assert again.fingerprint != data.fingerprint
    assert list(reported(again)) == ([] if damage == "deleted" else [path.name])


def test_the_advice_survives_a_worker(tmp_path):
    data = load(tmp_path)
    path = Path(data.train.name_of(0))
    path.write_bytes(b"rotten")
    try:
        data.train[0, False]
    except RunError:
        sent = ExceptionWrapper(where="in a worker")  # as a DataLoader sends it to the parent
    with pytest.raises(RunError, match=f"(?s){re.escape(str(path))}.*no image format.*Restore"):
        sent.reraise()


def test_ghostscript_is_not_started_by_an_image(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    (tmp_path / "eps.png").write_bytes(EPS)
    with pytest.raises(Exception):  # noqa: B017
        Image.open(tmp_path / "eps.png").load()
    assert started.pop()  # by Pillow alone
    assert "other programs" in reported(load(tmp_path))["eps.png"] and not started


def note(path: Path, worker: int) -> None:
    (path / str(worker)).touch()


def test_a_large_set_is_scanned_by_several_processes_with_the_same_result(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"broken")
    data = load(tmp_path / "data", 40)
    alone = scan(data)
    assert [Path(entry["name"]).name for entry in alone.unreadable] == ["broken.png"]
    monkeypatch.setattr(training.data.scan, "MANY_IMAGES", 20)
    monkeypatch.setattr(training.data.scan.os, "sched_getaffinity", lambda _: range(3))
    assert scan(data, worker_init_fn=functools.partial(note, tmp_path)) == alone
    assert {path.name for path in tmp_path.iterdir()} == {"data", "0", "1", "2"}
    assert scan(data, num_workers=2) == alone


def test_a_sample_is_scanned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(training.data.scan, "SAMPLE_SIZE", 5)
    (tmp_path / "zz broken.png").write_bytes(b"broken")  # the last of the split, which is in every sample
    (tmp_path / "good 15 broken.png").write_bytes(b"broken")
    data = load(tmp_path, 40, scan="sample")
    found = scan(data, "sample")
    assert found == Scan(**asdict(found)) and found.sampled == 10 and sum(found.modes.values()) >= 8
    assert "Scanned: 10 of these" in found.describe() and sum(found.counts.values()) >= 40
    assert "Scanned" not in scan(data).describe()
    assert replace(found, sampled=0) == Scan(**{k: v for k, v in asdict(found).items() if k != "sampled"})
    full = load_images(DataConfig(dataset=str(tmp_path), resolution=16, held_out=0.3))
    assert full.fingerprint != data.fingerprint  # latents of other images may be cached
