"""Good, broken and hostile images and data sets, the same from every seed, and what becomes of them."""

import io
import json
import os
import re
import tarfile
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, features

from training.config import DataConfig
from training.data.images import ImageData, load_images
from training.data.scan import scan

PROJECT = Path(__file__).parent.parent
RESOLUTION = 16
SIZES = [(1, 1), (1, 300), (300, 1), (7, 5), (16, 16), (61, 47)]
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F", "YCbCr", "LAB"),
    "GIF": ("1", "L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A picture of any mode with arbitrary valid pixels."""
    width, height = size
    if mode == "F":
        return Image.fromarray(rng.random((height, width), np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.int32))
    if mode.startswith("I;16"):
        pixels = rng.integers(0, 65536, (height, width), np.uint16)
        return Image.frombytes(mode, size, pixels.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
    rgba = (
        Image.fromarray(pixels, "RGBA") if mode in ("RGBA", "LA") else Image.fromarray(pixels[..., :3].copy())
    )
    if mode in ("CMYK", "YCbCr", "1", "L", "P", "LA", "RGB", "RGBA"):
        return rgba.convert(mode)
    return Image.frombytes(mode, size, pixels[..., :3].tobytes())


def good_images(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Names and files of every format and mode in ordinary and extreme sizes, turned and animated ones."""
    for kind, modes in FORMATS.items():
        if kind == "AVIF" and not features.check("avif"):
            continue
        for number, mode in enumerate(modes):
            for size in (SIZES[number % len(SIZES)], SIZES[-1]):
                yield f"{kind}-{mode}-{size[0]}x{size[1]}", encoded(noise(mode, size, rng), kind)
        if kind in ANIMATED:
            first, *others = (noise("RGB", (20, 20), rng) for _ in range(3))
            yield f"{kind}-animated", encoded(first, kind, save_all=True, append_images=others)
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"JPEG-turned-{orientation}", encoded(noise("RGB", (20, 30), rng), "JPEG", exif=exif)


def mutations(content: bytes, other: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """What happens to files on disks and networks, once each at random places."""
    size = len(content)
    start, end = sorted(int(n) for n in rng.integers(0, size + 1, 2))
    yield "truncated", content[: int(rng.integers(0, size))]
    yield "truncated", content[: size - int(rng.integers(1, 20))]
    yield "zeroed", content[:start] + bytes(end - start) + content[end:]
    yield "spliced", content[:start] + other[start:]
    yield "shortened", content[:start] + content[end:]
    for kind, limit in (("flipped", size), ("flipped header", min(size, 64))):
        changed = bytearray(content)
        for place in rng.integers(0, limit, 3):
            changed[place] ^= 1 << int(rng.integers(8))
        yield kind, bytes(changed)


def hand_made() -> Iterator[tuple[str, str, bytes | Callable[[Path], object]]]:
    """Kinds, names and files (or what makes them at a path) of particular mistakes and attacks."""
    red = encoded(Image.new("RGB", (9, 9), "red"))
    yield "empty", "empty.png", b""
    yield "text", "text.jpg", b"not a picture\n"
    yield "text", "page.png", b"<html><body>404</body></html>"
    yield "text", "pointer.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    for name, content in {
        "zero.ppm": b"P6 0 0 255\n",
        "zero.gif": b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x00;",
        "zero.bmp": b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + bytes(8) + b"\1\0\x18\0" + bytes(24),
        "zero.png": red[:16] + bytes(8) + red[24:],
    }.items():
        yield "zero-size", name, content
    yield "wrong suffix", "png.jpg", red
    yield "wrong suffix", "webp.png", encoded(Image.new("RGB", (9, 9)), "WEBP")
    yield "wrong suffix", "zip.png", b"PK\x03\x04" + bytes(60)
    yield "program", "eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for value in (np.nan, np.inf, -np.inf, -1, 1e9):
        pixels = np.full((9, 9), 0.5, np.float32)
        pixels[4, 4] = value
        yield "deep values", f"{value}.tif", encoded(Image.fromarray(pixels), "TIFF")
    yield "deep values", "negative.tif", encoded(Image.fromarray(np.full((9, 9), -5, np.int32)), "TIFF")
    for name in (
        "a b.png",
        "ä☃𝄞.png",
        "line\nfeed.png",
        "\x1b[31mred.png",
        "%s {0} ' \".png",
        "-rf.png",
        "*.png",
    ):
        yield "name", name, red
    yield "link", "dangling.png", lambda path: path.symlink_to("nowhere.png")
    yield "link", "itself.png", lambda path: path.symlink_to(path.name)
    yield "link", "device.png", lambda path: path.symlink_to("/dev/zero")
    yield "link", "pipe.png", os.mkfifo
    yield "huge", "1x.png", _blank_png(10000, 10000)
    yield "huge", "2x.png", _blank_png(20000, 20000)
    yield "huge", "most.png", _blank_png(2**31 - 1, 2**31 - 1)
    yield "huge", "sparse.png", lambda path: (path.write_bytes(red), os.truncate(path, 2**33))


def _blank_png(width: int, height: int) -> bytes:
    """A file of a few bytes that says it has many pixels."""
    small = encoded(Image.new("1", (8, 8)))
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + small[24:29]
    return small[:12] + header + zlib.crc32(header).to_bytes(4) + small[33:]


def write_images(root: Path, seed: int) -> None:
    """All of the above below `root`, in one folder a kind."""
    rng = np.random.default_rng(seed)
    good = list(good_images(rng))
    files = [("good", name, content) for name, content in good]
    for number, (name, content) in enumerate(good):
        other = good[int(rng.integers(len(good)))][1]
        for count, (kind, changed) in enumerate(mutations(content, other, rng)):
            if (number + count) % 2:
                files.append((kind, f"{name}-{count}", changed))
    for number, (kind, name, content) in enumerate(files):
        (root / kind).mkdir(exist_ok=True)
        (root / kind / f"{number:04}-{name.replace(';', '_')}.png").write_bytes(content)
    for kind, name, content in hand_made():
        (root / kind).mkdir(exist_ok=True)
        path = root / kind / name
        path.write_bytes(content) if isinstance(content, bytes) else content(path)


def six_images() -> tuple[list[bytes], list[int]]:
    rng = np.random.default_rng(0)
    return [encoded(noise("RGB", (24, 24), rng)) for _ in range(6)], [0, 1] * 3


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_sets(root: Path) -> list[Path]:
    """One sound data set of every kind, of six images each."""
    images, labels = six_images()
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "set.parquet", row_group_size=2)
    feature = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=feature).save_to_disk(root / "saved")
    (root / "set.arrow").write_bytes(next((root / "saved").glob("*.arrow")).read_bytes())
    members = {}
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        members |= {f"{number}.png": image, f"{number}.cls": str(label).encode()}
    write_tar(root / "set.tar", members)
    return [root / "set.parquet", root / "set.arrow", root / "set.tar", *sorted((root / "saved").iterdir())]


def write_damaged_sets(root: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Kinds of damage and where the data set is that has suffered it."""
    rng = np.random.default_rng(seed)
    (root / "sound").mkdir()
    sound = write_sets(root / "sound")
    for path in sound:
        content = path.read_bytes()
        damaged = [
            (kind, changed) for _ in range(2) for kind, changed in mutations(content, content[::-1], rng)
        ]
        if path.suffix == ".tar":  # where one of its parts ends
            damaged += [("truncated", content[: 512 * n + m]) for n, m in ((0, 0), (2, 0), (4, 9), (8, 511))]
        if path.suffix == ".json":
            found = json.loads(content)
            changes = [
                dict.fromkeys(found),
                dict.fromkeys(found, 7),
                [],
                None,
                {"_data_files": [{"filename": 5}]},
            ]
            damaged += [("malformed", json.dumps(changed).encode()) for changed in (*changes, {}, "text")]
            damaged += [("malformed", b"{"), ("malformed", b"\xff\xfe")]
        for number, (kind, changed) in enumerate(damaged):
            folder = root / f"{path.name}-{number}"
            folder.mkdir()
            if path.parent == root / "sound":
                (folder / path.name).write_bytes(changed)
                yield f"{kind} {path.suffix}", folder / path.name
            else:
                for name in path.parent.iterdir():
                    (folder / name.name).write_bytes(changed if name == path else name.read_bytes())
                yield f"{kind} saved {path.suffix}", folder


def check_refused(error: Exception, what: object) -> None:
    """AssertionError unless `error` is a ValueError with a text, raised by this project's own lines."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    own = Path(last.tb_frame.f_code.co_filename).is_relative_to(PROJECT / "training")
    assert isinstance(error, ValueError) and own and len(str(error)) > 20, f"{what}: {error!r}"
    assert not re.search("0x[0-9a-f]{6}", str(error)), f"{what}: {error}"


def check_images(data: ImageData) -> Iterator[tuple[str, str]]:
    """The name and outcome of every image, "used" or "reported"; AssertionError if it is neither."""
    found = scan(data)
    bad = {(entry["split"], entry["index"]): entry for entry in found.unreadable}
    json.dumps(found.unreadable)
    for key in ("train", "held_out"):
        split = getattr(data, key)
        for index in range(len(split)):
            if entry := bad.get((key, index)):
                text = f"{entry['name']}: {entry['reason']}"
                assert len(entry["reason"]) > 10 and text.isprintable() and " at 0x" not in text, text
                yield entry["name"], "reported"
                continue
            image = split[index, False]["images"]
            name = split.name_of(index)
            assert image.shape == (3, RESOLUTION, RESOLUTION) and image.dtype == torch.float32, name
            assert image.isfinite().all() and image.min() >= -1 and image.max() <= 1, name
            yield name, "used"


def set_outcome(path: Path, whole: bool) -> str:
    """What becomes of the data set at `path`; if `whole`, fewer than its six images are a failure."""
    try:
        data = load_images(DataConfig(dataset=str(path), resolution=RESOLUTION, held_out=0.3))
        found = [outcome for _, outcome in check_images(data)]
    except Exception as error:
        check_refused(error, path)
        return "refused"
    assert len(found) == 6 or not whole, f"{path}: {len(found)} of 6 images without a word"
    return "reported" if "reported" in found else "used"


def outcomes(seed: int = 0) -> Counter:
    """How many images and data sets of each kind are "used", "reported" or "refused", by (kind, outcome).

    Raises:
        AssertionError: one ends in another way.
    """
    counts, cache = Counter(), datasets.config.HF_DATASETS_CACHE
    datasets.disable_progress_bars()  # datasets shows hundreds of them
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        root = Path(folder)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        try:
            (root / "images").mkdir()
            write_images(root / "images", seed)
            data = load_images(DataConfig(dataset=str(root / "images"), resolution=RESOLUTION))
            for name, outcome in check_images(data):
                counts[Path(name).parent.name, outcome] += 1
            (root / "sets").mkdir()
            for kind, path in write_damaged_sets(root / "sets", seed):
                counts[kind, set_outcome(path, kind.startswith("truncated"))] += 1
        finally:
            datasets.config.HF_DATASETS_CACHE = cache
            datasets.enable_progress_bars()
    bombs = [warning for warning in caught if warning.category is Image.DecompressionBombWarning]
    assert not bombs, bombs[0]
    return counts


if __name__ == "__main__":
    for (kind, outcome), count in sorted(outcomes().items()):
        print(f"{kind:24} {outcome:10} {count}")
