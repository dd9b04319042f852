"""Good, broken and hostile images, the same from every seed, and their outcomes: used or reported."""

import io
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from packaging.version import Version
from PIL import Image, features
from PIL import __version__ as pillow_version

from training.config import DataConfig
from training.data.images import ImageData, load_images
from training.data.scan import scan

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
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The content of a file of format `kind`."""
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
    if mode == "LAB":
        return Image.frombytes(mode, size, pixels[..., :3].tobytes())
    return Image.fromarray(pixels if mode in ("RGBA", "LA") else pixels[..., :3].copy()).convert(mode)


def good_images(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Names and files of every format and mode in ordinary and extreme sizes, turned and animated ones."""
    for kind, modes in FORMATS.items():
        if kind == "AVIF" and not features.check("avif"):
            continue
        for number, mode in enumerate(modes):
            if mode == "YCbCr" and Version(pillow_version) < Version("13"):
                continue  # cannot read its own files of an odd width
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
    """Accidents of files on disks and networks, once each at random places."""
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


def unusable_images() -> Iterator[tuple[str, bytes]]:
    """Kinds and files of particular mistakes and attacks; none can be used."""
    red = encoded(Image.new("RGB", (9, 9), "red"))
    yield "empty", b""
    yield "text", b"<html><body>404</body></html>"
    yield "text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    yield "zero-size", b"P6 0 0 255\n"
    yield "zero-size", red[:16] + bytes(8) + red[24:]
    yield "archive", b"PK\x03\x04" + bytes(60)
    yield "program", EPS
    for value in (np.nan, np.inf, -np.inf, -1, 1e9):
        pixels = np.full((9, 9), 0.5, np.float32)
        pixels[4, 4] = value
        yield "deep values", encoded(Image.fromarray(pixels), "TIFF")
    yield "deep values", encoded(Image.fromarray(np.full((9, 9), -5, np.int32)), "TIFF")
    yield "huge", encoded(Image.new("1", (10000, 10000)))  # more pixels than Pillow's limit, in 12 KB


def write_images(root: Path, seed: int) -> None:
    """All of the above below `root`, in one folder per kind."""
    rng = np.random.default_rng(seed)
    good = list(good_images(rng))
    files = [("good", content) for _, content in good]
    for number, (_, content) in enumerate(good):
        other = good[int(rng.integers(len(good)))][1]
        for count, mutation in enumerate(mutations(content, other, rng)):
            if (number + count) % 2:
                files.append(mutation)
    for number, (kind, content) in enumerate([*files, *unusable_images()]):
        (root / kind).mkdir(exist_ok=True)
        (root / kind / f"{number:04}.png").write_bytes(content)


def check_images(data: ImageData) -> Iterator[tuple[str, str]]:
    """The name and outcome of every image, "used" or "reported"; AssertionError if it is neither."""
    bad = {(entry["split"], entry["index"]): entry for entry in scan(data).unreadable}
    for key, split in (("train", data.train), ("held_out", data.held_out)):
        for index in range(len(split)):
            name = split.name_of(index)
            if (key, index) in bad:
                reason = bad[key, index]["reason"]
                assert len(reason) > 10 and " at 0x" not in reason, f"{name}: {reason}"
                yield name, "reported"
            else:
                image = split[index, False]["images"]
                assert image.shape == (3, RESOLUTION, RESOLUTION) and image.dtype == torch.float32, name
                assert image.isfinite().all() and image.abs().max() <= 1, name
                yield name, "used"


def outcomes(seed: int = 0) -> Counter:
    """How many images of each kind are "used" or "reported", by (kind, outcome).

    Raises:
        AssertionError: one ends in another way.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), seed)
        data = load_images(DataConfig(dataset=folder, resolution=RESOLUTION))
        return Counter((Path(name).parent.name, outcome) for name, outcome in check_images(data))
