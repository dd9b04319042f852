"""The tabs of a model's page, without their looks: what the model can do, and the command of filled fields.

`app` shows them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ldm_pipeline import commands, editing
from ldm_pipeline.pipeline import fit, num_classes, text_width, to_pixels

ANY = "any class"
CONDITION = ("prompt", "class_labels", "negative_prompt")
SETTINGS = ("num_inference_steps", "guidance_scale", "scheduler")
DRAW = ("batch_size", "seed", "new_seed", *SETTINGS)


@dataclass(frozen=True)
class Operation:
    """A tab: its title, the command that it runs, the names of its fields, and what it says about itself."""

    title: str
    command: str
    fields: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Example:
    """Values of fields; `source` is a class or prompt of which the given picture is drawn first."""

    title: str
    values: dict
    source: object = None


OPERATIONS = {
    "draw": Operation("Draw", "sample", CONDITION + DRAW, "New pictures, from noise."),
    "edit": Operation(
        *("Edit", "sample", ("image", *CONDITION, "strength", *DRAW)),
        "The picture gets noise, and is drawn again from there: more strength, more change.",
    ),
    "inpaint": Operation(
        *("Inpaint", "inpaint", ("canvas", *CONDITION, *DRAW)),
        "Paint over what shall be new. All else stays.",
    ),
    "restore": Operation(
        *("Restore", "restore", ("image", "degradation", *CONDITION[:2], *DRAW)),
        "From a small, grey or blurred picture: what it may have been before.",
    ),
    "task": Operation("Task", "sample", ("image", *CONDITION, *DRAW), ""),  # see TASKS
    "interpolate": Operation(
        *("Interpolate", "interpolate", ("first", "last", "image", "other", "frames", *DRAW[1:5])),
        "A row of pictures from one to another: two that are drawn, or two of yours.",
    ),
    "film": Operation(
        *("Film", "sample", (*CONDITION, *DRAW[1:])),
        "How a picture comes about: what the network expects it to become, after each step.",
    ),
}
TASKS = {  # title of the tab, and what it says about itself
    "superres": ("Enlarge", "The picture is read with few pixels, and drawn with more."),
    "colorize": ("Color", "The picture is read in grey, and drawn in color."),
    "deblur": ("Sharpen", "A blurred picture is drawn sharp."),
    "enhance": ("Enhance", "A blurred, small or noisy picture is drawn as it may have been before."),
}


class Tabs:
    """The tabs that a pipeline can fill.

    Args:
        prompts: examples for a model with text.

    Attributes:
        classes: names of the classes, each different; empty if there are none.
        words: prompts or classes as examples; [None] of a model with neither.
        operations: the tabs, by name.
    """

    def __init__(self, pipe, prompts=()):
        self.pipe, self.task, self.text = pipe, pipe.task, text_width(pipe.denoiser) > 0
        names, numbers = pipe.config.id2label or {}, range(num_classes(pipe.denoiser))
        labels = [names.get(str(number), str(number)) for number in numbers]
        # Classes that share a name have their number beside it.
        self.classes = [x if labels.count(x) == 1 else f"{x} ({i})" for i, x in enumerate(labels)]
        self.words = (list(prompts) or ["a picture"]) if self.text else self.classes or [None]
        self.operations = {name: self._suited(each) for name, each in self._possible().items()}

    def _possible(self) -> dict[str, Operation]:
        if self.task is None:
            return {kind: each for kind, each in OPERATIONS.items() if kind != "task"}
        kind, image = ("inpaint", "canvas") if self.task.takes_mask else ("task", "image")
        own, film = OPERATIONS[kind], OPERATIONS["film"]
        if kind == "task":
            column = self.task.config.get("column")
            title, about = TASKS.get(self.task.kind, (column, f"A picture from its {column}."))
            own = replace(own, title=title, about=about)
        return {kind: own, "film": replace(film, fields=(image, *film.fields))}

    def _suited(self, operation: Operation) -> Operation:
        """The operation without fields that say nothing to this model."""
        useless = set() if self.text else {"prompt", "negative_prompt"}
        useless |= set() if self.classes else {"class_labels"}
        useless |= set() if self.text or self.classes else {"first", "last", "guidance_scale"}
        return replace(operation, fields=tuple(name for name in operation.fields if name not in useless))

    def heading(self, model: str) -> str:
        """Markdown: the name of the model, of a run's folder that of the run, and what it is."""
        folder, (_, height, width) = Path(model).resolve(), self.pipe.image_shape
        name = folder.parent.name if folder.name == "pipeline" and folder.exists() else model
        number = len(self.classes)
        kind = " by captions" if self.text else f" of {number} classes" if number else ""
        return f"## {name}\nLatent diffusion{kind}, {width} x {height} pixels"

    def degradations(self) -> list[tuple[str, str]]:
        """In words, and for `editing.operator`: those that leave something of this model's pictures."""
        channels, *sides = self.pipe.image_shape
        smaller = [(f"{n} times smaller", f"downscale:{n}") for n in (2, 4, 8) if min(sides) >= 4 * n]
        blurred = [("blurred", "blur:1"), ("very blurred", "blur:2")]
        return [*smaller, *[("grey", "grey")] * (channels == 3), *blurred]

    # ---- what is asked for
    def asked(self, kind: str, given: dict) -> tuple[str, dict, int]:
        """(command, its options, number of generators) of filled fields.

        Args:
            given: values by the names of the fields. A picture is a file; "canvas" is a dict of "background"
                and "layers", pictures of Pillow, the layers opaque where they are painted.

        Raises:
            ValueError: for a field that is empty and should not be, and a file that is no picture.
        """
        command, number = self.operations[kind].command, given.get("batch_size", 1)
        condition = {"prompt": given.get("prompt"), "class_labels": self._number(given.get("class_labels"))}
        condition = {name: value for name, value in condition.items() if value not in (None, "")}
        ends = [given.get(name) for name in ("first", "last")]
        ends = [(each or None) if self.text else self._number(each) for each in ends]
        if given.get("guidance_scale", 1) != 1 and not condition and ends == [None, None]:
            empty = "The prompt is empty" if self.text else "No class is chosen"
            raise ValueError(f"{empty}: guidance leads nowhere. Say one, or set the guidance scale to 1.")
        names = "strength", "degradation", "frames", "num_inference_steps", "guidance_scale"
        options = {name: given[name] for name in names if name in given}
        if kind == "interpolate":
            number, options["condition"] = 2, ends
        elif command in commands.CALLS:
            negative = {"negative_prompt": given["negative_prompt"]} if given.get("negative_prompt") else {}
            options |= condition | negative | {"batch_size": number}
        else:
            options["condition"] = condition or None
        return command, options | self._pictures(kind, given, number), number

    def _number(self, label) -> int | None:
        return self.classes.index(label) if label in self.classes else None

    def _pictures(self, kind: str, given: dict, number: int) -> dict:
        """Pictures and mask of filled fields, as the command takes them."""
        canvas = given.get("canvas")
        if canvas and canvas["background"]:
            picture = canvas["background"]  # with nothing around it, where the canvas has another shape
            box = picture.convert("RGBA").getchannel("A").getbbox()
            masks = [layer.crop(box).getchannel("A") for layer in canvas["layers"]]
            if not (masks and masks[0].getbbox()):
                raise ValueError("Nothing is painted. Paint with the brush over what shall be new.")
            return {"image": picture.crop(box), "mask_image": masks[0]}
        found = [commands.read_picture(given[name]) for name in ("image", "other") if given.get(name)]
        if kind == "interpolate":
            return {"image": found or None}
        if not found:
            if {"canvas", "image"} & set(given):
                raise ValueError("There is no picture. Choose a file, or one of the examples.")
            return {}
        if kind == "restore":  # a picture of any size, as small as the degradation leaves one of this model's
            drawn = editing.operator(given["degradation"])(torch.zeros(1, *self.pipe.image_shape))
            return {"image": list(fit(torch.stack(to_pixels(found[0])), drawn.shape[-2:])) * number}
        return {"image": found[0]}

    # ---- examples
    def examples(self, kind: str) -> list[Example]:
        """Worked examples of a tab, of its own words."""
        words = [self.words[i * (len(self.words) - 1) // 3] for i in range(4)]
        words = list(dict.fromkeys(words)) if words[0] else [None]
        first, last = words[0], words[-1]
        name = "prompt" if self.text else "class_labels"
        own = (lambda word: {name: word}) if first else (lambda word: {})
        to = f"from {first} to {last}" if first else "from noise to noise"
        if kind in ("draw", "film"):
            return [
                Example(word or f"seed {n}", own(word) | {"seed": n}, word) for n, word in enumerate(words)
            ]
        if kind == "edit":
            return [
                Example(
                    f"strength {x}, {to}" if first else f"strength {x}", own(last) | {"strength": x}, first
                )
                for x in (0.4, 0.7)
            ]
        if kind == "restore":
            return [
                Example(f"{first}, {said}" if first else said, own(first) | {"degradation": each}, first)
                for said, each in (self.degradations()[0], self.degradations()[-1])
            ]
        if kind == "interpolate":
            return [Example(to, {"first": first, "last": last} if first else {})]
        titles = {"inpaint": f"the right half of {first or 'a picture'}, new", "task": "a drawing"}
        return [Example(titles[kind], own(first), first)]

    def source(self, example: Example) -> Image.Image:
        """The picture of an example: drawn by the model, or, as that wants a picture itself, by hand."""
        height, width = self.pipe.image_shape[1:]
        given = {"prompt" if self.text else "class_labels": example.source} if example.source else {}
        if self.classes and given and not self.text:
            given = {"class_labels": self._number(example.source)}
        if self.task and not self.task.takes_mask:
            factor = self.task.config.get("factor", 1)
            return _face(width // factor, height // factor)
        if self.task:
            grey = Image.new("RGB", (width, height), "grey")
            given |= {"image": grey, "mask_image": Image.new("L", (width, height), 255)}
        picture = self.pipe(**given, generator=torch.Generator().manual_seed(0)).images[0]
        if degradation := example.values.get("degradation"):
            pixels = editing.operator(degradation)(torch.stack(to_pixels(picture)))
            picture = self.pipe.to_output(pixels.clamp(0, 1), "pil")[0]
        return picture


def value_of(field, name: str, text: str):
    """The value of a field of Gradio that a link says; ValueError where the field has no such."""
    if hasattr(field, "choices"):
        known = [value for _, value in field.choices]
        if text not in known:
            shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise ValueError(f"The link asks for {name}={text}; this model has: {shown}")
    elif hasattr(field, "minimum"):
        whole = field.step == 1
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = None
        if value is None or not field.minimum <= value <= field.maximum:
            range_ = f"a {'whole ' * whole}number from {field.minimum} to {field.maximum}"
            raise ValueError(f"The link asks for {name}={text}; wanted {range_}")
        return value
    return text


def _face(width: int, height: int) -> Image.Image:
    """A yellow face on white."""
    side = 8 * min(width, height)
    picture = Image.new("RGB", (side, side), "white")
    draw, part = ImageDraw.Draw(picture), side / 20
    draw.ellipse([part, part, 19 * part, 19 * part], fill="#ffcc33", outline="black", width=int(part / 2))
    for x in (6, 12):
        draw.ellipse([x * part, 6 * part, (x + 2) * part, 9 * part], fill="black")
    draw.arc([5 * part, 6 * part, 15 * part, 15 * part], 20, 160, fill="black", width=int(part))
    return picture.resize((width, height), Image.Resampling.LANCZOS)
