"""The operations of a model by their names, as the command line and the page ask for them; pictures as files.

Self-contained beside `pipeline`, `loading` and `editing`: with these it travels to a Space.
"""

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_pipeline import LDMPipeline, editing

CALLS = ("sample", "inpaint")  # the call of the pipeline; the others are functions of `editing`


def load(model: str | Path, device: str | None = None, dtype: str = "float32") -> LDMPipeline:
    """The pipeline of a folder or a Hub id, where and as it shall run.

    Args:
        device: None is the best that is there: cuda, mps or cpu.
        dtype: float32, bfloat16 or float16.

    Raises:
        OSError, ValueError: there is no such model, or it is damaged; another dtype.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype}; wanted float32, bfloat16 or float16")
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    return LDMPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)


def known_prompts(model: str | Path) -> list[str]:
    """Prompts that a model was measured with, of the run or the export that its folder is of; else none."""
    for folder in (Path(model), Path(model).parent):
        if (path := folder / "metrics.json").is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("prompts", [])
    return []


def operate(pipe: LDMPipeline, command: str, options: dict, seed: int, number: int) -> list[Image.Image]:
    """Pictures of a command of `CALLS`, or of a function of `editing` that makes pictures.

    Args:
        options: its arguments but the generators.
        seed: of the first of `number` generators; each next has the next.
    """
    generators = [torch.Generator().manual_seed(seed + index) for index in range(number)]
    if command in CALLS:
        return pipe(**options, generator=generators).images
    return getattr(editing, command)(pipe, **options, generator=generators)


class Stopped(Exception):
    """Whoever asked for pictures no longer wants them."""


@contextmanager
def _watched(network: torch.nn.Module, stop: threading.Event, tell) -> Iterator[None]:
    """Stopped before the next evaluation of the network once `stop` is set; `tell(n)` before the nth."""
    evaluations = 0

    def before(*_):
        nonlocal evaluations
        if stop.is_set():
            raise Stopped
        evaluations += 1
        tell(evaluations)

    hook = network.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _stepped_by(pipe: LDMPipeline, scheduler: str) -> Iterator[None]:
    """The pipeline with the scheduler of that class name."""
    own = pipe.scheduler
    if scheduler != type(own).__name__:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own


def stream(
    pipe: LDMPipeline, stop: threading.Event, command: str, options: dict, seed: int, number: int,
    scheduler: str, film: bool,
) -> Iterator[tuple[str, list]]:  # fmt: skip
    """`operate` in a thread of its own: (progress, pictures that the network predicts) while it draws, at
    most three times a second; at last ("", the pictures). Closed early, it ends the thread.

    Args:
        stop: once it is set, Stopped is raised after the step that runs.
        scheduler: name of the class that steps.
        film: the pictures at last are the predicted ones after each step.
    """
    found, frames, shown = queue.SimpleQueue(), [], 0.0

    def show(pipe, i, t, values):
        nonlocal shown
        pictures, now = [], time.monotonic()
        if film or now - shown > 0.3:
            pictures, shown = pipe.to_output(pipe.decode(values["clean"]), "pil"), now
        if film:
            frames.append(pictures[0])
        found.put((f"step {i + 1} of {pipe.num_timesteps}", pictures))

    def work():
        try:
            previews = {"callback_on_step_end": show, "callback_on_step_end_tensor_inputs": ("clean",)}
            given = options | (previews if command in CALLS else {})
            tell = (lambda n: None) if command in CALLS else lambda n: found.put((f"evaluation {n}", []))
            with _stepped_by(pipe, scheduler), _watched(pipe.denoiser, stop, tell):
                drawn = operate(pipe, command, given, seed, number)
            found.put(("", frames or drawn))
        except BaseException as error:  # of the other thread, which raises it
            found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        progress = None
        while progress != "":
            each = found.get()
            if isinstance(each, BaseException):
                raise each
            progress, _ = each
            yield each
    finally:
        stop.set()
        thread.join()


def read_picture(path: str | Path) -> Image.Image:
    """The picture of a file; ValueError where it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def save(picture: Image.Image, folder: Path, name: str, parameters: dict) -> Path:
    """Write a picture, as a PNG with its parameters as JSON, under the next free number of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    info, number = PngInfo(), 0
    info.add_text("parameters", json.dumps(parameters))
    while (path := folder / f"{name}-{number:04d}.png").exists():
        number += 1
    picture.save(path, pnginfo=info)
    return path


def save_animation(pictures: list[Image.Image], path: Path, there_and_back: bool = True) -> Path:
    """Write pictures as one that moves, WebP or GIF by the suffix: ten a second, without an end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    following = pictures[1:] + (pictures[-2:0:-1] if there_and_back else [])
    pictures[0].save(path, save_all=True, append_images=following, duration=100, loop=0)
    return path
