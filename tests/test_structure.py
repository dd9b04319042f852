"""The structure that keeps this small: one direction of imports, a README that tells the truth."""

import ast
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import ROOT

from training import publish_ldm
from training.config import parse_config

SCRIPTS = {
    "train_ldm",
    "train_autoencoder",
    "encode_latents",
    "train_denoiser",
    "evaluate_ldm",
    "publish_ldm",
}
README = (ROOT / "README.md").read_text()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_imports_point_from_scripts_to_helpers_to_the_package():
    for path in (ROOT / "ldm_pipeline").glob("*.py"):
        assert not [
            name for name in imports(path) if name.split(".")[0] in ("training", "benchmarks", "tests")
        ], path
    assert not [
        n for n in imports(ROOT / "ldm_pipeline" / "pipeline.py") if n.startswith((".", "ldm_pipeline"))
    ]
    for path in (ROOT / "training").glob("*.py"):
        if path.stem != "train_ldm":
            assert not [n for n in imports(path) if n.removeprefix("training.") in SCRIPTS], path


def test_no_module_hides_a_dependency():
    installed = {name for d in distributions() for name in (d.read_text("top_level.txt") or "").split()}
    own = {path.stem for path in (ROOT / "training").glob("*.py")} - {"__init__"}
    assert not own & (
        installed | {"datasets", "evaluate", "torch", "diffusers", "accelerate"} | sys.stdlib_module_names
    )


def test_the_wheel_carries_the_package_alone(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ldm_pipeline"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_configuration_is_valid(path):
    assert parse_config(["--config", str(path)]).output_dir == f"runs/{path.stem}"


def test_every_command_and_flag_of_the_readme_exists(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^(?:accelerate launch|python|make) (?:\\\n|.)*", README, re.MULTILINE)
    assert len(commands) >= 4
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
            continue
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).exists(), command
        arguments = words[words.index(script) + 1 :]
        if script == "training/publish_ldm.py":
            publish_ldm.parse(arguments)
        elif script.startswith("training/"):
            parse_config(arguments)
    for flag in re.findall(r"`--((?:data|autoencoder|latents|denoiser|evaluation)\.\w+)", README):
        section, option = flag.split(".")
        assert hasattr(getattr(parse_config([]), section), option), flag


def test_every_file_that_the_readme_links_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
