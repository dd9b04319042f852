"""Curves of a stage's log, in the coordinates of SVG drawings."""

import math
from dataclasses import dataclass

from ldm_pipeline.model_card import metric, number

WIDTH, HEIGHT = 360, 210  # units of the drawing, of which the frame leaves room for the axes' numbers
LEFT, RIGHT, TOP, BOTTOM = 54, 352, 8, 186
MAX_POINTS = 200  # of a line; of longer ones neighbours are averaged
LOG_ABOVE = 8  # ratio of the largest to the smallest value, from which on the axis is logarithmic

# Title, unit, and the keys of metrics.jsonl that share a chart with the names of their lines. Metrics carry
# no number of samples here. A key that is missing here has a chart of its own.
CHARTS = (
    ("Loss in training", "", {"loss": "loss", "pixel": "pixel error", "perceptual": "LPIPS"}),
    ("Prediction error", "mean square", {"error": "training", "val_loss": "held-out"}),
    ("Held-out error by noise level", "mean square", {"val_loss_by_timestep": ""}),
    ("PSNR of held-out reconstructions", "dB", {"psnr": "PSNR"}),
    ("SSIM of held-out reconstructions", "", {"ssim": "SSIM"}),
    ("KL per latent element", "nats", {"kl": "KL"}),
    ("Deviation of the latents", "before normalisation", {"latent_std": "deviation"}),
    ("Discriminator", "loss", {"adversarial": "autoencoder's", "discriminator": "discriminator's"}),
    ("Gradient norm", "", {"grad_norm": "network", "discriminator_grad_norm": "discriminator"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Rate of training", "images per second", {"images_per_second": "images per second"}),
    ("Waiting for data", "share of the time", {"data_wait": "share"}),
    (
        "Metrics of samples",
        "shares",
        {name: name for name in ("precision", "recall", "density", "coverage", "agreement")},
    ),
)
FROM_ZERO = {"learning_rate", "images_per_second", "data_wait", "skipped"}
NO_CURVE = {"step", "seconds"}


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        points: its place, "x,y x,y ...".
        steps, values: what it shows, as text, one for each point.
    """

    name: str
    points: str
    steps: list[str]
    values: list[str]


@dataclass(frozen=True)
class Chart:
    """Lines over the steps of a stage, from 0 to `last`, with the places and texts of both axes' ticks.

    Attributes:
        sequential: whether the lines have an order, from clean to noisy.
    """

    title: str
    unit: str
    last: int
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    sequential: bool

    @property
    def summary(self) -> str:
        """The chart in words."""
        ends = (
            f"{line.name} from {line.values[0]} at step {line.steps[0]} to {line.values[-1]} at "
            f"step {line.steps[-1]}"
            for line in self.lines
        )
        return f"{self.title}: {'; '.join(ends)}"


def draw_charts(records: list[dict]) -> list[Chart]:
    """The charts of the lines of a stage in metrics.jsonl. Numbers that are not finite are left out."""
    columns: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        for key, value in record.items():
            parts = value if isinstance(value, list) else [value]
            for index, part in enumerate(parts):
                if key not in NO_CURVE and not key.endswith(" deviation") and number(part):
                    name = _level(index, len(parts)) if len(parts) > 1 else key
                    columns.setdefault(key, {}).setdefault(name, []).append((record["step"], part))
    last, charts = max((record["step"] for record in records), default=0), []
    for title, unit, names in CHARTS:
        keys = [key for name in names for key in columns if metric(key) == name]
        curves = {names.get(name, name): points for key in keys for name, points in columns[key].items()}
        charts += [_draw(title, unit, curves, last, not FROM_ZERO.isdisjoint(keys))] if curves else []
        for key in keys:
            del columns[key]
    return charts + [_draw(key, "", curves, last, key in FROM_ZERO) for key, curves in columns.items()]


def _level(index: int, count: int) -> str:
    """The name of one of several equal parts of the noise levels."""
    return {0: "clean", count - 1: "noisy"}.get(index, f"{index + 1} of {count}")


def _draw(title: str, unit: str, curves: dict, last: int, from_zero: bool) -> Chart:
    curves = {name: _thinned(points) for name, points in curves.items()}
    values = [value for points in curves.values() for _, value in points]
    low, high = min(values), max(values)
    logarithmic = not from_zero and low > 0 and high > LOG_ABOVE * low
    low = min(low, 0) if from_zero else low
    y_ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    scale = math.log10 if logarithmic else float
    bottom, top = scale(low), scale(high)
    margin = 0.04 * (top - bottom) or 0.5 * abs(top) or 1.0  # a constant lies in the middle
    bottom, top = bottom - margin * (not from_zero), top + margin

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / max(1, last), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (scale(value) - bottom) / (top - bottom), 1)

    lines = [
        Line(
            name,
            " ".join(f"{x(step)},{y(value)}" for step, value in points),
            [number(step) for step, _ in points],
            [number(float(value)) for _, value in points],
        )
        for name, points in curves.items()
    ]
    units = [unit] * bool(unit) + ["logarithmic"] * logarithmic
    return Chart(
        title, ", ".join(units), last, lines,
        [(x(step), _short(step)) for step in _ticks(0, max(1, last)) if step == int(step)],
        [(y(value), _short(value)) for value in y_ticks],
        "clean" in curves,
    )  # fmt: skip


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(points) // MAX_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most six."""
    if high <= low:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / 5))
    size = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= (high - low) / 5)
    numbers = range(math.ceil(low / size), math.floor(high / size) + 1)
    return [float(f"{index * size:.10g}") for index in numbers]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, evenly on a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    return ticks


def _short(value: float) -> str:
    """A number in few letters: 200k, 1.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"
