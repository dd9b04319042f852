"""Every example runs and holds its closed form; the two pages that show them say what they print."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fork_server import Child
from PIL import Image

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "show.py")
# A formula of each example, and a wrong one in its place.
BROKEN = {
    "gaussian_2d": ("abar * VARIANCE + 1 - abar", "abar * VARIANCE + (1 - abar).sqrt()"),
    "four_pixels": ("abar.sqrt() * CLEAN +", "BETAS[:t].prod().sqrt() * CLEAN +"),
    "schedules": ("(root - root[-1]) * root[0]", "(root - root[-1])"),
    "weighted_losses": ('"v_prediction": lambda snr: snr + 1', '"v_prediction": lambda snr: snr'),
}


def run(path: Path, output: Path, *options) -> Child:
    """An example in a process of its own, to its end."""
    with Child(path, "--output", output, *options) as child:
        child.wait()
    return child


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_a_table_and_draws_a_picture(path, tmp_path):
    child = run(path, tmp_path / "picture.png")
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.count("|---") > 2
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] > 600 and pixels.std() > 10 and pixels[0, 0] == 255
    assert len(path.read_text().splitlines()) <= 120


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_a_broken_formula_ends_an_example(name, tmp_path):
    text, (formula, wrong) = (ROOT / f"examples/{name}.py").read_text(), BROKEN[name]
    assert text.count(formula) == 1
    (tmp_path / "show.py").write_text((ROOT / "examples/show.py").read_text())
    (tmp_path / f"{name}.py").write_text(text.replace(formula, wrong))
    child = run(tmp_path / f"{name}.py", tmp_path / "picture.png")
    assert child.returncode != 0 and "AssertionError" in child.stderr
    assert not (tmp_path / "picture.png").exists()
