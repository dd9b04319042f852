"""A model's page as a Space of the Hub: the exact content of its repository, and its upload in one commit."""

import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData

from ldm_pipeline.hub import (
    HubError,
    check_names,
    check_target,
    commit_folder,
    explained,
    replacing,
    require_token,
)

# The part of this package that draws and shows. It travels, byte for byte, as pip could not install it there.
MODULES = ("__init__", "pipeline", "loading", "editing", "commands", "tabs", "fields", "app")
FILES = ("README.md", "app.py", "requirements.txt")
PINNED = ("diffusers", "huggingface_hub", "numpy", "pillow", "safetensors")
PYTHON = "3.12"
APP = '''"""The page of {model}."""

from ldm_pipeline.app import main

main({model!r}, {prompts!r})
'''


def export_space(
    folder: str | Path, repo_id: str, license: str, title: str | None = None, text: bool = False, prompts=()
) -> Path:
    """Make `folder` the exact content of a Space, of the same name as the model `repo_id` that it shows.

    Args:
        license: of the Space: an identifier of the Hub.
        title: default: the name.
        text: whether the model has a text encoder, which needs transformers.
        prompts: examples for it.

    Raises:
        HubError: a name has another form, the folder holds something else, or Gradio is not installed.
    """
    check_names(repo_id, license)
    versions = {"sdk": "gradio", "sdk_version": check_space(folder), "python_version": PYTHON}
    title = title or repo_id.split("/")[1]
    front = SpaceCardData(title=title, **versions, app_file="app.py", license=license, models=[repo_id])
    packages, about = [*PINNED, *["transformers"] * text], f"Draw and edit with the model `{repo_id}`."
    contents = {
        "README.md": f"---\n{front.to_yaml()}\n---\n\n# {title}\n\n{about}\n",
        "requirements.txt": "".join(f"{name}=={version(name)}\n" for name in packages) + "torch\n",
        "app.py": APP.format(model=repo_id, prompts=list(prompts)),
    }
    with replacing(Path(folder)) as aside:
        (aside / "ldm_pipeline").mkdir()
        for name in MODULES:
            shutil.copyfile(Path(__file__).with_name(f"{name}.py"), aside / "ldm_pipeline" / f"{name}.py")
        for name, content in contents.items():
            (aside / name).write_text(content, encoding="utf-8", newline="\n")
    return Path(folder)


def check_space(folder: str | Path) -> str:
    """Gradio's version, for a Space. HubError if none is installed, or the folder holds something else."""
    check_target(Path(folder), (*FILES, "ldm_pipeline"), FILES)
    try:
        return version("gradio")
    except PackageNotFoundError:
        raise HubError("a Space needs Gradio's version: pip install -e '.[app]' in the checkout") from None


def push_space(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload the result of `export_space` in one commit; the Space is created if need be.

    Files of an earlier export that are not in `folder` are deleted there. All other files stay.

    Returns:
        the address of the commit.

    Raises:
        HubError: as `push_to_hub` does.
    """
    kind, api = {"repo_type": "space", "space_sdk": "gradio"}, HfApi(token=require_token(token))
    with explained(f"the upload to the Space {repo_id}"):
        commit = commit_folder(api, Path(folder), repo_id, is_own, private, **kind)
    return commit.commit_url


def is_own(name: str) -> bool:
    """Whether an export makes files of that name."""
    return name in FILES or re.fullmatch(r"ldm_pipeline/\w+\.py", name) is not None
