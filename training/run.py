"""What every script starts with: the checked configuration, the processes, the run folder and the images."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from torch import nn

from training.checkpoint import write_json
from training.config import Config, OptimizationConfig, parse_config
from training.data import ImageData, load_images
from training.networks import check_networks
from training.run_folder import check_folder, open_folder
from training.scan import Scan, scan


@dataclass
class Run:
    """One run of this process: its configuration, its share of the work, its folder and its images."""

    config: Config
    accelerator: Accelerator
    folder: Path
    data: ImageData

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def done(self, stage: str) -> dict | None:
        """The record that a finished stage left, or None."""
        path = self.folder / stage / "done.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, stage: str, record: dict) -> None:
        """Record that a stage is finished; call it last."""
        if self.accelerator.is_main_process:
            write_json(self.folder / stage / "done.json", record)
        self.accelerator.wait_for_everyone()

    def require(self, path: Path, script: str) -> Path:
        """`path`, which an earlier stage leaves. Raises ValueError naming its script if it is missing."""
        if not path.exists():
            raise ValueError(
                f"{path} is missing: run training/{script} first, or the whole job by train_ldm.py"
            )
        return path

    def print(self, *message) -> None:
        """Print once, not once a process."""
        self.accelerator.print(*message, flush=True)


def start(stages: list[str], argv: list[str] | None = None) -> Run:
    """Read the configuration, load and scan the images, open the run folder: all checks before a step.

    Exits with code 2 and a message for what the user can mend.

    Args:
        stages: what this script does; no other stage can be redone by it.
        argv: the command line, by default the process's own.
    """
    try:
        config = parse_config(argv)
        if unknown := set(config.redo) - set(stages):
            raise ValueError(
                f"--redo {sorted(unknown)}: this script does {', '.join(stages)}; use train_ldm.py"
            )
        check_folder(config)
        accelerator = _accelerator(config)
        with accelerator.main_process_first():
            data = load_images(config.data)
            found = _scan_once(config, data, accelerator.is_main_process)
        accelerator.print(found.describe(), flush=True)
        data.drop(found.unreadable)
        check_networks(config, data, accelerator.num_processes)
    except ValueError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if accelerator.is_main_process and not config.dry_run:
        open_folder(config)
    accelerator.wait_for_everyone()
    return Run(config, accelerator, Path(config.output_dir), data)


def _accelerator(config: Config) -> Accelerator:
    """The processes and their arithmetic."""
    # A scan or a download by one process may take longer than the usual time-out of those that wait for it.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    state = PartialState(**patience.to_kwargs())
    if state.device.type == "cpu":
        # `accelerate launch` gives a CPU process one thread unless told.
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(cpu_threads())
        # SiLU of -90 is a denormal number, and a convolution of those takes three times as long.
        torch.set_flush_denormal(True)
    if missing := [name for name in config.trackers if find_spec(name) is None]:
        state.print(
            f"not installed, so without them: {', '.join(missing)} (pip install 'ldm-pipeline[trackers]')"
        )
    accelerator = Accelerator(
        mixed_precision=choose_precision(config.mixed_precision, state.device.type),
        # The loops divide by their own number of parts; the launcher's option would do it once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=[name for name in config.trackers if name not in missing] or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    set_seed(config.seed)
    return accelerator


def choose_precision(setting: str, device: str) -> str:
    """Accelerate's name of the arithmetic: bf16 where the hardware has it, unless `setting` decides."""
    if setting != "auto":
        return setting
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities = cpu_capabilities() if device == "cpu" else {}
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def cpu_capabilities() -> dict:
    """What torch knows of the processor; nothing, if it is too old to tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def cpu_threads() -> int:
    """This process's share of the cores it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def build_optimizer(config: OptimizationConfig, module: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over all parameters; the loop sets the rate of every step."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=tuple(config.adam_betas),
        weight_decay=config.weight_decay,
        fused=True,
    )


def _scan_once(config: Config, data: ImageData, store: bool) -> Scan:
    """The scan of these images, from the run folder if an earlier start has left it there."""
    path = Path(config.output_dir) / "data.json"
    if path.exists() and (stored := json.loads(path.read_text()))["fingerprint"] == data.fingerprint:
        return Scan(**stored["scan"])
    found = scan(data, config.data.num_workers)
    if store:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"fingerprint": data.fingerprint, "scan": asdict(found)})
    return found
