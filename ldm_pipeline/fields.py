"""The fields of the page: components of Gradio, with the model's own values."""

import inspect

import gradio as gr

from ldm_pipeline import commands, editing
from ldm_pipeline.pipeline import schedulers_for
from ldm_pipeline.tabs import ANY, Tabs

CANVAS, MOST = 512, 16  # pixels of the canvas; pictures at once
PAINT = "#e11d48"


def look_of(pipe, kind: str) -> list[str]:
    """Classes of CSS; pictures that are much enlarged keep their pixels."""
    return [kind, "small"] if max(pipe.image_shape[1:]) < 100 else [kind]


def component(tabs: Tabs, kind: str, name: str):
    """The field `name` of the tab `kind`, with the value of the model, or of its function in `editing`."""
    pipe, command = tabs.pipe, tabs.operations[kind].command
    values = pipe.config.defaults or {}
    if command not in commands.CALLS:
        own = inspect.signature(getattr(editing, command)).parameters
        values = {each: parameter.default for each, parameter in own.items()}
    first, last = tabs.words[0], tabs.words[-1]
    steps, scale = values.get("num_inference_steps", 20), values.get("guidance_scale", 1)
    again = "The same seed draws the same picture."
    closely = f"How closely the {'prompt' if tabs.text else 'class'} is followed."
    rule = "The rule by which each step takes noise away."
    schedulers, scheduler = sorted(schedulers_for(pipe.objective)), type(pipe.scheduler).__name__

    def condition(label, value, by_text=tabs.text):
        classes = [ANY, *tabs.classes]
        return gr.Textbox(value, label=label) if by_text else gr.Dropdown(classes, value=value, label=label)

    def slider(label, low, high, value, step=1, info=None):
        return gr.Slider(low, high, value, step=step, label=label, info=info)

    make = {
        "prompt": lambda: condition("Prompt", first),
        "class_labels": lambda: condition("Class", ANY if tabs.text else first, False),
        "negative_prompt": lambda: gr.Textbox(label="Negative prompt"),
        "first": lambda: condition("From", first),
        "last": lambda: condition("To", last),
        "image": lambda: picture(pipe, "First picture" if kind == "interpolate" else "Picture"),
        "other": lambda: picture(pipe, "Last picture"),
        "canvas": canvas,
        "strength": lambda: slider("Strength", 0.05, 1, 0.6, 0.05),
        "degradation": lambda: gr.Dropdown(tabs.degradations(), label="The picture is"),
        "frames": lambda: slider("Frames", 2, MOST, values["frames"]),
        "batch_size": lambda: slider("Count", 1, MOST, 4),
        "seed": lambda: gr.Number(0, label="Seed", info=again, precision=0, minimum=0, maximum=2**31),
        "new_seed": lambda: gr.Checkbox(True, label="New seed each time"),
        "num_inference_steps": lambda: slider("Steps", 1, 200, steps),
        "guidance_scale": lambda: slider("Guidance, off at 1", 0, 15, scale, 0.1, closely),
        "scheduler": lambda: gr.Dropdown(schedulers, value=scheduler, label="Scheduler", info=rule),
    }
    field = make[name]()
    field.elem_id = f"{kind}-{name}"
    return field


def picture(pipe, label: str) -> gr.Image:
    """A field for a file of a picture, which stays as it is."""
    options = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 240}
    field = gr.Image(label=label, elem_classes=look_of(pipe, "picture"), **options)
    # `tabs` reads it, and says if it cannot. No class of its own, for which Gradio would write a file here.
    field.preprocess = lambda file: file.path if file else None
    return field


def canvas() -> gr.ImageEditor:
    """A field for a picture that is painted over."""
    brush = gr.Brush(default_size=CANVAS // 8, colors=[PAINT], color_mode="fixed")
    options = {"type": "pil", "sources": ["upload", "clipboard"], "transforms": (), "layers": False}
    options |= {"canvas_size": (CANVAS, CANVAS), "fixed_canvas": True, "format": "png"}
    return gr.ImageEditor(label="Picture", brush=brush, **options)
