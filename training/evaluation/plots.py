"""Image grids and plots."""

import textwrap
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from training.runtime.atomic import write_bytes

GAP = 2  # pixels of the enlarged grid between two images
CAPTION_HEIGHT = 32  # two lines


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pixels uint8 of images in [-1, 1]; values beyond are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_grid(
    images: torch.Tensor, path: Path, columns: int | None = None, captions: list[str] | None = None
) -> None:
    """Write images as one PNG, row by row, enlarged by a whole factor to about 800 pixels of width.

    Args:
        images: float (N, 1 or 3, H, W) in [-1, 1]; values beyond are clipped.
        path: the PNG; its folder must exist. It is written aside and renamed.
        columns: images per row. Default: about as many as rows.
        captions: a text below each image.

    Raises:
        ValueError: values are not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError(f"the images for {path} hold values that are not finite")
    count, channels, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    scale = max(1, round(800 / (columns * width)))
    height, width = height * scale, width * scale
    pixels = to_uint8(images.detach().cpu())
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    rows, pitch = -(-count // columns), height + (GAP if captions is None else CAPTION_HEIGHT)
    grid = np.full((rows * pitch - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    places = [(number // columns * pitch, number % columns * (width + GAP)) for number in range(count)]
    for (top, left), image in zip(places, pixels, strict=True):
        grid[top : top + height, left : left + width] = image
    picture, buffer = Image.fromarray(grid[..., 0] if channels == 1 else grid), BytesIO()
    for (top, left), text in zip(places, captions or [], strict=bool(captions)):
        lines = textwrap.wrap(text, max(8, width // 6), max_lines=2, placeholder="...")
        ImageDraw.Draw(picture).multiline_text((left + 1, top + height), "\n".join(lines), fill=0)
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def save_curve(values: dict[int, float], name: str, path: Path) -> None:
    """Plot the metric `name` by training step."""
    axes = _axes("denoiser step", name)
    axes.plot(list(values), list(values.values()), marker="o", color="#1f77b4")
    axes.set_ylim(0, 1.08 * max(values.values()))
    _save(axes, path)


def save_sweep(rows: list[dict], name: str, path: Path) -> None:
    """Plot the metric `name` of every setting by its network evaluations; the lowest is marked.

    Args:
        rows: `SamplingSettings.describe()` and "figures", the metrics by name; a line per scheduler and
            guidance scale.
    """
    from matplotlib.ticker import LogLocator  # here, because it takes a second to import

    axes = _axes("network evaluations per image", name)
    schedulers = list(dict.fromkeys(row["scheduler"] for row in rows))
    scales = list(dict.fromkeys(row["guidance_scale"] for row in rows))
    for scheduler in schedulers:
        for scale in scales:
            line = [row for row in rows if (row["scheduler"], row["guidance_scale"]) == (scheduler, scale)]
            line.sort(key=lambda row: row["network_evaluations"])
            axes.plot(
                [row["network_evaluations"] for row in line],
                [row["figures"][name] for row in line],
                color=f"C{schedulers.index(scheduler) % 10}",
                marker="osD^vPX*"[schedulers.index(scheduler) % 8],
                linestyle=("-", "--", ":", "-.")[scales.index(scale) % 4],
                markersize=5,
                label=scheduler + (f", guidance {scale:g}" if len(scales) > 1 else ""),
            )
    best = min(rows, key=lambda row: row["figures"][name])
    x, y = best["network_evaluations"], best["figures"][name]
    axes.plot(x, y, "o", markersize=14, markerfacecolor="none", markeredgecolor="black")
    settings = (
        f"{best['scheduler']}, {best['num_inference_steps']} steps, guidance {best['guidance_scale']:g}"
    )
    axes.set_title(f"lowest: {y:.3g}, {settings}", fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    ticks: list[int] = []
    for evaluations in sorted({row["network_evaluations"] for row in rows}):
        if not ticks or evaluations > 1.15 * ticks[-1]:  # closer numbers would overlap
            ticks.append(evaluations)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    _save(axes, path)


def _axes(x: str, y: str):
    from matplotlib.figure import Figure  # needs no display

    axes = Figure(figsize=(7, 4.5), dpi=120, layout="constrained").add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(axes, path: Path) -> None:
    buffer = BytesIO()
    axes.figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
