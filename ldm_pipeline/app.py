"""The page of a model: drawing, editing and watching in a browser, on this machine or as a Space.

It calls the pipeline and `editing`, and computes nothing of its own. All that it shows comes from the machine
that serves it: no font, script or count of visits is asked of another.
"""

import os
import random
import re
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlencode

try:
    import spaces  # of a Space with ZeroGPU, where it wants to come before torch
except ImportError:
    spaces = None
try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the page needs Gradio: pip install -e '.[app]' in the checkout") from error
from PIL import Image

from ldm_pipeline import commands
from ldm_pipeline.fields import CANVAS, PAINT, component, look_of
from ldm_pipeline.tabs import SETTINGS, Example, Operation, Tabs, value_of

PICTURES = ("image", "other", "canvas")
# The result comes into view, which on a phone is below the fields.
SHOW = "(...x) => {{ document.getElementById('{}-link').scrollIntoView({{ block: 'nearest' }}); return x }}"
ADDRESS = "q => { const u = new URL(location); u.search = q; history.replaceState(0, '', u); return u.href }"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the visitor
CSS = """
.picture img { width: 100%; height: 100%; object-fit: contain }
.gallery .grid-wrap { min-height: 0 !important; max-height: none !important; overflow: visible !important }
.gallery .preview ~ .grid-wrap { height: 460px; overflow: hidden !important }
.gallery .preview::before { opacity: 1 !important } /* before the others */
.gallery .grid-container { grid-template-columns: repeat(auto-fit, minmax(max(130px, 34%), 1fr)) !important }
.gallery .grid-container:has(> :nth-child(5)) {
  grid-template-columns: repeat(auto-fill, minmax(max(90px, 20%), 1fr)) !important
}
.gallery .caption-label { padding: 2px 6px; font-size: 11px; max-width: 100% }
.small img { image-rendering: pixelated }
[id$=-canvas] .toolbar-wrap { left: 2px !important }
.status { min-height: 1.5em; overflow: hidden !important }
"""
COLORS = dict.fromkeys(["body_text_color_subdued", "input_placeholder_color"], "*neutral_500")
COLORS |= {"input_placeholder_color_dark": "*neutral_400", "checkbox_border_color_dark": "*neutral_500"}
COLORS |= {"button_primary_background_fill": "*primary_600"}  # Gradio's own of these are too pale to read
# Gradio's own folder outlives it, with all that was uploaded and drawn; this one ends with the process.
FOLDER = tempfile.TemporaryDirectory(prefix="page-")
os.environ.setdefault("GRADIO_TEMP_DIR", FOLDER.name)
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
MODEL = QUIET | {"concurrency_id": "model", "concurrency_limit": 1}  # one at a time; the others wait


@contextmanager
def explained():
    """Errors that the reader of the page can mend, as a message in it."""
    try:
        yield
    except (ValueError, OSError) as error:
        told = re.sub(r"/\S*/[0-9a-f]{64}/", "", str(error))  # folders where Gradio keeps files
        raise gr.Error(told, duration=None, print_exception=False) from error


class Page:
    """The page of one pipeline.

    Args:
        model: folder or Hub id, as the page shows it and writes it into pictures.
        prompts: examples for a model with text.
    """

    def __init__(self, pipe, model: str, prompts=()):
        self.pipe, self.model, self.tabs = pipe, model, Tabs(pipe, prompts)
        pipe.set_progress_bar_config(disable=True)
        self.running: dict[str, threading.Event] = {}  # by session: set, it stops what is drawn
        self.lock = threading.Lock()  # of what draws: who has cancelled may leave a last step behind
        self.drawn = spaces.GPU(self._drawn) if spaces else self._drawn
        self.fields: dict[str, dict] = {}  # of each tab, its components by name

    # ---- what is seen
    def build(self) -> gr.Blocks:
        """All of the page."""
        with gr.Blocks(title=self.model, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(self.tabs.heading(self.model))
            with gr.Tabs() as tabs:
                for name, operation in self.tabs.operations.items():
                    with gr.Tab(operation.title, id=name):
                        self._tab(name, operation)
            every = [self.fields[kind][name] for kind, name in self._in_links()]
            page.load(self.open_link, None, [tabs, *every], **QUIET)
        return page

    def _tab(self, kind: str, operation: Operation) -> None:
        gr.Markdown(operation.about)
        with gr.Row():
            with gr.Column(min_width=300):
                fields = self.fields[kind] = self._components(kind, operation.fields)
                with gr.Row():
                    beside = {"min_width": 120}
                    start = gr.Button(operation.title, variant="primary", elem_id=f"{kind}-start", **beside)
                    cancel = gr.Button("Cancel", elem_id=f"{kind}-cancel", **beside)
                examples = self.tabs.examples(kind)
                table = gr.Dataset(
                    samples=[[each.title] for each in examples], components=[gr.Textbox(visible=False)],
                    type="index", label="Examples", elem_id=f"{kind}-examples",
                )  # fmt: skip
            with gr.Column(min_width=300):
                outputs = [*self._results(kind), fields["seed"]]
        (gallery, status, link, frame, *_), inputs, run = outputs, list(fields.values()), self.runner(kind)
        shown = MODEL | {"js": SHOW.format(kind)}
        started = start.click(run, inputs, outputs, **shown | {"api_visibility": "public", "api_name": kind})
        filled = table.click(self.filler(kind, examples), table, inputs, **shown)
        again = filled.success(run, inputs, outputs, **MODEL)
        for each in (started, again):
            each.success(None, link, link, js=ADDRESS, **QUIET)
        cancel.click(self.cancel, None, status, cancels=[started, filled, again], queue=False, **QUIET)
        frame.input(lambda n: gr.Gallery(selected_index=n - 1), frame, gallery, queue=False, **QUIET)
        if "batch_size" in fields:
            gallery.select(use_seed, None, [fields["seed"], fields["new_seed"]], queue=False, **QUIET)

    def _results(self, kind: str) -> list:
        """Pictures, status, link, and of rows a slider over them and one that moves."""
        look = {"buttons": ["download", "fullscreen"], "format": "png", "object_fit": "contain"}
        moving = {"buttons": look["buttons"], "height": 240, "interactive": False}
        moving["elem_classes"] = look_of(self.pipe, "picture")
        look |= {"show_label": False, "elem_classes": look_of(self.pipe, "gallery")}
        title, later = self.tabs.operations[kind].title, {"placeholder": "It comes with the pictures."}
        return [
            gr.Gallery(label="Pictures", elem_id=f"{kind}-pictures", **look),
            gr.Markdown(f"Press {title}, or an example.", elem_id=f"{kind}-status", elem_classes="status"),
            gr.Textbox(label="Link to these settings", buttons=["copy"], elem_id=f"{kind}-link", **later),
            gr.Slider(1, 2, 1, step=1, label="Step", visible=False, elem_id=f"{kind}-frame"),
            gr.Image(label="Animation", visible=False, elem_id=f"{kind}-moving", **moving),
        ]

    def _components(self, kind: str, names: tuple[str, ...]) -> dict:
        """The fields of a tab by name, of which some are folded."""
        folded = {"Settings": SETTINGS}
        if kind == "interpolate":
            folded = {"Two pictures of yours": ("image", "other")} | folded
        rest = [name for name in names if name not in sum(folded.values(), ())]
        fields = {name: component(self.tabs, kind, name) for name in rest}
        for title, inside in folded.items():
            with gr.Accordion(title, open=False, elem_id=f"{kind}-{title.split()[0].lower()}"):
                fields |= {name: component(self.tabs, kind, name) for name in names if name in inside}
        return fields

    # ---- what happens
    def _drawn(self, session: str, *request):
        """Progress and pictures of `commands.stream`. On ZeroGPU another process runs this, on copies of its
        arguments."""
        stop = self.running.setdefault(session, threading.Event())
        with self.lock:
            yield from commands.stream(self.pipe, stop, *request)

    def runner(self, kind: str):
        """The function of a tab's button, which yields what `_results` shows and the seed."""
        same = gr.skip()

        def run(request: gr.Request, *values):
            begun, session = time.monotonic(), request.session_hash
            with explained(), tempfile.TemporaryDirectory() as folder:
                asked, seed, said = self._asked(kind, dict(zip(self.fields[kind], values, strict=True)))
                try:
                    with closing(self.drawn(session, *asked)) as drawn:
                        for progress, pictures in drawn:
                            if progress:
                                yield pictures or same, progress, same, same, same, seed
                except commands.Stopped:
                    yield same, "cancelled", same, same, same, same
                    return
                finally:
                    self.running.pop(session, None)
                gallery, frame, moving = self._saved(kind, pictures, seed, said, Path(folder))
                link = {name: value for name, value in said.items() if name in self.fields[kind]}
                told = f"done in {time.monotonic() - begun:.1f} s"
                yield gallery, told, f"?{urlencode({'tab': kind, **link})}", frame, moving, seed

        return run

    def _asked(self, kind: str, given: dict) -> tuple[tuple, int, dict]:
        """Arguments of `commands.stream`, the seed, and the settings as a picture says them."""
        given["seed"] = seed = random.randrange(100_000) if given.pop("new_seed") else given["seed"] or 0
        command, options, number = self.tabs.asked(kind, given)
        scheduler = given.get("scheduler", type(self.pipe.scheduler).__name__)
        said = {"command": command, "model": self.model, "dtype": str(self.pipe.dtype).split(".")[1]}
        said |= {name: value for name, value in given.items() if name not in PICTURES and value != ""}
        if files := [Path(given[name]).name for name in PICTURES[:2] if given.get(name)]:
            said["files"] = files
        return (command, options, seed, number, scheduler, kind == "film"), seed, said

    def _saved(self, kind: str, pictures: list, seed: int, said: dict, folder: Path) -> tuple:
        """Values of gallery, slider and moving picture; every picture says its settings."""
        film, rows, last, files = kind == "film", kind in ("film", "interpolate"), len(pictures), []
        for i, picture in enumerate(pictures):
            own = said | {"seed": seed if rows else seed + i}
            caption = f"{i + 1} of {last}" if rows else f"seed {seed + i}"
            files.append((str(commands.save(picture, folder, kind, own)), caption))
        if not rows:
            return files, gr.skip(), gr.skip()
        moving = gr.Image(commands.save_animation(pictures, folder / f"{kind}.webp", not film), visible=True)
        if not film:
            return files, gr.skip(), moving
        frame = gr.Slider(maximum=last, value=last, visible=True) if last > 1 else gr.skip()
        return gr.Gallery(files, selected_index=last - 1), frame, moving

    def filler(self, kind: str, examples: list[Example]):
        """The function of a tab's examples: their values of its fields, with the picture drawn."""

        def fill(index: int):
            example, fields = examples[index], self.fields[kind]
            values = {"seed": 0, "new_seed": False} | example.values
            if picture := {"image", "canvas"} & set(fields) and kind != "interpolate":
                with explained(), self.lock:
                    picture = self.tabs.source(example)
            if "canvas" in fields:
                picture = picture.resize((CANVAS, CANVAS), Image.Resampling.NEAREST)
                mask = Image.new("RGBA", picture.size)
                mask.paste(PAINT, (CANVAS // 2, 0, CANVAS, CANVAS))
                values["canvas"] = {"background": picture, "layers": [mask], "composite": picture}
            elif picture:
                values["image"] = picture
            return [values.get(name, None if name in PICTURES else gr.skip()) for name in fields]

        return fill

    def cancel(self, request: gr.Request) -> str:
        """Stop what this visitor has begun; returns once nothing more can be said of it."""
        if stop := self.running.get(request.session_hash):
            stop.set()
            end = time.monotonic() + 10
            while request.session_hash in self.running and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(0.5)  # its last progress is on its way to the browser
        return "cancelled"

    def open_link(self, request: gr.Request) -> list:
        """The tab and the values of its fields that the link says."""
        said = dict(request.query_params)
        kind = said.get("tab", next(iter(self.fields)))
        with explained():
            if kind not in self.fields:
                known = ", ".join(self.fields)
                raise ValueError(f"The link asks for the tab {kind!r}; this model has: {known}")
            fields = {name: field for name, field in self.fields[kind].items() if name not in PICTURES}
            found = {name: value_of(fields[name], name, said[name]) for name in fields.keys() & said.keys()}
        found |= {"new_seed": False} if "seed" in found else {}
        values = [found.get(name, gr.skip()) if tab == kind else gr.skip() for tab, name in self._in_links()]
        return [gr.Tabs(selected=kind), *values]

    def _in_links(self) -> list[tuple[str, str]]:
        """Tab and name of the fields that a link sets. Gradio makes components anew that a skip went to."""
        every = [(kind, name) for kind, fields in self.fields.items() for name in fields]
        return [(kind, name) for kind, name in every if name not in PICTURES]


def use_seed(event: gr.SelectData) -> tuple:
    """The seed of the picture that was chosen, for all that follow."""
    return int(event.value["caption"].removeprefix("seed ")), False


def unavailable(model: str, error: Exception) -> gr.Blocks:
    """The page in place of a model that cannot be loaded."""
    with gr.Blocks(title=model, analytics_enabled=False) as page:
        gr.Markdown(
            f"## {model} cannot be loaded\n{error}\n\nIt may have been renamed, deleted or made private. "
            "A Space reads a private one with a token as its secret `HF_TOKEN`. Then restart it."
        )
    return page


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
    """Serve a page, by default on this machine alone at the first free port from 7860; its address.

    wait: until Ctrl-C.
    """
    look = {"theme": gr.themes.Base(**FONTS).set(**COLORS), "css": CSS}
    private = {"share": False, "run_history": False, "footer_links": [], "ssr_mode": False}
    options = {"show_error": True, "max_file_size": "20mb", "quiet": True, "prevent_thread_lock": True}
    page.queue(max_size=32)
    _, url, _ = page.launch(server_name=host, server_port=port, **look, **private, **options)
    if wait:
        print(f"The page: {url} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return url


def main(model: str, prompts=()) -> None:
    """Serve a model as a Space."""
    try:
        page = Page(commands.load(model), model, prompts).build()
    except (OSError, ValueError) as error:
        page = unavailable(model, error)
    serve(page)
