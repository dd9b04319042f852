"""The processes of a run: device, precision and threads."""

import os
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import TypeVar

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

from training.config import Config, RunError

Result = TypeVar("Result")


def build_accelerator(config: Config, earlier_threads: int | None = None) -> Accelerator:
    """Start the processes with their precision and threads, seed them, and print one line that says so.

    On a CPU `config.num_threads` becomes the number that was chosen.

    Args:
        earlier_threads: the number that this run had before, if it is a continuation.

    Raises:
        RunError: for a precision or a launcher's option that this machine cannot serve.
    """
    state, threads = join_processes(), ""
    cpu = only_cpus()
    if state.device.type == "cpu":
        config.num_threads, note = choose_threads(config.num_threads, earlier_threads)
        torch.set_num_threads(config.num_threads)
        threads = f" with {config.num_threads} thread{'s' if config.num_threads > 1 else ''}"
        if note:
            state.print(note)
        # SiLU of -90 is a denormal number, and a convolution of those takes three times as long.
        torch.set_flush_denormal(True)
    if missing := [name for name in config.trackers if find_spec(name) is None]:
        state.print(
            f"not installed, so without them: {', '.join(missing)} "
            "(pip install -e '.[trackers]' in the checkout)"
        )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=choose_precision(config.mixed_precision, state.device.type),
        # The loops divide by their own number of parts; the launcher's option would do it once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=[name for name in config.trackers if name not in missing] or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if config.denoiser.optimizer == "muon":
            raise RunError("--denoiser.optimizer muon needs whole matrices, and FSDP shards them: use adamw")
        if accelerator.distributed_type != DistributedType.FSDP:
            raise RunError("Accelerate shards (FSDP) on several accelerators only: leave out --use_fsdp here")
    set_seed(config.seed)
    accelerator.print(
        f"{state.num_processes} x {state.device.type}{threads}, mixed_precision {accelerator.mixed_precision}"
    )
    if state.num_processes == 1 and cpu and "MASTER_ADDR" in os.environ:
        accelerator.print(
            "note: `accelerate launch --cpu` starts one process, whatever --num_processes says; for several "
            "on CPUs give --multi_gpu instead of --cpu"
        )
    return accelerator


def only_cpus() -> bool:
    """Whether the networks are computed on CPUs."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def join_processes() -> PartialState:
    """Connect the processes of the run, once; says which one this is, and its device."""
    # A scan or a download by one process may take longer than the usual time-out of those that wait for it.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    # Several processes on CPUs are found by Accelerate only if it is told that it has nothing but CPUs.
    return PartialState(only_cpus(), **patience.to_kwargs())


def choose_precision(setting: str, device: str) -> str:
    """Accelerate's name of the arithmetic: bf16 where the hardware has it, unless `setting` decides."""
    if setting == "bf16" and device == "mps":
        raise RunError("--mixed_precision bf16: Apple's GPUs compute in float32 here; use auto or no")
    if setting != "auto":
        return setting
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities = cpu_capabilities() if device == "cpu" else {}
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def cpu_capabilities() -> dict:
    """Properties of the processor as torch reports them; empty where torch is too old to report."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def choose_threads(wanted: int | None, earlier: int | None) -> tuple[int, str | None]:
    """CPU threads of this process, and a line to print if a continued run cannot have those it had.

    The last bits of a sum depend on their number, so a continuation keeps it. In this order count
    `--num_threads`, OMP_NUM_THREADS of a plain start, the earlier number, the cores that it may use.
    """
    usable = usable_cores()
    if wanted := wanted_threads(wanted):
        return wanted, None
    if earlier and earlier > usable:
        return usable, (
            f"warning: this run had {earlier} threads and may use {usable} now, so its last bits may differ "
            f"from those of an uninterrupted run; --num_threads {earlier} keeps them, slowly"
        )
    return earlier or usable, None


def wanted_threads(option: int | None) -> int | None:
    """The number that the user names, by `--num_threads` or by OMP_NUM_THREADS of a plain start."""
    # `accelerate launch` and torchrun set the variable themselves, from all cores of the machine.
    launched = any(name in os.environ for name in ("LOCAL_WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"))
    if option or launched or not os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return option
    return int(os.environ["OMP_NUM_THREADS"])


def usable_cores() -> int:
    """This process's share of the cores that it may use: those of its affinity, not of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def on_main_process(accelerator: Accelerator, function: Callable[..., Result], *arguments) -> Result:
    """The result of a call on the main process alone, for every rank; all ranks call this."""
    results = [function(*arguments) if accelerator.is_main_process else None]
    return broadcast_object_list(results)[0]
