"""Sharing a model: the exact content of a Hub repository, and its upload in one commit."""

import filecmp
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from diffusers.utils import make_image_grid
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from ldm_pipeline.loading import LDMPipeline
from ldm_pipeline.model_card import TrainingRecord, render_card, sampling_settings
from ldm_pipeline.pipeline import num_classes

PICTURES = ("samples.png", "reconstructions.png", "neighbours.png", "sweep.png")
FILES = ("README.md", "pipeline.py", "model_index.json", "training_config.yaml", "metrics.json", *PICTURES)
COMPONENTS = ("vae", "unet", "scheduler", "guide_unet", "text_encoder", "tokenizer")
# Files in the components' folders that an export makes. Other variants, such as fp16, are their owner's.
COMPONENT_FILE = re.compile(
    rf"({'|'.join(COMPONENTS)})/(scheduler_config|config|tokenizer|tokenizer_config|"
    r"(diffusion_pytorch_)?model(\.raw)?(-\d+-of-\d+)?|model\.safetensors\.index|"
    r"diffusion_pytorch_model\.safetensors\.index(\.raw)?)\.(json|safetensors)"
)


class HubError(ValueError):
    """An export or an upload that cannot be done; the message says what to change."""


# ----------------------------------------------------------------------------------------------------- export
def export_for_hub(
    pipe: LDMPipeline | str | Path,
    folder: str | Path,
    repo_id: str,
    license: str,
    *,
    title: str | None = None,
    dataset: str | None = None,
    source_url: str | None = None,
    record: TrainingRecord | None = None,
) -> Path:
    """Make `folder` the exact content of a Hub repository. An earlier export there is replaced as a whole.

    It gets model_index.json, pipeline.py, the components as safetensors, README.md and samples.png, which for
    a model of a task only a record has; from the record the other pictures, training_config.yaml,
    metrics.json, and the raw weights as the variant "raw".

    Args:
        pipe: a pipeline, or the folder of one.
        repo_id, license, title, dataset, source_url: see `ldm_pipeline.render_card`.
        record: facts of the training. It is published as it is; in a checkout,
            `training.runtime.record.read_record` makes one of a run folder, without paths of the machine.

    Returns:
        the folder.

    Raises:
        HubError: a name has another form, the folder holds something else, or it cannot be written.
        OSError, ValueError: there is no pipeline.
    """
    folder, record = Path(folder), record or TrainingRecord()
    check_names(repo_id, license, source_url)
    check_target(folder)
    if isinstance(pipe, str | Path):
        pipe = LDMPipeline.from_pretrained(pipe)
    with replacing(folder) as aside:
        pipe.save_pretrained(aside)
        if record.raw_weights:
            raw = aside / "unet" / "diffusion_pytorch_model.raw.safetensors"
            save_file(record.raw_weights, raw, {"format": "pt"})
        if record.config:
            text = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
            (aside / "training_config.yaml").write_text(text, encoding="utf-8")
        if record.metrics:
            (aside / "metrics.json").write_text(json.dumps(record.metrics, indent=2) + "\n", encoding="utf-8")
        for name, picture in record.pictures.items():
            shutil.copyfile(picture, aside / name)
        if "samples.png" not in record.pictures and pipe.task is None:  # a task needs images
            _sample_grid(pipe, record.metrics.get("prompts", [])).save(aside / "samples.png")
        pictures = tuple(name for name in PICTURES if (aside / name).exists())
        known = {"record": record, "title": title, "dataset": dataset, "source_url": source_url}
        card = render_card(pipe, repo_id, license, pictures=pictures, **known)
        (aside / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return folder


def check_names(repo_id: str, license: str, source_url: str | None = None) -> None:
    """Raises HubError unless all have the form that the Hub or pip wants."""
    for name, value, form, example in (
        ("repo_id", repo_id, r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b", "org/model"),
        ("license", license, r"[a-z0-9][a-z0-9.+-]*", "apache-2.0 or another identifier of the Hub"),
        ("source_url", source_url, r"https://[\w.-]+(:\d+)?(/[\w.~-]+)+", "https://github.com/org/name"),
    ):
        if value is not None and not re.fullmatch(form, value):
            raise HubError(f"{name} {value!r}: wanted a value such as {example}")


def check_target(folder: Path, own=(*FILES, *COMPONENTS), always=FILES[:3]) -> None:
    """Raises HubError unless `folder` is absent, empty, or holds an earlier export and nothing else.

    own: names that an export may have there; always: those that each has.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    foreign = names - set(own)
    if foreign or (names and not set(always) <= names):
        found = ", ".join(sorted(foreign or names)[:3])
        raise HubError(f"{folder}: {found} is not the export that it would replace; choose another folder")


def _sample_grid(pipe: LDMPipeline, prompts: list[str]) -> Image.Image:
    """Two rows of eight samples from fixed noise: of the prompts in turn, or the classes, evenly spread."""
    settings, classes = sampling_settings(pipe, {}), num_classes(pipe.denoiser)
    if classes:
        settings["class_labels"] = [i * classes // 16 if classes > 16 else i % classes for i in range(16)]
    if prompts:
        settings["prompt"] = [prompts[i % len(prompts)] for i in range(16)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    grid = make_image_grid(pipe(**settings, generator=generators).images, 2, 8)
    scale = max(1, 800 // grid.width)
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which afterwards takes the place of `folder`. An error leaves all as it was."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
            new, old = Path(aside) / "new", Path(aside) / "old"
            new.mkdir()
            yield new
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise HubError(f"{folder} cannot be written: {error}; make room or choose another folder") from error


# ----------------------------------------------------------------------------------------------------- upload
def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    verify: bool = False,
) -> str:
    """Upload the result of `export_for_hub` in one commit. The repository is created if need be.

    Files of an earlier export that are not in `folder` are deleted there. All other files stay.

    Args:
        private: make a new repository private. An existing one is never changed, and must be private then.
        revision: the branch, created if need be; default: main.
        tag: a new name for the commit.
        token: with the right to write; default: that of `hf auth login` or HF_TOKEN.
        verify: download the commit, and compare every file.

    Returns:
        the address of the commit.

    Raises:
        HubError: `folder` is no export, there is no token, the repository is public and should not be, the
            Hub refused, or the connection failed. The folder stays, and the same call tries again.
    """
    folder, token = Path(folder), require_token(token)
    check_target(folder)
    if not (folder / "README.md").is_file():
        raise HubError(f"{folder} holds no export; make one by export_for_hub()")
    api = HfApi(token=token)
    with explained(f"the upload to {repo_id}"):
        commit = commit_folder(api, folder, repo_id, is_own, private, revision)
        if tag:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    if verify:
        with explained(f"the download of {repo_id}"), tempfile.TemporaryDirectory() as copy:
            api.snapshot_download(repo_id, revision=commit.oid, local_dir=copy)
            _, different, missing = filecmp.cmpfiles(folder, copy, files_in(folder), shallow=False)
            if different or missing:
                raise HubError(
                    f"{repo_id} has another {(different + missing)[0]} than {folder}; upload it again"
                )
    return commit.commit_url


def files_in(folder: Path) -> list[str]:
    """Names of all files below a folder, as the Hub has them."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def is_own(name: str) -> bool:
    """Whether an export makes files of that name."""
    return name in FILES or COMPONENT_FILE.fullmatch(name) is not None


def commit_folder(
    api: HfApi, folder: Path, repo_id: str, is_own: Callable, private: bool, revision=None, **kind: str
) -> CommitInfo:
    """One commit of all of a folder to a repository, which is created if need be.

    is_own: whether a file of that name is deleted there if the folder has none.
    kind: arguments of `HfApi.create_repo` for another kind of repository than a model's.
    """
    names, of_kind = files_in(folder), {"repo_type": kind.get("repo_type")}
    api.create_repo(repo_id, private=private, exist_ok=True, **kind)
    if private and not api.repo_info(repo_id, **of_kind).private:
        raise HubError(f"{repo_id} is public: make it private on the Hub, or choose another repository")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True, **of_kind)
    there = api.list_repo_files(repo_id, revision=revision, **of_kind)
    stale = {name for name in there if is_own(name)} - {*names}
    # Not upload_folder(): with hf_xet it may make several commits.
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, folder / name) for name in names),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ],
        commit_message="Upload a latent diffusion model",
        revision=revision,
        **of_kind,
    )


def require_token(token: str | None = None) -> str:
    """`token`, or that of this machine. Raises HubError if there is none."""
    if not (token := token or get_token()):
        raise HubError("no access token; run `hf auth login`, or set HF_TOKEN to a token that may write")
    return token


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Failures of the network, of the Hub and of the disk as HubError, in the words of the library."""
    try:
        yield
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: hf_xet has no class of its own
        text = " ".join(str(error).split())[:500]
        raise HubError(
            f"{what} failed ({type(error).__name__}: {text}); check the connection, and that your token "
            "(`hf auth login` or HF_TOKEN) may write there"
        ) from error
