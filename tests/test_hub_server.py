"""The tests' Hub does what the real client asks of the real one."""

import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import http_backoff

from tests.hub_server import HubServer

ID = "ada/model"
WEIGHTS = "unet/weights.safetensors"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "max_wait_time", 0.01)
    with HubServer({"hf_ada": "ada", "hf_bob": "bob"}) as server:
        yield server


@pytest.fixture
def api(server):
    return HfApi(endpoint=server.url, token="hf_ada")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(os.urandom(300_000))
    (folder / "README.md").write_text("---\ntags: [latent]\nlibrary_name: diffusers\n---\nA model.\n")
    (folder / "with space & more.json").write_text("{}")
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_folder_becomes_one_commit_and_comes_back(server, api, folder, tmp_path):
    assert api.whoami()["name"] == "ada" and not api.repo_exists(ID)
    assert api.create_repo(ID).repo_id == ID and api.repo_exists(ID)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(ID)
    api.create_repo(ID, exist_ok=True)
    done = api.upload_folder(repo_id=ID, folder_path=folder, commit_message="First")
    assert [commit.title for commit in server.commits(ID)] == ["First", "initial commit"]
    assert server.commits(ID)[0].id == done.oid
    stored = server.files(ID)
    stored.pop(".gitattributes")
    assert stored == contents(folder)
    info = api.model_info(ID, files_metadata=True)
    sizes = {sibling.rfilename: sibling.lfs.size for sibling in info.siblings if sibling.lfs}
    assert (info.sha, info.tags, info.library_name, sizes) == (
        done.oid,
        ["latent"],
        "diffusers",
        {WEIGHTS: 300_000},
    )
    for name, content in stored.items():
        path = api.hf_hub_download(ID, name, cache_dir=tmp_path / "cache")
        assert open(path, "rb").read() == content
    assert {entry.path for entry in api.list_repo_tree(ID)} == {*stored, ".gitattributes", "unet"} - {WEIGHTS}


def test_a_second_push_sends_what_changed(server, api, folder):
    api.create_repo(ID)
    first = api.upload_folder(repo_id=ID, folder_path=folder)
    (folder / "README.md").write_text("---\ntags: [more]\n---\n")
    (folder / "with space & more.json").unlink()
    (folder / "copy.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    server.requests.clear()
    api.upload_folder(repo_id=ID, folder_path=folder, delete_patterns="*")
    assert "PUT" not in {method for method, _ in server.requests}
    assert set(server.files(ID)) == {"README.md", ".gitattributes", WEIGHTS, "copy.safetensors"}
    assert api.upload_folder(repo_id=ID, folder_path=folder).oid == api.model_info(ID).sha
    assert len(server.commits(ID)) == 3
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(repo_id=ID, path_or_fileobj=b"1", path_in_repo="a", parent_commit=first.oid)
    with pytest.raises(EntryNotFoundError):
        api.delete_file("missing", ID)
    with pytest.raises(ValueError, match="mapping"):
        api.upload_file(repo_id=ID, path_or_fileobj=b"---\n- list\n---\n", path_in_repo="README.md")


def test_branches_and_tags_are_revisions(server, api, folder, tmp_path):
    api.create_repo(ID)
    first = api.upload_folder(repo_id=ID, folder_path=folder)
    api.create_tag(ID, tag="v1")
    api.create_branch(ID, branch="with/slash")
    api.upload_file(repo_id=ID, path_or_fileobj=b"new", path_in_repo="new.txt", revision="with/slash")
    assert "new.txt" in api.list_repo_files(ID, revision="with/slash")
    assert "new.txt" not in api.list_repo_files(ID, revision="v1")
    refs = api.list_repo_refs(ID)
    assert {branch.name for branch in refs.branches} == {"main", "with/slash"}
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first.oid}
    for revision in ("v1", "with/slash", first.oid):
        path = api.hf_hub_download(ID, WEIGHTS, revision=revision, cache_dir=tmp_path / "cache")
        assert open(path, "rb").read() == (folder / WEIGHTS).read_bytes()
    with pytest.raises(RevisionNotFoundError):
        api.model_info(ID, revision="v2")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(ID, "new.txt", revision="v1", cache_dir=tmp_path / "cache")


def test_a_private_repository_is_nobody_elses(server, api, folder):
    api.create_repo(ID, private=True)
    assert api.model_info(ID).private
    for token in (False, "hf_wrong", "hf_bob"):
        other = HfApi(endpoint=server.url, token=token)
        with pytest.raises(RepositoryNotFoundError):
            other.model_info(ID)
        with pytest.raises(RepositoryNotFoundError):
            other.hf_hub_download(ID, ".gitattributes", cache_dir=folder)
        with pytest.raises(RepositoryNotFoundError):
            other.upload_folder(repo_id=ID, folder_path=folder)
        with pytest.raises(HfHubHTTPError, match="401|403"):
            other.create_repo("ada/other")
    api.update_repo_settings(ID, private=False)
    assert not HfApi(endpoint=server.url, token=False).model_info(ID).private
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=server.url, token="hf_bob").upload_folder(repo_id=ID, folder_path=folder)


def test_a_cut_upload_leaves_no_commit(server, api, folder):
    api.create_repo(ID)
    server.cut_after(100_000, times=6)  # as often as the client tries
    with pytest.raises(RuntimeError, match=WEIGHTS):
        api.upload_folder(repo_id=ID, folder_path=folder)
    assert len(server.commits(ID)) == 1 and len(server.repositories[ID].objects) == 1
    server.cut_after(100_000)  # once: the client goes on by itself
    api.upload_folder(repo_id=ID, folder_path=folder)
    assert len(server.commits(ID)) == 2 and server.files(ID)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


def test_a_cut_download_is_resumed_and_the_cache_serves_offline(server, api, folder, tmp_path):
    api.create_repo(ID)
    api.upload_folder(repo_id=ID, folder_path=folder)
    server.cut_after(100_000, method="GET")
    options = {"endpoint": server.url, "token": False, "cache_dir": tmp_path / "cache"}
    snapshot = snapshot_download(ID, **options)
    assert sum(WEIGHTS in path for method, path in server.requests if method == "GET") == 2
    shutil.rmtree(folder)
    script = f"from huggingface_hub import snapshot_download; print(snapshot_download({ID!r}))"
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    server.requests.clear()
    finished = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True
    )
    assert finished.stdout.strip() == snapshot and not server.requests, finished.stderr


def test_a_client_with_xet_pushes_everything_in_the_commit(monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with HubServer({"hf_ada": "ada"}, lfs=False) as server:
        api = HfApi(endpoint=server.url, token="hf_ada")
        api.create_repo(ID)
        api.upload_folder(repo_id=ID, folder_path=folder)
        assert len(server.commits(ID)) == 2 and contents(folder).items() <= server.files(ID).items()
