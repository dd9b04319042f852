"""Shared by all examples: the option --output, tables in Markdown, pictures that need no display."""

import argparse
import sys
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

BLUE, RED, GREEN, PINK, OCHRE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a37b00", "#5a5a5a"
rcParams |= {"axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False, "axes.axisbelow": True}
rcParams |= {"axes.grid": True, "grid.alpha": 0.25, "xtick.labelsize": 8, "ytick.labelsize": 8}
rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


def arguments(description: str, **options: tuple) -> argparse.Namespace:
    """The command line of an example: --output, and `options` by name as (default, help)."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    own = Path(sys.argv[0]).with_suffix(".png")
    parser.add_argument("--output", type=Path, default=own, help="the picture; by default %(default)s")
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (%(default)s)")
    return parser.parse_args()


def print_table(header: str, rows: Iterable[Iterable]) -> None:
    """Print a table in Markdown; the header's columns are separated by |, numbers have three digits."""
    print(f"\n| {header} |")
    print("|---" * (header.count("|") + 1) + "|")
    for row in rows:
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")


def decimals(values: Iterable) -> str:
    """Numbers with two decimals, in one cell of a table."""
    return ", ".join(f"{round(float(value), 2) + 0:.2f}" for value in values)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple:
    """A figure of width and height in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw_images(axes, images: Tensor, title: str, columns: int) -> None:
    """Draw grey images (N, 1, H, W) in [-1, 1], 1 as black, in rows of `columns`, without ticks."""
    framed = pad(images.clamp(-1, 1), (1, 1, 1, 1), value=-1)[:, 0]
    rows = [torch.cat(list(row), 1) for row in framed.split(columns)]
    axes.imshow(torch.cat(rows), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, loc="left")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG of 256 colours."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)
