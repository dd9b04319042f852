"""What a run folder says of its model, without anything that only concerns the machine it lies on."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_pipeline.pipeline import read_json

STAGES = ("autoencoder", "latents", "denoiser")
_SECRET = re.compile(r"\bhf_\w{8,}|(?<=://)[^/@\s]+(?=@)")
_FOLDERS = re.compile(r"(?<![\w.:/\\])(?:file://)?(?:~?/|[A-Za-z]:[\\/])(?:[^\s,;:'\"|/\\]+[\\/])*")


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says, each part empty where it is absent, without paths of its machine."""

    config: dict = field(default_factory=dict)
    done: dict = field(default_factory=dict)  # by stage
    metrics: dict = field(default_factory=dict)
    sweep: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)  # images by split
    dataset: str | None = None
    is_hub_id: bool = False

    @classmethod
    def of_dataset(cls, dataset: str | None) -> "RunFiles":
        """Of no run: the name of the data alone."""
        return cls(dataset=shareable(dataset), is_hub_id=_is_hub_id(dataset or ""))

    def section(self, name: str) -> dict:
        """A part of the configuration, such as "data"."""
        return self.config.get(name) or {}


def find_run(source: Path) -> Path | None:
    """`source` if it is a run folder with a pipeline, None if a pipeline folder; ValueError if neither."""
    if (source / "pipeline" / "model_index.json").is_file():
        return source
    if (source / "model_index.json").is_file():
        return None
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; wanted a run folder or a pipeline folder")
    raise ValueError(
        f"{source} has neither pipeline/model_index.json, which a run has once its denoiser is trained, nor "
        "model_index.json; wanted a run folder or a pipeline folder"
    )


def read_run(run: Path, dataset: str | None = None) -> RunFiles:
    """Read the JSON and YAML files of a run folder.

    Args:
        dataset: a name or Hub id that replaces the configuration's own, often a folder, everywhere.

    Raises:
        ValueError: a file is damaged.
    """
    config = _read_yaml(run / "config.yaml")
    used = str(config.get("data", {}).get("dataset") or "")
    named = shareable(dataset or used)
    if used:
        config["data"] |= {"dataset": named}
    pattern = re.compile(rf"(?<=images of ){re.escape(_last_part(used))}(?!\w)")

    def read(name: str) -> dict:
        tree = shareable(read_json(run / name)) if (run / name).exists() else {}
        return json.loads(pattern.sub(json.dumps(named)[1:-1].replace("\\", r"\\"), json.dumps(tree)))

    done = {stage: read(f"{stage}/done.json") for stage in STAGES}
    metrics = read("metrics.json")
    metrics.pop("key", None)  # by which the evaluation knows whether it stands
    return RunFiles(
        config=shareable(config),
        done={stage: found for stage, found in done.items() if found},
        metrics=metrics,
        sweep=read("sweep/sweep.json"),
        counts=read("data.json").get("scan", {}).get("counts", {}),
        dataset=named or None,
        is_hub_id=_is_hub_id(dataset or used),
    )


def _read_yaml(path: Path) -> dict:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("data", {}), dict):
        raise ValueError(f"{path} is damaged: it holds no configuration of a run")
    return tree


def shareable(value):
    """A tree of JSON without tokens, and with the last part alone of each path of this machine."""
    if isinstance(value, dict):
        return {shareable(key): shareable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shareable(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = _last_part(value) if _is_local(value) else _FOLDERS.sub("", value)
    return _SECRET.sub("***", text)


def _is_hub_id(text: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)) and not _is_local(text)


def _is_local(text: str) -> bool:
    if "\n" in text or len(text) > 1000:
        return False
    rooted = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return rooted or text.startswith(("~", "./", "../", ".\\", "..\\")) or Path(text).exists()


def _last_part(text: str) -> str:
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1]


def raw_weights(run: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The denoiser's weights of its last step, without averaging; None if that checkpoint is gone.

    Args:
        wanted: the averaged weights.

    Raises:
        ValueError: the file is damaged, or has other weights.
    """
    done = run / "denoiser" / "done.json"
    steps = read_json(done).get("steps") if done.exists() else None
    path = run / "denoiser" / f"checkpoint-{steps}" / "model.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if key.startswith("unet.")]  # noqa: SIM118
            weights = {key.removeprefix("unet."): file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if {key: w.shape for key, w in weights.items()} != {key: w.shape for key, w in wanted.items()}:
        raise ValueError(f"{path} has other weights than the run's pipeline; the run is damaged")
    return weights
