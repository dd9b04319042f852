"""Prints the best setting of every kind of guidance in a sweep, at equally many network evaluations.

The sweep comes from `training/evaluate_ldm.py`; docs/evaluation.md has its command.
"""

import argparse
import json
from pathlib import Path

from training.evaluation.settings import guidance_words


def kind_of(row: dict) -> str:
    """The guidance of a setting without its numbers."""
    words = "plain" if row.get("guidance", "classifier_free") == "classifier_free" else row["guidance"]
    words += ", interval" if row.get("guidance_interval", [0, 1]) != [0, 1] else ""
    words += ", rescaled" if row.get("guidance_rescale") else ""
    return "none" if row["guidance_scale"] == 1 else words


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with sweep/sweep.json")
    parser.add_argument("--evaluations", type=int, help="at most so many per image (default: any)")
    options = parser.parse_args()
    sweep = json.loads((options.run / "sweep" / "sweep.json").read_text())
    rows = [sweep["protocol"] | row for row in sweep["settings"]]  # what all have in common is there
    best: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: row["figures"][sweep["rank_by"]]):
        if options.evaluations is None or row["network_evaluations"] <= options.evaluations:
            best.setdefault(kind_of(row), row)
    names = [name for name in next(iter(best.values()))["figures"] if not name.endswith(" deviation")]
    print(f"| guidance | best setting | evaluations | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for kind, row in best.items():
        setting = f"{row['scheduler']}, {row['num_inference_steps']} steps, {guidance_words(row)}"
        figures = " | ".join(f"{row['figures'][name]:.4g}" for name in names)
        print(f"| {kind} | {setting} | {row['network_evaluations']} | {figures} |")


if __name__ == "__main__":
    main()
