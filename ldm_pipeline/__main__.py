"""Draw and edit with a model from the command line: `python -m ldm_pipeline COMMAND MODEL [PICTURE ...]`.

Options have the names of the Python arguments. Pictures are written as PNG, with the command that made them
in the text "parameters".
"""

import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from PIL import Image

from ldm_pipeline import LDMPipeline, editing
from ldm_pipeline.commands import CALLS, known_prompts, load, operate, read_picture, save, save_animation
from ldm_pipeline.pipeline import _as_list, text_width

COMMANDS = {  # (what it does, how many pictures it takes, its lists of conditions)
    "sample": (
        "draw pictures; of given ones, change them by --strength, or do the task of the model",
        "*",
        ("prompt", "negative_prompt", "class_labels"),
    ),
    "inpaint": ("repaint what is white in a mask", "+", ("prompt", "negative_prompt", "class_labels")),
    "edit": ("make pictures of one condition ones of another", "+", ("source", "target")),
    "interpolate": ("draw a row from one picture or condition to another", "*", ("condition",)),
    "restore": ("make pictures of small, grey or blurred ones", "+", ("condition",)),
    "classify": ("rank conditions for each picture", "+", ("candidates",)),
}
PAGE = "serve a page that draws and edits in a browser"
# Arguments that only Python can give, and those that this file adds in its own way.
NOT_OPTIONS = {"guider", "latents", "output_type", "return_dict", "callback_on_step_end", "pipe", "image"}
NOT_OPTIONS |= {"callback_on_step_end_tensor_inputs", "generator", "mask_image", "degradation", "batch_size"}
NOT_OPTIONS |= {f"{sign}prompt_{part}" for sign in ("", "negative_") for part in ("embeds", "attention_mask")}
OWN = ("model", "image", "seed", "device", "dtype", "output")


def command_line() -> ArgumentParser:
    """The parser; the options of a command are the signature of what it calls."""
    parser = ArgumentParser(prog="python -m ldm_pipeline", description=__doc__.split(":")[0])
    commands = parser.add_subcommands(dest="command")
    for name, (about, pictures, conditions) in COMMANDS.items():
        own, skip = ArgumentParser(description=about), NOT_OPTIONS | set(conditions)
        own.add_argument("model", type=str, help="pipeline folder, or its id on the Hub")
        own.add_argument("image", nargs=pictures, type=str, help="files of pictures")
        for condition in conditions:
            each = "a class or a prompt for all pictures, or one for each"
            wanted = condition == "candidates"
            own.add_argument(f"--{condition}", nargs="+", type=str, required=wanted, help=each)
        if name in CALLS:
            own.add_method_arguments(LDMPipeline, "__call__", as_group=False, skip=skip)
            own.add_argument("--batch_size", type=int, help="number of pictures")
            masks = "files, white is repainted: one for all pictures, or one for each"
            own.add_argument("--mask_image", nargs="+", type=str, required=name == "inpaint", help=masks)
        else:
            own.add_function_arguments(getattr(editing, name), as_group=False, skip=skip)
        if name == "restore":
            own.add_argument("--degradation", type=str, required=True, help="downscale:F, grey or blur:S")
        own.add_argument("--seed", type=int, default=0, help="of the first picture; each next has the next")
        add_machine(own)
        files = "folder of the pictures; interpolate also makes a .webp or .gif"
        own.add_argument("--output", type=Path, default=Path("."), help=files)
        commands.add_subcommand(name, own, help=about)
    own = ArgumentParser(description=PAGE)
    own.add_argument("model", type=str, help="pipeline folder, or its id on the Hub")
    own.add_argument("--prompts", nargs="+", type=str, default=[], help="examples for a model with text")
    own.add_argument(
        "--host", type=str, help="address to serve at; by default this machine alone sees the page"
    )
    own.add_argument("--port", type=int, help="by default the first free one from 7860")
    add_machine(own)
    commands.add_subcommand("app", own, help=PAGE)
    return parser


def add_machine(parser: ArgumentParser) -> None:
    """Options of where and how a model runs."""
    parser.add_argument("--device", type=str, help="cuda, mps or cpu; by default the best that is there")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16 or float16")


def conditions_of(words: list[str] | None, classes: bool):
    """Classes or prompts as Python has them: a class's number as a number, one alone without its list."""
    values = [int(word) if classes and word.isdecimal() else word for word in words or ()]
    return values if len(values) > 1 else values[0] if values else None


def count(options: dict) -> int:
    """The number of pictures that a call will draw, each of which gets a generator."""
    given = [options["batch_size"] or 1, len(options["image"] or ())]
    given += [len(options[name]) for name in COMMANDS["sample"][2] if isinstance(options[name], list)]
    return max(given) * options["num_images_per_prompt"]


def run(command: str, options: dict) -> list:
    """Do a command; the files that it wrote, or the lines that it found."""
    if command == "app":
        return open_page(**options)
    own = {name: options.pop(name) for name in OWN}
    said = {"command": command, "model": own["model"], "image": own["image"], "dtype": own["dtype"]}
    said |= {name: value for name, value in options.items() if value is not None}
    animation = command == "interpolate" and own["output"].suffix in (".webp", ".gif")
    if own["output"].suffix in Image.registered_extensions() and not animation:
        raise ValueError(f"--output {own['output']}; wanted a folder, or of interpolate a .webp or .gif")
    options["image"] = [read_picture(path) for path in own["image"]] or None
    pipe, seed = load(own["model"], own["device"], own["dtype"]), own["seed"]
    for name in COMMANDS[command][2]:
        classes = name == "class_labels" or "prompt" not in name and not text_width(pipe.denoiser)
        options[name] = conditions_of(options[name], classes)
    if command == "classify":
        options["generator"] = torch.Generator().manual_seed(seed)
        options["candidates"] = _as_list(options["candidates"])
        ranks, lines = editing.classify(pipe, **options), []
        for path, rank in zip(own["image"], ranks, strict=True):
            ranked = list(zip(rank.candidates, rank.errors, strict=True))[:5]
            lines.append("  ".join([path, *(f"{candidate} ({error:.4f})" for candidate, error in ranked)]))
        return lines
    if command in CALLS and options["mask_image"]:
        options["mask_image"] = [read_picture(path) for path in options["mask_image"]]
    number = count(options) if command in CALLS else 2 if command == "interpolate" else len(own["image"])
    drawn = operate(pipe, command, options, seed, number)
    if animation:
        return [save_animation(drawn, own["output"])]
    return [
        save(picture, own["output"], command, said | {"seed": seed + (index if number == len(drawn) else 0)})
        for index, picture in enumerate(drawn)
    ]


def open_page(model: str, prompts: list[str], host: str | None, port: int | None, device, dtype: str) -> list:
    """Serve the page of a model until Ctrl-C."""
    from ldm_pipeline.app import Page, serve  # here, because only this needs Gradio

    pipe = load(model, device, dtype)
    serve(Page(pipe, model, prompts or known_prompts(model)).build(), host, port)
    return []


def main() -> None:
    parser = command_line()
    options = parser.parse_args()
    try:
        written = run(options.command, options[options.command].as_dict())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
