"""Pictures and figures that a person looks at while and after a run."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.files import write_bytes

GAP = 2  # pixels of the enlarged grid between two images


def save_grid(images: torch.Tensor, path: Path, columns: int | None = None, scale: int | None = None) -> None:
    """Write images as one PNG, row by row, enlarged by whole factors so that single pixels can be seen.

    Args:
        images: float (N, C, H, W) in [-1, 1], C of 1 or 3; values beyond are clipped.
        path: the PNG; its folder must exist. It is written aside and renamed.
        columns: images in a row. Default: about as many as rows.
        scale: enlargement. Default: the grid becomes about 800 pixels wide.

    Raises:
        ValueError: no images, values that are not finite, or neither 1 nor 3 channels.
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"A grid is made of images (N, 1 or 3, H, W), not {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError(f"The images for {path} hold values that are not finite")
    count, channels, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    scale = scale or max(1, round(800 / (columns * width)))
    height, width = height * scale, width * scale
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    buffer = BytesIO()
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
