"""The processes of a run: device, precision and threads."""

import os
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)

from training.config import Config


def build_accelerator(config: Config) -> Accelerator:
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
