"""Every example runs and holds its closed form; the two pages that show them say what they print."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fork_server import Child
from PIL import Image

FOLDER = ROOT / "examples"
EXAMPLES = [path.stem for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text()]
HELPERS = ("show.py", "digits.py")
# Those that train, in a moment instead of one or two minutes; their figures mean nothing then.
SHORT = {
    "latents_or_pixels": ("--seconds", "0.5", "--samples", "20"),
    "vae_is_not_diffusion": ("--steps", "4", "--samples", "20"),
    "ldm_in_100_lines": ("--steps", "4"),
}
# A formula of each example, and a wrong one in its place.
BROKEN = {
    "gaussian_2d": ("abar * VARIANCE + 1 - abar", "abar * VARIANCE + (1 - abar).sqrt()"),
    "four_pixels": ("abar.sqrt() * CLEAN +", "BETAS[:t].prod().sqrt() * CLEAN +"),
    "schedules": ("(root - root[-1]) * root[0]", "(root - root[-1])"),
    "weighted_losses": ('"v_prediction": lambda snr: snr + 1', '"v_prediction": lambda snr: snr'),
    "latents_or_pixels": ("2 * side**2 * full", "side**2 * full"),
    "vae_is_not_diffusion": ("- covariance.logdet()", "+ covariance.logdet()"),
    "ldm_in_100_lines": ("labels).sample, noise - clean)", "labels).sample, clean - noise)"),
}
ENGLISH, CHINESE = ((ROOT / f"docs/{name}").read_text() for name in ("learn.md", "learn.zh.md"))


def run(path: Path, output: Path, *options, wait: float = 300) -> Child:
    """An example in a process of its own, to its end."""
    with Child(path, "--output", output, *options) as child:
        child.wait(wait)
    return child


def tables(text: str) -> dict[str, list[str]]:
    """Rows of the tables of a text, by their headers."""
    found = re.findall(r"^(\|.*\|)\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    return {header: rows.splitlines() for header, rows in found}


def numbers(rows: list[str]) -> list[float]:
    return [float(each) for row in rows for each in re.findall(r"(?<![\w^])-?\d+(?:\.\d+)?(?:e-?\d+)?", row)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_draws_a_picture_and_prints_the_tables_of_the_page(name, tmp_path):
    child = run(FOLDER / f"{name}.py", tmp_path / "picture.png", *SHORT.get(name, ()))
    assert child.returncode == 0, child.stderr[-3000:]
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] > 600 and pixels.std() > 10 and pixels[0, 0] == 255
    printed, shown = tables(child.stdout), tables(ENGLISH)
    assert printed and printed.keys() <= shown.keys()
    for header, rows in printed.items():
        assert len(rows) == len(shown[header])
        if name not in SHORT:
            assert numbers(rows) == pytest.approx(numbers(shown[header]), rel=0.02, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_training_of_full_length_learns_what_the_page_says(name, tmp_path):
    printed = tables(run(FOLDER / f"{name}.py", tmp_path / "picture.png", wait=1200).stdout)
    *_, first, last = [row.split("|")[1:-1] for rows in printed.values() for row in rows]
    if name == "ldm_in_100_lines":  # the loss of the denoiser falls to a fraction
        assert float(last[-1]) < 0.4 * float(last[-2])
    else:  # the Frechet distance of an LDM is the lowest
        column = next(iter(printed)).split("|")[1:-1].index(" Frechet distance ")
        assert float(last[column]) < 0.8 * float(first[column])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_broken_formula_ends_an_example(name, tmp_path):
    text, (formula, wrong) = (FOLDER / f"{name}.py").read_text(), BROKEN[name]
    assert text.count(formula) == 1
    for helper in HELPERS:
        (tmp_path / helper).write_text((FOLDER / helper).read_text())
    (tmp_path / f"{name}.py").write_text(text.replace(formula, wrong))
    child = run(tmp_path / f"{name}.py", tmp_path / "picture.png", *SHORT.get(name, ()))
    assert child.returncode != 0 and "AssertionError" in child.stderr
    assert not (tmp_path / "picture.png").exists()


def test_an_example_is_read_in_a_few_minutes():
    assert set(EXAMPLES) == BROKEN.keys() and len(EXAMPLES) == 7
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 120, path


def places(page: str) -> list[tuple[str, str]]:
    """Files and their functions, classes and methods that a page names, as `path.py: name`."""
    return re.findall(r"`([\w/]+\.py): ([\w.]+)`", page)


@cache
def defined(path: Path) -> set[str]:
    """Dotted names of the functions, classes and methods of a file."""
    names: set[str] = set()

    def visit(body: list, prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(path.read_text()).body, "")
    return names


def test_every_place_in_the_code_that_the_pages_name_exists():
    assert len(places(ENGLISH)) > 20
    for path, name in places(ENGLISH) + places(CHINESE):
        assert name in defined(ROOT / path), f"{path}: {name}"


@pytest.mark.parametrize(
    "pattern",
    [
        r"`([\w/]+\.py: [\w.]+)`",
        r"!\[.*?\]\((.*?)\)",
        r"\$\$(.+?)\$\$",
        r"(?<!\$)\$([^$]+)\$(?!\$)",
        r"```bash\n(.*?)```",
        r"`(--[\w.]+)`",
        r"\((https?://[^)]+)\)",
        r"<summary>",
    ],
    ids=("places", "pictures", "displayed formulas", "formulas", "commands", "options", "sources", "answers"),
)
def test_both_pages_have_the_same(pattern):
    found = [
        Counter(re.sub(r"\s+", " ", each) for each in re.findall(pattern, page, re.MULTILINE | re.DOTALL))
        for page in (ENGLISH, CHINESE)
    ]
    assert found[0] == found[1] and sum(found[0].values()) > 3


def test_both_pages_show_the_same_tables_and_every_picture():
    english, chinese = tables(ENGLISH), tables(CHINESE)
    chinese = {header: rows for header, rows in chinese.items() if header.isascii()}  # the scripts' own
    assert chinese.items() <= english.items() and len(chinese) >= len(EXAMPLES)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", ENGLISH):
        assert (ROOT / "docs" / picture).exists(), picture
