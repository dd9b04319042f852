"""A model's page as a Space: what is pushed over real HTTP, and that it runs from what the Hub then has."""

import os
import re
import socket
import subprocess
import sys
import threading
from importlib.metadata import version

import numpy as np
import pytest
from gradio_client import Client
from huggingface_hub import SpaceCard
from PIL import Image

from ldm_pipeline import app
from ldm_pipeline.hub import HubError
from ldm_pipeline.space import MODULES, export_space, push_space
from tests.test_hub import ALICE, BOB, REPO, ROOT, files, hub, publish, quick_pipe  # noqa: F401, the fixture
from tests.test_pipeline import generators
from tests.test_structure import imports

# Where the checkout is importable too, the Space's own modules come first.
RUN = """
import pathlib, runpy, sys
sys.path.insert(0, "")
import ldm_pipeline
assert pathlib.Path(ldm_pipeline.__file__).resolve().parent.parent == pathlib.Path.cwd().resolve()
runpy.run_path("app.py", run_name="__main__")
"""


def pushed(server) -> dict[str, bytes]:
    content = server.content(server.spaces[REPO])
    return {path: each for path, each in content.items() if path != ".gitattributes"}


@pytest.fixture
def model(tmp_path):
    quick_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_space_is_pushed_beside_the_model_and_draws(hub, model, tmp_path, capsys):  # noqa: F811
    options = [model, "--repo_id", REPO, "--license", "mit", "--folder", tmp_path / "tiny", "--space", "true"]
    code, out, _ = publish(capsys, *options, "--dry_run")
    assert code == 0 and not hub.requests and "with the Space alice/tiny" in out
    assert all(f"/tiny-space/{name}" in out for name in files(tmp_path / "tiny-space"))
    code, out, _ = publish(capsys, *options)
    assert code == 0 and hub.spaces[REPO].at("main").id in out and hub.commits(REPO)[0].id in out

    found = pushed(hub)
    assert found == files(tmp_path / "tiny-space") and len(hub.spaces[REPO].commits) == 2
    for name in MODULES:
        assert found.pop(f"ldm_pipeline/{name}.py") == (ROOT / f"ldm_pipeline/{name}.py").read_bytes()
    assert set(found) == {"README.md", "app.py", "requirements.txt"}
    requirements = found["requirements.txt"].decode().split()
    assert f"diffusers=={version('diffusers')}" in requirements and "torch" in requirements
    card = SpaceCard(found["README.md"].decode())
    card.validate()
    assert card.data.models == [REPO] and card.data.sdk_version == version("gradio")
    assert (card.data.sdk, card.data.app_file, card.data.license) == ("gradio", "app.py", "mit")

    folder = tmp_path / "space"  # as the Hub would run it
    for name, content in pushed(hub).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    picture = drawn_by_space(folder, hub.url, tmp_path)
    assert np.array_equal(picture, quick_pipe()(class_labels="dog", generator=generators(3)).images[0])


def drawn_by_space(folder, endpoint, tmp_path) -> Image.Image:
    """A picture that the Space draws over HTTP, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    own |= {"PYTHONPATH": "", "GRADIO_SERVER_PORT": str(port), "HF_HUB_DISABLE_XET": "1"}
    log = tmp_path / "space.log"
    with log.open("w") as output:
        space = subprocess.Popen(
            [sys.executable, "-c", RUN], cwd=folder, env=os.environ | own, stdout=output, stderr=output
        )
    try:
        for _ in range(600):
            assert space.poll() is None, log.read_text()[-3000:]
            with socket.socket() as client:
                if not client.connect_ex(("127.0.0.1", port)):
                    break
            threading.Event().wait(0.2)  # the Hub of the tests takes away `sleep`
        given = ["dog", 1, 3, False, 3, 1, "UniPCMultistepScheduler"]
        answer = Client(f"http://127.0.0.1:{port}", verbose=False).predict(*given, api_name="/draw")
        with Image.open(answer[0][0]["image"]) as picture:
            return picture.copy()
    finally:
        space.kill()
        space.wait()


def test_what_travels_is_all_that_the_page_imports():
    folder = ROOT / "ldm_pipeline"
    for module in set(MODULES) - {"__init__"}:
        names = [re.sub(r"^(ldm_pipeline)?\.", "", name) for name in imports(folder / f"{module}.py")]
        ours = {name.split(".")[0] for name in names} & {path.stem for path in folder.glob("*.py")}
        assert ours <= set(MODULES), module


def test_a_space_of_a_vanished_model_says_so(hub, monkeypatch):  # noqa: F811
    pages = []
    monkeypatch.setattr(app, "serve", pages.append)
    app.main("alice/gone")
    told = [block.value for block in pages[0].blocks.values() if hasattr(block, "value")]
    assert "alice/gone cannot be loaded" in told[0] and "HF_TOKEN" in told[0]


def test_pushed_again_privately_and_by_another(hub, tmp_path):  # noqa: F811
    folder = export_space(tmp_path / "space", REPO, "mit", "Pets: all", text=True, prompts=["a 'red' heart"])
    assert "transformers==" in (folder / "requirements.txt").read_text()
    assert "\"a 'red' heart\"" in (folder / "app.py").read_text()
    url = push_space(folder, REPO, private=True)
    assert hub.spaces[REPO].private and hub.spaces[REPO].at("main").id in url
    repository = hub.spaces[REPO]
    mine = {"notes.md": repository.store(b"mine"), "ldm_pipeline/old.py": repository.store(b"old")}
    repository.commit("main", "by hand", repository.at("main").files | mine)
    push_space(folder, REPO, private=True)
    assert pushed(hub) == files(folder) | {"notes.md": b"mine"}
    with pytest.raises(HubError, match="upload to the Space alice/tiny failed.*403"):
        push_space(folder, REPO, token=BOB)
    repository.private = False
    with pytest.raises(HubError, match="alice/tiny is public"):
        push_space(folder, REPO, private=True, token=ALICE)


def test_folders_of_something_else_stay(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(HubError, match="mine.txt is not the export"):
        export_space(tmp_path, REPO, "mit")
    monkeypatch.setattr("ldm_pipeline.space.PackageNotFoundError", KeyError)
    monkeypatch.setattr("ldm_pipeline.space.version", {}.__getitem__)
    with pytest.raises(HubError, match="needs Gradio's version: pip install"):
        export_space(tmp_path / "space", REPO, "mit")
