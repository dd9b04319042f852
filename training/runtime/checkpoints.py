"""Checkpoints: a stage continues from the newest as if it had never stopped."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.config import OptimizationConfig, RunError
from training.runtime.atomic import discard, read_json, replacing, write_json
from training.runtime.distributed import fill, reshard, whole


def found_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(paths, key=_step_of)


def ema_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The EMA weights in a checkpoint, by parameter name. RunError if they cannot be read."""
    try:
        return load_file(checkpoint / "ema.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{checkpoint / 'ema.safetensors'} cannot be read: {error}") from error


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[-1])


class Checkpoints:
    """The checkpoints of one stage: `<folder>/checkpoint-<step>`, each whole or absent.

    A checkpoint holds one safetensors file for each network, its EMA weights and each optimizer, and
    `state.json` with the step and the loop's record. No pickle.

    Args:
        folder: the stage's folder.
        states: networks, EMA and optimizers, by file name without suffix.
        config: of the stage; says which checkpoints are kept.
    """

    def __init__(self, folder: Path, states: dict[str, Any], config: OptimizationConfig):
        self.folder = folder
        self.states = states
        self.config = config

    def save(self, accelerator: Accelerator, step: int, record: dict) -> None:
        """Write checkpoint `step` with `record`, then drop old checkpoints; every process calls this.

        Raises:
            RunError: if it cannot be written, or a weight is not finite; the older checkpoints stay.
        """
        files: dict[str, dict[str, Tensor]] = {name: {} for name in self.states}
        for name, state in self.states.items():
            for key, value in _tensors_of(state).items():
                value = whole(value)  # one tensor at a time, as it may be larger than the shards
                if accelerator.is_main_process:
                    files[name][key] = value.cpu().contiguous()
        if accelerator.is_main_process:
            self._save(step, record, files)
        accelerator.wait_for_everyone()

    def _save(self, step: int, record: dict, files: dict[str, dict[str, Tensor]]) -> None:
        for name, tensors in files.items():
            if bad := [key for key, value in tensors.items() if not value.isfinite().all()]:
                raise RunError(
                    f"{name} is not finite after step {step} ({bad[0]}), so it is not saved: lower "
                    f"--{self.folder.name}.learning_rate"
                )
        size = sum(value.nbytes for tensors in files.values() for value in tensors.values())
        self.folder.mkdir(exist_ok=True)
        with replacing(self.folder / f"checkpoint-{step}", size) as aside:
            aside.mkdir()
            for name, tensors in files.items():
                save_file(tensors, aside / f"{name}.safetensors")
            write_json(aside / "state.json", {"step": step, **record})
        self._rotate()

    def _rotate(self) -> None:
        every, guide = self.config.keep_every, getattr(self.config, "guide_step", 0)
        for old in found_checkpoints(self.folder)[: -self.config.keep_checkpoints]:
            if (not every or _step_of(old) % every) and _step_of(old) != guide:
                discard(old)

    def restore(self, accelerator: Accelerator) -> dict:
        """Load the newest checkpoint; every process calls this.

        Returns:
            Its record with "step", `{"step": 0}` if there is no checkpoint.

        Raises:
            RunError: if it is beyond the run's last step, damaged, or of other networks.
        """
        paths = found_checkpoints(self.folder)
        if not paths:
            return {"step": 0}
        newest = paths[-1]
        if accelerator.is_main_process:
            self._rotate()  # a process that was killed after saving has not done it
        record = read_json(newest / "state.json")
        if record["step"] > self.config.max_steps:
            raise RunError(
                f"{newest} has gone further than --{self.folder.name}.max_steps {self.config.max_steps}"
            )
        for name, state in self.states.items():
            try:
                _load(state, load_file(newest / f"{name}.safetensors"))
            except Exception as error:  # a damaged file raises almost anything
                older = f"to go on from {paths[-2]}" if len(paths) > 1 else "to start the stage again"
                raise RunError(
                    f"{newest / name}.safetensors cannot be restored ({type(error).__name__}: {error}); "
                    f"delete {newest} {older}"
                ) from error
        return record


def _tensors_of(state: Any) -> dict[str, Tensor]:
    if isinstance(state, torch.optim.Optimizer):
        moments = state.state_dict()["state"]
        return {f"{number}.{name}": value for number, own in moments.items() for name, value in own.items()}
    if isinstance(state, torch.nn.Module):
        reshard(state)
    return state.state_dict()


def _load(state: Any, tensors: dict[str, Tensor]) -> None:
    if isinstance(state, torch.optim.Optimizer):
        parameters = [parameter for group in state.param_groups for parameter in group["params"]]
        for name in tensors:
            number, _, key = name.partition(".")
            parameter = parameters[int(number)]
            # Moments are sharded like their parameter; the count of steps is a scalar on its device.
            like = parameter if key != "step" else torch.empty((), device=parameter.device)
            state.state[parameter][key] = torch.zeros_like(like, dtype=torch.float32)
    current = _tensors_of(state)
    if current.keys() != tensors.keys():
        raise ValueError(f"not the same tensors: {sorted(current.keys() ^ tensors.keys())[:3]}")
    for name, value in tensors.items():
        fill(current[name], value)
