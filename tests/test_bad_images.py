"""No image stops a run without a word: it is used, or the scan names it and says why not."""

import io
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fuzz_images
import numpy as np
import pytest
import torch
from fuzz_images import encoded, noise
from PIL import Image
from torch.utils.data import DataLoader

from training.config import DataConfig, RunError
from training.data.images import ImageData, load_images, transform
from training.data.scan import scan


@pytest.fixture(scope="module")
def outcomes():
    return fuzz_images.outcomes()


def load(folder: Path, good: int = 4, **options) -> ImageData:
    """The images of `folder` after so many sound ones were added."""
    for number in range(good):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"good {number}.png")
    return load_images(DataConfig(dataset=str(folder), resolution=16, held_out=0.3, **options))


def reported(data: ImageData) -> dict[str, str]:
    return {Path(entry["name"]).name: entry["reason"] for entry in scan(data).unreadable}


def test_hundreds_of_broken_images_and_sets_are_used_reported_or_refused(outcomes):
    assert sum(count for (kind, _), count in outcomes.items() if not re.search(r"\.\w+$", kind)) > 300
    assert {outcome for kind, outcome in outcomes if kind in ("good", "name")} == {"used"}
    for kind in ("empty", "text", "zero-size", "deep values", "link", "huge", "program"):
        assert {outcome for found, outcome in outcomes if found == kind} == {"reported"}
    assert outcomes["wrong suffix", "used"] == 2 and outcomes["wrong suffix", "reported"] == 1
    for kind in ("truncated .parquet", "truncated .tar", "truncated .arrow", "truncated saved .arrow"):
        assert outcomes[kind, "refused"] and not outcomes[kind, "reported"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV", "LAB", "RGBX", "I;16L", "I;16B"])
def test_rare_modes_become_pixels(mode, channels):
    picture = Image.new(mode, (20, 16))
    image = transform(picture, 16, channels, False)
    assert image.shape == (channels, 16, 16) and -1 <= image.min() <= image.max() <= 1


def test_a_premultiplied_picture_is_laid_on_white():
    half = Image.new("LA", (16, 16), (0, 128)).convert("La")
    assert transform(half, 16, 1, False).mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_the_centre_of_an_extreme_shape_is_shown(size):
    picture = Image.new("RGB", size, "blue")
    middle = [side // 2 for side in size]
    picture.paste("red", (middle[0] - 5, middle[1] - 5, middle[0] + 5, middle[1] + 5))
    image = transform(picture, 16, 3, False)
    assert image[0].min() > 0.9 and image[2].max() < -0.9


def test_a_picture_with_too_many_pixels_costs_no_memory_and_no_warning(tmp_path):
    content = dict((name, made) for kind, name, made in fuzz_images.hand_made() if kind == "huge")
    for name in ("1x.png", "2x.png", "most.png"):
        (tmp_path / name).write_bytes(content[name])
    content["sparse.png"](tmp_path / "sparse.png")
    data = load(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(record=True) as caught:
        reasons = reported(data)
    assert caught == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # of 80 MB to 4.6 EB
    assert sorted(reasons) == ["1x.png", "2x.png", "most.png", "sparse.png"]
    assert re.search("10000x10000.*pixels.*smaller", reasons["1x.png"])
    assert "bytes" in reasons["sparse.png"]


def test_a_photograph_of_many_pixels_is_used_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    Image.new("RGB", (250, 250), "red").save(tmp_path / "photo.jpg")
    Image.new("RGB", (250, 250), "red").save(tmp_path / "drawing.png")
    assert list(reported(load(tmp_path))) == ["drawing.png"]


def test_a_pipe_or_device_does_not_hold_up_the_scan(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    start = time.perf_counter()
    reasons = reported(load(tmp_path))
    assert all("no regular file" in reason for reason in reasons.values()) and len(reasons) == 2
    assert time.perf_counter() - start < 5


def test_folders_links_and_hidden_files(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / "x.png").mkdir(parents=True)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "old.png").write_bytes(b"")
    elsewhere.mkdir()
    noise("RGB", (9, 9), np.random.default_rng(0)).save(elsewhere / "mine.png")
    (folder / "linked.png").symlink_to(elsewhere / "mine.png")
    (folder / "dangling.png").symlink_to(elsewhere / "gone.png")
    data = load(folder)
    assert list(reported(data)) == ["dangling.png"]
    names = [Path(split.name_of(i)).name for split in (data.train, data.held_out) for i in range(len(split))]
    assert sorted(names) == ["dangling.png", *(f"good {n}.png" for n in range(4)), "linked.png"]


def test_a_name_cannot_forge_lines_of_the_report(tmp_path):
    (tmp_path / "a\nWarning: all is well\x1b[2J.png").write_bytes(b"")
    text = scan(load(tmp_path)).describe()
    assert "\nWarning: all" not in text and "\x1b" not in text and "Warning: all is well" in text


def test_a_name_that_is_no_text_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(ValueError, match="UTF-8"):
        load(tmp_path)


def test_a_link_to_its_own_parent_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="loop.*leads back"):
        load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "secret.png").chmod(0)
    assert "Permission" in reported(load(tmp_path))["secret.png"]
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ValueError, match="locked"):
        load(tmp_path)


def test_one_image_cannot_be_held_out(tmp_path):
    with pytest.raises(ValueError, match="too few to hold out.*--data.held_out"):
        load(tmp_path, good=1)


def test_one_class_folder_is_no_class(tmp_path):
    (tmp_path / "only").mkdir()
    load(tmp_path / "only")
    data = load_images(DataConfig(dataset=str(tmp_path), held_out=0.3))
    assert data.id2label is None and len(data.train) + len(data.held_out) == 4


DAMAGES = {
    "deleted": (Path.unlink, "No such file"),
    "emptied": (lambda path: path.write_bytes(b""), "empty"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:45]), "truncated|no image format"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_breaks_while_training_stops_the_run_with_advice(damage, tmp_path):
    data = load(tmp_path)
    assert reported(data) == {}
    first = load_images(DataConfig(dataset=str(tmp_path), resolution=16, held_out=0.3)).fingerprint
    path, (break_it, reason) = Path(data.train.name_of(1)), DAMAGES[damage]
    break_it(path)
    with pytest.raises(RunError, match=f"(?s){re.escape(str(path))}.*({reason}).*Restore.*same command"):
        data.train[1, False]
    again = load(tmp_path, good=0)  # "the same command": the scan that is stored no longer counts
    assert again.fingerprint != first
    assert list(reported(again)) == ([] if damage == "deleted" else [path.name])


def test_the_advice_survives_a_worker(tmp_path):
    data = load(tmp_path)
    path = Path(data.train.name_of(0))
    path.write_bytes(b"rotten")
    loader = DataLoader(
        data.train,
        sampler=[(i, False) for i in range(len(data.train))],
        num_workers=2,
        multiprocessing_context="spawn",
    )
    with pytest.raises(RunError, match=f"(?s){re.escape(str(path))}.*no image format.*Restore"):
        list(loader)


def test_ghostscript_is_not_started_by_an_image(tmp_path):
    trap, fired = tmp_path / "bin" / "gs", tmp_path / "fired"
    trap.parent.mkdir()
    trap.write_text(f"#!/bin/sh\ntouch {fired}\n")
    trap.chmod(0o755)
    (tmp_path / "data").mkdir()
    content = {kind: made for kind, _, made in fuzz_images.hand_made()}["program"]
    (tmp_path / "data" / "eps.png").write_bytes(content)
    env = os.environ | {"PATH": f"{trap.parent}:{os.environ['PATH']}"}
    code = "import sys; from PIL import Image; Image.open(sys.argv[1]).load()"
    plain = [sys.executable, "-c", code, str(tmp_path / "data" / "eps.png")]
    subprocess.run(plain, env=env, capture_output=True, timeout=60)
    assert fired.exists()  # Pillow alone falls into the trap
    fired.unlink()
    data = load(tmp_path / "data")
    os.environ["PATH"], path = env["PATH"], os.environ["PATH"]
    try:
        assert "other programs" in reported(data)["eps.png"]
    finally:
        os.environ["PATH"] = path
    assert not fired.exists()


def test_ordinary_pixels_are_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    seen = transform(Image.open(io.BytesIO(encoded(Image.fromarray(pixels)))), 16, 3, False)
    assert torch.equal(((seen + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))


def test_files_that_are_no_images_by_their_name_are_counted(tmp_path):
    for name in ("photo.heic", "photo2.HEIC", "notes"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"3 files are no images.*no suffix \(1\), \.heic \(2\)"):
        load(tmp_path)


def test_what_pillow_warns_of_is_shown_once_not_for_every_image(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0"  # an entry is cut off
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(Image.new("RGB", (9, 9)), "JPEG", exif=exif))
    data = load(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert reported(data) == {}
    assert len([warning for warning in caught if "EXIF" in str(warning.message)]) == 1
