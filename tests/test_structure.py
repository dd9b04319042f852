"""The structure that keeps this small: one direction of imports, a README that tells the truth."""

import ast
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from ldm_pipeline import __main__ as command_line
from training import publish_ldm
from training.config import parse_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# From what people run down to what everything rests on. A module imports from its own layer and those below.
LAYERS = (
    "train_ldm train_autoencoder encode_latents train_denoiser evaluate_ldm publish_ldm",
    "stages",
    "dry_run sizing",
    "speeds plan",
    "recipes",
    "evaluation",
    "runtime",
    "networks losses",
    "data",
    "config",
    "options",
)


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def modules(folder: str) -> dict[str, Path]:
    """Our modules below a folder, by their dotted names."""
    paths = (path for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "__init__.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def test_imports_point_one_way_from_layer_to_layer():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
    for name, path in modules("training").items():
        own = layer[name.split(".")[1]]
        for other in imports(path) & modules("training").keys():
            assert own <= layer[other.split(".")[1]], f"{name} imports {other}, which is above it"
            assert own > 0 or own < layer[other.split(".")[1]] or name == "training.train_ldm", (name, other)


def test_the_package_imports_nothing_of_the_checkout_and_the_pipeline_nothing_of_ours():
    for name, path in modules("ldm_pipeline").items():
        assert not {n for n in imports(path) if n.split(".")[0] in ("training", "benchmarks", "tests")}, name
    assert not {n for n in imports(ROOT / "ldm_pipeline/pipeline.py") if n.startswith((".", "ldm_pipeline"))}


def test_no_modules_import_each_other_in_a_circle():
    ours = modules("training") | modules("ldm_pipeline")
    graph = {name: imports(path) & ours.keys() for name, path in ours.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_module_or_folder_hides_a_dependency():
    """The folder of a script is first on sys.path, so `import data` would find ours."""
    installed = {name for d in distributions() for name in (d.read_text("top_level.txt") or "").split()}
    installed |= {"datasets", "evaluate", "torch", "diffusers", "accelerate"} | sys.stdlib_module_names
    own = {path.stem for path in (ROOT / "training").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not (own - {"__init__", "__pycache__"}) & installed


def test_the_wheel_carries_the_package_alone(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ldm_pipeline"}
    assert "ldm_pipeline/model_card.md" in names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_configuration_is_valid(path):
    assert parse_config(["--config", str(path)]).output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_command_and_flag_of_a_page_exists(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    # Of a run of the reader.
    blocks = re.sub(r"runs/\w+/config.yaml", "training/configs/tiny.yaml", blocks)
    commands = re.findall(r"^(?:accelerate launch|python|make) (?:\\\n|.)*", blocks, re.MULTILINE)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
            continue
        if words[:3] == ["python", "-m", "ldm_pipeline"]:
            command_line.command_line().parse_args(words[3:])
            continue
        if words[:2] == ["python", "-m"]:
            assert find_spec(words[2]), command
            continue
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).exists(), command
        arguments = words[words.index(script) + 1 :]
        if script == "training/publish_ldm.py":
            publish_ldm.parse(arguments)
        elif script.startswith("training/"):
            parse_config(arguments)
    for flag in re.findall(r"`--((?:data|autoencoder|latents|denoiser|evaluation)\.\w+)", text):
        section, option = flag.split(".")
        assert hasattr(getattr(parse_config([]), section), option), flag


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_link_of_a_page_leads_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), f"{link}#{anchor}"
