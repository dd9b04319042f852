"""One run of this process: its configuration, processes, folder and images, checked before the first step."""

import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from filelock import BaseFileLock

from ldm_pipeline.pipeline import latent_shape
from training.config import Config, RunError
from training.data.captions import check_lengths, describe_captions, unique_captions, words_encoder
from training.data.images import ImageData, load_images
from training.data.scan import Scan, check_pairs, scan
from training.data.tasks import paired_column
from training.networks import check_data, check_networks, pretrained_text_encoder, text_width_of
from training.runtime.accelerator import build_accelerator, on_main_process
from training.runtime.atomic import read_json, write_json
from training.runtime.folder import (
    check_dataset,
    check_folder,
    check_guide,
    check_space,
    lock_folder,
    open_folder,
    read_stored,
)
from training.runtime.signals import Interruption, leave_signals_to_parent

Result = TypeVar("Result")


@dataclass
class Run:
    """One run of this process.

    Args:
        folder: the run folder.
        latent_shape: (C, h, w) of the latents; None for a script that trains nothing.
        text: tokenizer and text encoder of captions, or None.
        interruption: asks for SIGTERM and SIGINT; None under `--dry_run`, like `lock`.
        lock: holds the run folder for this process, on the main process.
    """

    config: Config
    accelerator: Accelerator
    folder: Path
    data: ImageData
    latent_shape: tuple[int, ...] | None
    text: tuple | None
    interruption: Interruption | None
    lock: BaseFileLock | None

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    def done(self, stage: str) -> dict | None:
        """The record that a finished stage left, or None."""
        path = self.folder / stage / "done.json"
        return read_json(path) if path.exists() else None

    def finish(self, stage: str, record: dict) -> None:
        """Record that a stage is finished; the last thing that it does."""
        if self.accelerator.is_main_process:
            write_json(self.folder / stage / "done.json", record)
        self.accelerator.wait_for_everyone()

    def require(self, path: Path, script: str) -> Path:
        """`path`, which an earlier stage leaves. RunError names its script if it is missing."""
        if not path.exists():
            raise RunError(
                f"{path} is missing: run training/{script} first, or the whole job by train_ldm.py"
            )
        return path

    def once(self, function: Callable[..., Result], *arguments) -> Result:
        """The result of a call on the main process alone, for every rank; all ranks call this."""
        return on_main_process(self.accelerator, function, *arguments)

    def print(self, *message) -> None:
        """Print on the main process only."""
        self.accelerator.print(*message, flush=True)


def start(config: Config, stages: list[str]) -> Run:
    """Start the processes, open the run folder, load and scan the images: all checks before a step.

    Args:
        stages: names of what this script does; "evaluation" alone trains nothing.

    Raises:
        RunError: with what was found, what is wanted and which option changes it.
    """
    folder = Path(config.output_dir)
    accelerator = build_accelerator(config, read_stored(folder).get("num_threads"))
    trains = stages != ["evaluation"]
    text, networks = None, None
    captioned = config.denoiser.text_encoder is not None or config.data.caption_column is not None
    if trains:
        with accelerator.main_process_first():  # one downloads
            text = pretrained_text_encoder(config.denoiser)
        networks = check_networks(config, accelerator.num_processes, text_width_of(config.denoiser, text))
    check_folder(config, accelerator.print)
    if trains:
        check_guide(config)
    lock = lock_folder(folder) if accelerator.is_main_process and not config.dry_run else None
    with accelerator.main_process_first():  # one downloads and scans
        data = load_images(config.data, captioned, paired_column(config.denoiser))
        scanned = _scan_once(config, data, accelerator.is_main_process)
        _check_pairs_once(config, data, accelerator.is_main_process)
    accelerator.print(scanned.describe(), flush=True)
    if captioned:
        accelerator.print(describe_captions(data), flush=True)
    if networks:
        check_data(config, data)
        if config.denoiser.trains_text_encoder:
            text = words_encoder(config.denoiser, data, config.seed + 2)
        if text:
            check_lengths(unique_captions(data), text[0], config.denoiser.cut_captions)
        check_space(config, networks, len(data.train) + len(data.held_out), text and text[1])
    if lock:
        open_folder(config)
    accelerator.wait_for_everyone()
    if not config.dry_run and not (folder / "config.yaml").exists():
        raise RunError(
            f"{socket.gethostname()} does not see {folder.absolute()}: the machines of a run need one "
            "--output_dir that they share"
        )
    shape = latent_shape(networks[1]) if networks else None
    interruption = None if config.dry_run else Interruption()
    return Run(config, accelerator, folder, data, shape, text, interruption, lock)


def _scan_once(config: Config, data: ImageData, store: bool) -> Scan:
    """The scan of `data`, which follows it; from the run folder if an earlier start has left it there."""
    path, files = Path(config.output_dir) / "data.json", data.fingerprint
    stored = read_json(path) if path.exists() else {}
    earlier = None
    if stored:
        try:
            earlier, known = Scan(**stored["scan"]), stored["files"]
        except (KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error}): delete it") from error
    if earlier and known == files:
        found = earlier
    else:
        found = scan(data, config.data.scan, config.data.num_workers, leave_signals_to_parent)
    data.drop(found.unreadable)
    data.fingerprint = found.fingerprint or files
    if earlier and data.fingerprint != (earlier.fingerprint or known):
        check_dataset(config)
    if found is not earlier and store:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"files": files, "scan": asdict(found)})
    return found


def _check_pairs_once(config: Config, data: ImageData, store: bool) -> None:
    """Check the pictures of a paired column, unless an earlier start has done so."""
    column, path = data.train.paired_column, Path(config.output_dir) / "data.json"
    if column is None:
        return
    stored = read_json(path) if path.exists() else {}
    pairs = stored.get("pairs", {})
    if column not in pairs:
        pairs = pairs | {column: check_pairs(data, config.data.num_workers, leave_signals_to_parent)}
        if store:
            write_json(path, stored | {"pairs": pairs})
    data.pairs = pairs[column]
