"""Broken images and model folders, and what becomes of them: `make fuzz` prints the tables.

An outcome that breaks a promise, such as an image that is neither used nor reported, raises AssertionError.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the modules of the tests

from tests import fuzz_images, fuzz_models  # noqa: E402


def table(title: str, outcomes: Counter[tuple[str, str]]) -> str:
    """Markdown with a row per kind of input and a column per outcome."""
    columns = sorted({outcome for _, outcome in outcomes})
    lines = [
        f"| {title} ({outcomes.total()}) | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for kind in sorted({kind for kind, _ in outcomes}):
        lines.append(f"| {kind} | {' | '.join(str(outcomes[kind, outcome]) for outcome in columns)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table("images", fuzz_images.outcomes()))
    with tempfile.TemporaryDirectory() as folder:
        print(table("model folders", fuzz_models.outcomes(Path(folder))))
