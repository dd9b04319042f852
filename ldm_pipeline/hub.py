"""Sharing a model: the exact content of a Hub repository, and its upload."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError

from ldm_pipeline.card import check_names, render_card
from ldm_pipeline.card_parts import sampling_settings
from ldm_pipeline.pipeline import LDMPipeline, num_classes
from ldm_pipeline.run_files import RunFiles, find_run, raw_weights, read_run

COMPONENTS = ("vae", "unet", "scheduler")
PICTURES = {
    "samples.png": "samples/samples.png",
    "reconstructions.png": "samples/reconstructions.png",
    "neighbours.png": "samples/neighbours.png",
    "sweep.png": "sweep/plot.png",
}
OF_THE_DATA = {"reconstructions.png", "neighbours.png"}  # these show images that were trained on or held out
FILES = ("model_index.json", "pipeline.py", "README.md", "training_config.yaml", "metrics.json", *PICTURES)
# All that an export may hold; whatever else a repository has is its owner's, and left alone.
PATTERNS = [*FILES, *(f"{name}/*" for name in COMPONENTS)]


class HubError(ValueError):
    """The Hub, or the way there, refused; the local folder is complete, and the same call tries again."""


# ----------------------------------------------------------------------------------------------------- export
def export_for_hub(
    source: LDMPipeline | str | Path,
    folder: str | Path,
    repo_id: str,
    license: str,
    *,
    title: str | None = None,
    dataset: str | None = None,
    show_data: bool = True,
) -> Path:
    """Make `folder` the exact content of a Hub repository; an earlier export there is replaced whole.

    It gets model_index.json, pipeline.py, the components as safetensors (of a run: the averaged weights, and
    those of the denoiser's last step as the variant "raw"), README.md, samples.png and, as far as the run has
    them, other pictures, training_config.yaml and metrics.json. No path of this machine is in any of them.

    Args:
        source: a run folder, a pipeline folder, or a pipeline.
        repo_id: the repository, "org/model", that the card's snippet names.
        license: the Hub's identifier of the licence of the weights, such as "apache-2.0".
        title: the card's; default: "Latent diffusion on" and the name of the data.
        dataset: a Hub id or a name for the data, instead of what the run's configuration says.
        show_data: False leaves out the pictures that show images of the data.

    Returns:
        the folder.

    Raises:
        ValueError: there is no pipeline, an identifier has another form, a file of the run is damaged, the
            folder is neither empty nor an export, or it cannot be written.
    """
    folder = Path(folder)
    check_names(repo_id, license)
    check_target(folder)
    run = None if isinstance(source, LDMPipeline) else find_run(Path(source))
    found = read_run(run, dataset) if run else RunFiles.of_dataset(dataset)
    pipe = source
    if not isinstance(source, LDMPipeline):
        pipe = LDMPipeline.from_pretrained(run / "pipeline" if run else source)
    raw = raw_weights(run, pipe.unet.state_dict()) if run else None
    with _replacing(folder) as aside:
        pipe.save_pretrained(aside)
        if found.config:
            text = yaml.safe_dump(found.config, sort_keys=False, allow_unicode=True)
            (aside / "training_config.yaml").write_text(text, encoding="utf-8")
        if found.metrics:
            (aside / "metrics.json").write_text(json.dumps(found.metrics, indent=2) + "\n", encoding="utf-8")
        pictures = _pictures(run, aside, pipe, found, show_data)
        known = {"run": found, "title": title, "pictures": pictures, "raw": raw is not None}
        card = render_card(pipe, repo_id, license, **known)
        (aside / "README.md").write_text(card, encoding="utf-8", newline="\n")
        if raw is not None:  # last: these replace the averaged weights, in a pipeline that was loaded here
            pipe.unet.load_state_dict(raw)
            pipe.unet.save_pretrained(aside / "unet", variant="raw")
    return folder


def check_target(folder: Path) -> None:
    """ValueError unless an export may be made at `folder`: nothing is there, or an earlier export alone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another folder for the export")
    names = {path.name for path in folder.iterdir()}
    if foreign := sorted(names - {*FILES, *COMPONENTS}):
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:3])}, which an export does not make; choose another folder"
        )
    if names and not {"README.md", "pipeline.py", "model_index.json"} <= names:
        raise ValueError(f"{folder} is not empty and no earlier export; choose another folder")


def _pictures(run: Path | None, target: Path, pipe, found: RunFiles, show_data: bool) -> tuple[str, ...]:
    """Copy the run's pictures; samples are drawn where there are none. Returns the names."""
    for name, source in PICTURES.items():
        if run and (run / source).is_file() and (show_data or name not in OF_THE_DATA):
            shutil.copyfile(run / source, target / name)
    if not (target / "samples.png").exists():
        settings = sampling_settings(pipe, found.metrics.get("samples", {}).get("protocol", {}))
        images = draw(pipe, settings, 16)
        scale = max(1, 800 // (8 * images.shape[2]))
        grid = np.concatenate([np.concatenate([*row], 1) for row in (images[:8], images[8:])])
        grid = grid.repeat(scale, 0).repeat(scale, 1)
        Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(target / "samples.png")
    return tuple(name for name in PICTURES if (target / name).exists())


def draw(pipe: LDMPipeline, settings: dict, count: int) -> np.ndarray:
    """Pictures (N, H, W, C) uint8 of the classes in turn, or evenly among many, from fixed noise."""
    classes = num_classes(pipe.denoiser)
    if classes:
        labels = [i * classes // count if classes > count else i % classes for i in range(count)]
        settings = settings | {"class_labels": labels}
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images = pipe(**settings, generator=generators, output_type="np").images
    return (images * 255).round().astype(np.uint8)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which afterwards takes the place of `folder`; an error leaves all as it was."""
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in (aside, old):
            shutil.rmtree(path, ignore_errors=True)
        aside.mkdir()
        yield aside
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} cannot be written: {error}; make room or choose another folder"
        ) from error
    finally:
        for path in (aside, old):
            shutil.rmtree(path, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- upload
def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    verify: bool = True,
) -> str:
    """Upload what `export_for_hub` made, in one commit, to a repository that is created if need be.

    Files of an earlier export that this one lacks are deleted there; whatever else the repository has stays.

    Args:
        private: make a new repository private; an existing one is never changed, and must be private then.
        revision: the branch, created if need be; None: main.
        tag: a name for the commit.
        token: with the right to write; None: that of `hf auth login` or HF_TOKEN.
        verify: download the commit, draw a picture, and compare it with one of `folder`.

    Returns:
        the address of the commit.

    Raises:
        ValueError: `folder` is no export, there is no token, the tag is of another commit, or the repository
            is public and should not be.
        HubError: the Hub refused, the connection failed, or what was downloaded draws something else.
    """
    folder, token = Path(folder), require_token(token)
    validate_repo_id(repo_id)
    check_target(folder)
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} holds no export; make one by export_for_hub()")
    api = HfApi(token=token)
    with _explained(f"the upload to {repo_id}", repo_id):
        tags = _prepare(api, repo_id, private, revision, tag)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload a latent diffusion model",
            allow_patterns=PATTERNS,
            delete_patterns=PATTERNS,
        )
        if tag and tag not in tags:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    if tag in tags and tags[tag] != commit.oid:
        raise ValueError(
            f"{commit.commit_url} is there, but {tag} is a tag of another commit; choose another"
        )
    if verify:
        verify_upload(folder, repo_id, commit.oid, token)
    return commit.commit_url


def require_token(token: str | None = None) -> str:
    """`token`, or that of this machine. ValueError if there is none."""
    if not (token := token or get_token()):
        raise ValueError("no access token; run `hf auth login`, or set HF_TOKEN to a token that may write")
    return token


def _prepare(api: HfApi, repo_id: str, private: bool, revision: str | None, tag: str | None) -> dict:
    """A repository and a branch to upload to; returns the commits of its tags."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id} is there already, and public: make it private in its settings on the Hub, or choose "
            "another repo_id, or private=False"
        )
    refs = api.list_repo_refs(repo_id)
    tags, branches = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.tags, refs.branches))
    if tag in tags and tags[tag] != branches.get(revision or "main"):
        raise ValueError(f"{repo_id} has a tag {tag} of another commit; choose another tag")
    if revision and revision not in branches:
        api.create_branch(repo_id, branch=revision)
    return tags


def verify_upload(folder: Path, repo_id: str, revision: str, token: str | None = None) -> None:
    """Download a model anew and draw with it. HubError unless the picture is that of the local `folder`."""
    pictures = []
    with tempfile.TemporaryDirectory() as cache, _explained(f"the download of {repo_id}", repo_id):
        options = {"revision": revision, "token": token, "cache_dir": cache}
        for source, given in ((folder, {}), (repo_id, options)):
            pipe = LDMPipeline.from_pretrained(source, **given)
            pipe.set_progress_bar_config(disable=True)
            pictures.append(draw(pipe, sampling_settings(pipe, {}), 1))
            del pipe  # a large model may not fit twice
    if not np.array_equal(*pictures):
        raise HubError(f"{repo_id} at {revision} draws another picture than {folder}; upload it again")


@contextmanager
def _explained(what: str, repo_id: str) -> Iterator[None]:
    """Failures of the network and of the disk as HubError, with what to do."""
    hints = {
        401: "the token is wrong or has expired: run `hf auth login`, or set HF_TOKEN",
        403: f"the token may not write to {repo_id}: use one that may, or choose another repo_id",
        404: f"the token shows no {repo_id}: check the name and the token's rights",
    }
    try:
        yield
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: hf_xet has no class of its own
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = hints.get(status, f"{constants.ENDPOINT} refused" if status else "no answer")
        if getattr(error, "errno", None) == errno.ENOSPC:
            hint = "the disk is full"
        elif status is None:
            hint = f"{constants.ENDPOINT} cannot be reached, or the connection broke"
        text = " ".join(str(error).split())[:300]
        raise HubError(f"{what} failed: {hint} ({type(error).__name__}: {text})") from error
