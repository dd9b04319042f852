"""What every script starts with: the checked configuration, the processes, the run folder and the images."""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from filelock import BaseFileLock
from torch import Tensor, nn

from training.config import Config, OptimizationConfig, parse_config
from training.data import ImageData, load_images
from training.errors import RunError, redact
from training.files import read_json, write_json
from training.interruption import Interruption
from training.networks import check_networks, check_shapes
from training.run_folder import check_folder, check_space, lock_folder, open_folder
from training.scan import Scan, scan
from training.sharding import whole

Result = TypeVar("Result")


@dataclass
class Run:
    """One run of this process: its configuration, its share of the work, its folder and its images."""

    config: Config
    accelerator: Accelerator
    folder: Path
    data: ImageData
    interruption: Interruption | None
    lock: BaseFileLock | None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def done(self, stage: str) -> dict | None:
        """The record that a finished stage left, or None."""
        path = self.folder / stage / "done.json"
        return read_json(path) if path.exists() else None

    def finish(self, stage: str, record: dict) -> None:
        """Record that a stage is finished; call it last."""
        if self.accelerator.is_main_process:
            write_json(self.folder / stage / "done.json", record)
        self.accelerator.wait_for_everyone()

    def require(self, path: Path, script: str) -> Path:
        """`path`, which an earlier stage leaves. Raises RunError naming its script if it is missing."""
        if not path.exists():
            raise RunError(
                f"{path} is missing: run training/{script} first, or the whole job by train_ldm.py"
            )
        return path

    def once(self, function: Callable[..., Result], *arguments) -> Result:
        """The result of a call by the main process alone, for all; every process calls this."""
        found = [function(*arguments) if self.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]

    def print(self, *message) -> None:
        """Print once, not once a process."""
        self.accelerator.print(*message, flush=True)


def start(stages: list[str], argv: list[str] | None = None) -> Run:
    """Read the configuration, open the run folder, load and scan the images: all checks before a step.

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
        accelerator = _accelerator(config)
        trains = stages != ["evaluation"]
        shaped = check_shapes(config, accelerator.num_processes) if trains else None
        check_folder(config, accelerator.print)
        folder = Path(config.output_dir)
        lock = lock_folder(folder) if accelerator.is_main_process and not config.dry_run else None
        with accelerator.main_process_first():
            data = load_images(config.data)
            found = _scan_once(config, data, accelerator.is_main_process)
        accelerator.print(found.describe(), flush=True)
        data.drop(found.unreadable)
        if trains:
            networks = check_networks(config, data, *shaped)
            check_space(config, networks, len(data.train) + len(data.held_out))
        if lock:
            open_folder(config)
        accelerator.wait_for_everyone()
        if not config.dry_run and not (folder / "config.yaml").exists():
            raise ValueError(
                f"{socket.gethostname()} does not see {folder.absolute()}: the machines of a run need one "
                "--output_dir that they share"
            )
    except (ValueError, OSError) as error:
        fail(error)
    interruption = None if config.dry_run else Interruption()
    return Run(config, accelerator, folder, data, interruption, lock)


def fail(error: Exception) -> NoReturn:
    """Print what a person can mend, without a traceback and with the process if there are several; exit."""
    sys.stdout.flush()
    process = f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{process}error: {redact(str(error))}", file=sys.stderr, flush=True)
    sys.exit(2)


def _accelerator(config: Config) -> Accelerator:
    """The processes and their arithmetic."""
    # A scan or a download by one process may take longer than the usual time-out of those that wait for it.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    # Several processes on CPUs are found by Accelerate only if it is told that it has nothing but CPUs.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu, **patience.to_kwargs())
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
        cpu=cpu,
        mixed_precision=choose_precision(config.mixed_precision, state.device.type),
        # The loops divide by their own number of parts; the launcher's option would do it once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=[name for name in config.trackers if name not in missing] or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("Accelerate shards (FSDP) on several accelerators only: leave out --use_fsdp here")
    set_seed(config.seed)
    accelerator.print(
        f"{state.num_processes} x {state.device.type}, mixed_precision {accelerator.mixed_precision}"
    )
    if state.num_processes == 1 and cpu and "MASTER_ADDR" in os.environ:
        accelerator.print(
            "note: `accelerate launch --cpu` starts one process, whatever --num_processes says; for several "
            "on CPUs give --multi_gpu instead of --cpu"
        )
    return accelerator


def choose_precision(setting: str, device: str) -> str:
    """Accelerate's name of the arithmetic: bf16 where the hardware has it, unless `setting` decides."""
    if setting == "bf16" and device == "mps":
        raise ValueError("--mixed_precision bf16: Apple's GPUs compute in float32 here; use auto or no")
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


def spread(loss: Tensor) -> Tensor:
    """The loss, or NaN if it is not finite: then so are the gradients, on every process."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.AdamW, max_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip the gradients, step and clear them; a gradient that is not finite changes nothing.

    Returns:
        The gradients' norm before clipping, and whether the step was skipped, both `()`. Neither has been
        read: the device does not wait.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = whole(accelerator.clip_grad_norm_(parameters, max_norm))
    skipped = ~norm.isfinite()
    optimizer.found_inf = skipped.float()  # where it is 1, fused AdamW changes nothing
    optimizer.step()
    optimizer.zero_grad()
    return norm, skipped


def _scan_once(config: Config, data: ImageData, store: bool) -> Scan:
    """The scan of these images, from the run folder if an earlier start has left it there."""
    path = Path(config.output_dir) / "data.json"
    if path.exists() and (stored := read_json(path)).get("fingerprint") == data.fingerprint:
        try:
            return Scan(**stored["scan"])
        except (KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error}): delete it") from error
    found = scan(data, config.data.num_workers)
    if store:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"fingerprint": data.fingerprint, "scan": asdict(found)})
    return found
