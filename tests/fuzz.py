"""Broken images, configurations and model folders, and what becomes of them: `make fuzz` prints the table.

Whatever is neither used, nor reported, nor refused by a check of this project, raises AssertionError.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import fuzz_configs, fuzz_images, fuzz_models  # noqa: E402


def table(title: str, outcomes: Counter) -> str:
    """One line a kind of input, one column an outcome, as Markdown."""
    classes = sorted({outcome for _, outcome in outcomes})
    lines = [
        f"| {title} ({sum(outcomes.values())}) | {' | '.join(classes)} |",
        "|---" * (len(classes) + 1) + "|",
    ]
    for kind in sorted({kind for kind, _ in outcomes}):
        lines.append(f"| {kind} | {' | '.join(str(outcomes[kind, outcome]) for outcome in classes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table("images", fuzz_images.outcomes()))
    print(table("configurations", fuzz_configs.outcomes()))
    with tempfile.TemporaryDirectory() as folder:
        print(table("model folders", fuzz_models.outcomes(Path(folder))))
