"""Image grids and plots."""

import textwrap
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from training.evaluation.settings import guidance_words
from training.runtime.atomic import write_bytes

GAP = 2  # pixels of the enlarged grid between two images
CAPTION_HEIGHT = 32  # two lines
FONT = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # has more letters than Pillow's own


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
        lines = textwrap.wrap(text, max(8, width // 7), max_lines=2, placeholder="...")
        place, text = (left + 1, top + height), "\n".join(lines)
        ImageDraw.Draw(picture).multiline_text(place, text, fill=0, font=ImageFont.truetype(FONT, 11))
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def save_sweep(rows: list[dict], name: str, path: Path) -> None:
    """Plot the metric `name` of every setting; the lowest is marked.

    The axis is the number of network evaluations. If only the guidance varies, it is the guidance scale.

    Args:
        rows: `SamplingSettings.describe()` and "figures", the metrics by name; a line per scheduler and
            guidance.
    """
    from matplotlib.ticker import LogLocator  # here, because it takes a second to import

    by_scale = len({(row["scheduler"], row["num_inference_steps"]) for row in rows}) == 1
    by_scale = by_scale and len({row["guidance_scale"] for row in rows}) > 1
    x = "guidance_scale" if by_scale else "network_evaluations"
    axes = _axes("guidance scale; 1 is off" if by_scale else "network evaluations per image", name)
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        own = {key: value for key, value in row.items() if not by_scale or key != "guidance_scale"}
        lines.setdefault((row["scheduler"], guidance_words(own)), []).append(row)
    schedulers, guidances = (list(dict.fromkeys(part)) for part in zip(*lines, strict=True))
    for (scheduler, guidance), line in lines.items():
        numbers = schedulers.index(scheduler), guidances.index(guidance)
        first, second = numbers if len(schedulers) > 1 else numbers[::-1]
        label = (
            ", ".join([scheduler] * (len(schedulers) > 1) + [guidance] * (len(guidances) > 1)) or scheduler
        )
        if by_scale:
            label += f", {max(row['network_evaluations'] for row in line)} evaluations"
            line = line + [row for row in rows if row["guidance_scale"] == 1 and row not in line]
        line = sorted(line, key=lambda row: row[x])
        axes.plot(
            [row[x] for row in line],
            [row["figures"][name] for row in line],
            color=f"C{first % 10}",
            marker="osD^vPX*"[first % 8],
            linestyle=("-", "--", ":", "-.")[second % 4],
            markersize=5,
            label=label,
        )
    best = min(rows, key=lambda row: row["figures"][name])
    value = best["figures"][name]
    axes.plot(best[x], value, "o", markersize=14, markerfacecolor="none", markeredgecolor="black")
    settings = f"{best['scheduler']}, {best['num_inference_steps']} steps, {guidance_words(best)}"
    axes.set_title(f"lowest: {value:.3g}, {settings}", fontsize=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    if not by_scale:
        axes.set_xscale("log")
        ticks: list[int] = []
        for evaluations in sorted({row[x] for row in rows}):
            if not ticks or evaluations > 1.15 * ticks[-1]:  # closer numbers would overlap
                ticks.append(evaluations)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    place = {"bbox_to_anchor": (1.01, 1), "loc": "upper left"}
    if by_scale:  # its labels are long
        place = {"bbox_to_anchor": (0.5, -0.13), "loc": "upper center", "ncols": 2}
    axes.legend(fontsize=8, frameon=False, **place)
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
