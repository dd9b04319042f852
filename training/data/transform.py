"""The transform from a picture to a network's input."""

import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

TRANSFORM_VERSION = 1  # raise it when `transform` changes: caches made with the old one are then rebuilt
# `transform` itself refuses such pictures. Set here and not around every image, where `catch_warnings` would
# make Python forget which of Pillow's other warnings it has shown.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def transform(
    picture: Image.Image, resolution: int, channels: int, flip: bool, nearest: bool = False
) -> torch.Tensor:
    """A picture as a network sees it: turned as EXIF says, laid on white, resized, its centre cropped.

    Args:
        picture: any mode; the first frame counts. It may be turned and decoded at reduced size.
        resolution: height and width R of the result. A picture of that size is not resampled.
        channels: 1 (grey) or 3 (RGB).
        flip: mirror left and right.
        nearest: resize by the nearest pixels, which mixes no colours.

    Returns:
        float32 (channels, R, R) in [-1, 1].

    Raises:
        ValueError: too many pixels, or deep grey values out of range.
        OSError and others: Pillow cannot decode the file.
    """
    picture.draft(None, (2 * resolution, 2 * resolution))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and picture.width * picture.height > most:  # Pillow itself refuses only twice as many
        raise ValueError(f"{picture.width}x{picture.height} are more than {most:,} pixels: make it smaller")
    ImageOps.exif_transpose(picture, in_place=True)
    picture = _to_eight_bits(picture, "L" if channels == 1 else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == resolution:
        picture = picture.crop(box)
    else:
        size = (resolution, resolution)
        method = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
        picture = picture.resize(size, method, box=box, reducing_gap=3.0)
    pixels = np.asarray(picture).reshape(resolution, resolution, channels).transpose(2, 0, 1)  # (C, R, R)
    pixels = (pixels[..., ::-1] if flip else pixels).astype(np.float32, order="C")
    return torch.from_numpy(pixels / np.float32(127.5) - np.float32(1))


def _to_eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # Pillow itself would clip these at 255
        return Image.fromarray(_scale_grey(np.asarray(picture), picture.mode)).convert(mode)
    if picture.mode in ("La", "LAB"):  # Pillow converts these to no other mode
        picture = picture.convert("LA" if picture.mode == "La" else "RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def _scale_grey(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values as uint8: integers range to 65,535, floats to the next of 1, 255 and 65,535."""
    values = values.astype(np.float64)
    top = 65535
    if mode == "F":
        top = next((limit for limit in (1, 255) if values.max() <= limit), top)
    if not (values.min() >= 0 and values.max() <= top):  # so written, NaN is refused too
        raise ValueError(f"grey values from {values.min():g} to {values.max():g}, not within 0..{top}")
    return np.round(values * (255 / top)).astype(np.uint8)
