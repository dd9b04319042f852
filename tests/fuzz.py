"""Broken images and model folders, and what becomes of them: `make fuzz` prints the table.

Whatever is neither used, nor reported, nor refused by a check of this project, raises AssertionError.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from diffusers.utils.logging import disable_progress_bar  # noqa: E402

from tests import fuzz_images, fuzz_models  # noqa: E402

ENDS = ("used", "reported", "refused", "accepted", "works", "fails")  # one of them for every input


def table(title: str, outcomes: Counter) -> str:
    """One line a kind of input, one column an outcome, as Markdown."""
    classes = sorted({outcome for _, outcome in outcomes})
    inputs = sum(number for (_, outcome), number in outcomes.items() if outcome in ENDS)
    lines = [
        f"| {title} ({inputs}) | {' | '.join(classes)} |",
        "|---" * (len(classes) + 1) + "|",
    ]
    for kind in sorted({kind for kind, _ in outcomes}):
        lines.append(f"| {kind} | {' | '.join(str(outcomes[kind, outcome]) for outcome in classes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    disable_progress_bar()
    print(table("images", fuzz_images.outcomes()))
    with tempfile.TemporaryDirectory() as folder:
        print(table("model folders", fuzz_models.outcomes(Path(folder))))
