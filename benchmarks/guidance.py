"""Prints the best setting of every kind of guidance in sweeps, at equally many network evaluations.

The sweeps come from `training/evaluate_ldm.py`; docs/evaluation.md has its command.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from training.evaluation.settings import guidance_words


def kind_of(row: dict) -> str:
    """The guidance of a setting without its numbers."""
    words = "plain" if row.get("guidance", "classifier_free") == "classifier_free" else row["guidance"]
    words += ", interval" if row.get("guidance_interval", [0, 1]) != [0, 1] else ""
    words += ", rescaled" if row.get("guidance_rescale") else ""
    return "none" if row["guidance_scale"] == 1 else words


def plot(rows: list[dict], metrics: list[str], path: Path) -> None:
    """Each metric over the guidance scale, with a line for every kind."""
    figure = Figure(figsize=(5 * len(metrics), 4), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(metrics))
    for panel, metric in zip(panels, metrics, strict=True):
        for number, kind in enumerate(dict.fromkeys(map(kind_of, rows))):
            own = sorted((row for row in rows if kind_of(row) == kind), key=lambda row: row["guidance_scale"])
            values = [row["figures"][metric] for row in own]
            evaluations = max(row["network_evaluations"] for row in own)
            label = f"{kind}, {evaluations} evaluations"
            panel.plot([row["guidance_scale"] for row in own], values, f"C{number}o-", label=label)
        panel.set(xlabel="guidance scale", ylabel=metric)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+", help="sweep.json of one run's sweeps")
    parser.add_argument("--evaluations", type=int, help="at most so many per image (default: any)")
    parser.add_argument("--plot", type=Path, help="PNG of distance and recall over the scale")
    options = parser.parse_args()
    sweeps = [json.loads(path.read_text()) for path in options.sweeps]
    # What all settings of a sweep have in common is in its protocol.
    rows = [sweep["protocol"] | row for sweep in sweeps for row in sweep["settings"]]
    rank_by, best = sweeps[0]["rank_by"], {}
    for row in sorted(rows, key=lambda row: row["figures"][rank_by]):
        if options.evaluations is None or row["network_evaluations"] <= options.evaluations:
            best.setdefault(kind_of(row), row)
    names = [name for name in next(iter(best.values()))["figures"] if not name.endswith(" deviation")]
    print(f"| guidance | best setting | evaluations | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for kind, row in best.items():
        setting = f"{row['scheduler']}, {row['num_inference_steps']} steps, {guidance_words(row)}"
        figures = " | ".join(f"{row['figures'][name]:.4g}" for name in names)
        print(f"| {kind} | {setting} | {row['network_evaluations']} | {figures} |")
    if options.plot:
        plot(rows, [rank_by, *(name for name in names if name.startswith("recall"))], options.plot)


if __name__ == "__main__":
    main()
