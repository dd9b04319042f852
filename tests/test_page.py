"""The page of a model without a browser: its tabs, what they ask of the pipeline, its answers over HTTP."""

import json
import sys
import threading
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import ROOT
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from ldm_pipeline import __main__ as command_line
from ldm_pipeline import commands, editing
from ldm_pipeline.app import Page, serve, use_seed
from ldm_pipeline.models import build_scheduler
from ldm_pipeline.tabs import ANY, Tabs
from tests.test_captions import encoder, tiny_text_pipe  # noqa: F401, the fixture
from tests.test_pipeline import FLOW, generators, tiny_pipe
from tests.test_structure import imports
from tests.test_tasks import photo, task_pipe

FEW = {"num_inference_steps": 3, "guidance_scale": 1.0, "new_seed": False, "seed": 0, "batch_size": 1}
FEW |= {"strength": 0.6, "degradation": "blur:1", "frames": 4}
SIMPLE = ["draw", "edit", "inpaint", "restore", "interpolate", "film"]


def filled(tabs, kind, **values):
    """The fields of a tab as the page has them, with these values."""
    classes = dict.fromkeys(("class_labels", "first", "last"), ANY)
    values = classes | FEW | {"scheduler": type(tabs.pipe.scheduler).__name__} | values
    return {name: values.get(name) for name in tabs.operations[kind].fields}


# --------------------------------------------------------------------------------------------------- previews
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_a_callback_sees_the_clean_latents_that_the_network_predicts(name):
    pipe, seen = tiny_pipe(scheduler=build_scheduler(FLOW, name)), []

    def see(pipe, i, t, values):
        seen.append(values["clean"])

    noise = torch.randn(1, 4, 8, 8, generator=generators(0)[0])
    options = {"output_type": "latent", "latents": noise, "num_inference_steps": 4}
    latents = pipe(**options, callback_on_step_end=see, callback_on_step_end_tensor_inputs=["clean"]).images
    assert len(seen) == pipe.num_timesteps and all(each.shape == latents.shape for each in seen)
    assert (seen[-1] - latents).abs().max() < 1e-4  # the last step goes where the network points
    assert (seen[0] - latents).abs().max() > 1e-2
    assert torch.equal(pipe(**options).images, latents)


def test_what_is_drawn_can_be_watched_and_stopped():
    pipe, stop, told, evaluations = tiny_pipe(), threading.Event(), [], []
    own, many = pipe.scheduler, {"num_inference_steps": 50}
    count = pipe.unet.register_forward_hook(lambda *_: evaluations.append(1))
    with pytest.raises(commands.Stopped):
        for progress, pictures in commands.stream(pipe, stop, "sample", many, 0, 2, "DDIMScheduler", False):
            told.append((progress, len(pictures)))
            if len(told) == 2:
                stop.set()
    assert told[0] == ("step 1 of 50", 2) and len(evaluations) < 50
    count.remove()
    assert not pipe.unet._forward_pre_hooks and pipe.scheduler is own
    before = threading.active_count()
    for command in ("sample", "interpolate"):  # whoever goes away in the middle
        given = pipe, threading.Event(), command, many, 0, 2, type(own).__name__, False
        for _ in commands.stream(*given):
            break
        assert threading.active_count() == before
    none = pipe, threading.Event(), "sample", {"num_inference_steps": 0}, 0, 1, "DDIMScheduler", False
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        list(commands.stream(*none))


def test_a_film_ends_with_the_picture():
    pipe, given = tiny_pipe(), ("sample", {"num_inference_steps": 4}, 3, 1, "FlowMatchEulerDiscreteScheduler")
    film, drawn = (
        list(commands.stream(pipe, threading.Event(), *given, each))[-1][1] for each in (True, False)
    )
    assert len(film) == 4 and len(drawn) == 1
    assert np.abs(np.asarray(film[-1], int) - np.asarray(drawn[0])).max() <= 1


# ------------------------------------------------------------------------------------------------------- tabs
def test_tabs_appear_by_what_the_model_can(encoder):  # noqa: F811
    assert list(Tabs(tiny_pipe()).operations) == SIMPLE
    texts, plain = Tabs(tiny_text_pipe(encoder), ["a 3", "a 5"]), Tabs(tiny_pipe(classes=None))
    assert list(texts.operations) == list(plain.operations) == SIMPLE
    assert {"prompt", "negative_prompt"} < set(texts.operations["draw"].fields)
    assert not {"prompt", "class_labels", "guidance_scale"} & set(plain.operations["draw"].fields)
    assert [each.values["prompt"] for each in texts.examples("draw")] == ["a 3", "a 5"]
    for task, titles, field in (
        ({"kind": "inpaint"}, ["Inpaint", "Film"], "canvas"),
        ({"kind": "superres", "factor": 2}, ["Enlarge", "Film"], "image"),
        ({"kind": "column", "column": "depth", "nearest": False}, ["depth", "Film"], "image"),
    ):
        tabs = Tabs(task_pipe(task))
        assert [each.title for each in tabs.operations.values()] == titles
        assert all(field in each.fields for each in tabs.operations.values())


def test_classes_of_one_name_are_told_apart():
    pipe = tiny_pipe()
    pipe.register_to_config(id2label={"0": "cat", "2": "cat"})
    tabs = Tabs(pipe)
    assert tabs.classes == ["cat (0)", "1", "cat (2)"]
    assert tabs.asked("draw", filled(tabs, "draw", class_labels="cat (2)"))[1]["class_labels"] == 2


TASKS = [{"kind": "inpaint"}, {"kind": "superres", "factor": 2}, {"kind": "colorize"}]
PIPES = {"classes": tiny_pipe, "plain": lambda: tiny_pipe(classes=None)}
PIPES |= {task["kind"]: lambda task=task: task_pipe(task) for task in TASKS}


@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
def test_every_example_can_be_drawn(make, tmp_path):
    tabs = Tabs(make())
    for kind, operation in tabs.operations.items():
        for example in tabs.examples(kind):
            values = filled(tabs, kind, **example.values)
            assert set(example.values) <= set(operation.fields)
            if {"image", "canvas"} & set(values) and kind != "interpolate":
                source = tabs.source(example)
                source.save(tmp_path / "source.png")
                layer = Image.new("RGBA", source.size, "red")
                canvas = {"background": source, "layers": [layer]}
                picture = {"image": tmp_path / "source.png", "canvas": canvas}
                values |= {name: value for name, value in picture.items() if name in values}
            command, options, number = tabs.asked(kind, values)
            drawn = commands.operate(tabs.pipe, command, options, 0, number)
            assert len(drawn) == options.get("frames", 1) and len(drawn[0].getcolors(10**4)) > 1


def test_fields_that_cannot_be_meant(tmp_path, encoder):  # noqa: F811
    tabs = Tabs(tiny_pipe())
    (tmp_path / "notes.png").write_text("no picture")
    huge = {"width": 20_000, "height": 20_000}
    Image.new("1", tuple(huge.values())).save(tmp_path / "huge.png")
    empty, painted = {"background": None, "layers": []}, {"background": photo(16, 16), "layers": []}
    for kind, values, message in (
        ("edit", {}, "There is no picture"),
        ("inpaint", {"canvas": empty}, "There is no picture"),
        ("inpaint", {"canvas": painted}, "Nothing is painted"),
        ("inpaint", {"canvas": painted | {"layers": [Image.new("RGBA", (16, 16))]}}, "Nothing is painted"),
        ("edit", {"image": tmp_path / "notes.png"}, "notes.png cannot be read as a picture"),
        ("edit", {"image": tmp_path / "huge.png"}, "huge.png cannot be read as a picture.*exceeds limit"),
        ("draw", {"guidance_scale": 2.0}, "No class is chosen"),
    ):
        with pytest.raises(ValueError, match=message):
            tabs.asked(kind, filled(tabs, kind, **values))
    texts = Tabs(tiny_text_pipe(encoder))
    with pytest.raises(ValueError, match="The prompt is empty"):
        texts.asked("draw", filled(texts, "draw", prompt="", guidance_scale=3.0))
    assert texts.asked("draw", filled(texts, "draw", prompt=""))[1].keys() == {
        *("num_inference_steps", "guidance_scale", "batch_size")
    }


def test_what_a_canvas_adds_around_a_picture_is_no_part_of_it():
    tabs, (canvas, layer) = Tabs(tiny_pipe()), (Image.new("RGBA", (16, 16)) for _ in range(2))
    canvas.paste(photo(16, 8), (0, 4))
    layer.paste("red", (0, 4, 8, 12))
    values = filled(tabs, "inpaint", canvas={"background": canvas, "layers": [layer]})
    options = tabs.asked("inpaint", values)[1]
    assert np.array_equal(options["image"].convert("RGB"), photo(16, 8))
    assert options["mask_image"].size == (16, 8) and options["mask_image"].getbbox() == (0, 0, 8, 8)


# ------------------------------------------------------------------------------------------------------- HTTP
@pytest.fixture(scope="module")
def served():
    """A page of a tiny model, and its address."""
    page = Page(tiny_pipe(), "org/tiny")
    yield page, serve(page.build(), wait=False)
    gr.close_all()


def ask(url, page, kind, **values):
    """The last answer of a tab over HTTP."""
    values = filled(page.tabs, kind, **values)
    client = Client(url, verbose=False)
    return client.predict(*(values[name] for name in page.fields[kind]), api_name=f"/{kind}")


def test_the_page_draws_like_python_and_says_so_in_the_picture(served, tmp_path, monkeypatch):
    page, url = served
    gallery, status, link, *_, seed = ask(url, page, "draw", class_labels="dog", batch_size=2, seed=5)
    wanted = page.pipe(class_labels="dog", generator=generators(5, 6), num_inference_steps=3).images
    assert [each["caption"] for each in gallery] == ["seed 5", "seed 6"] and seed == 5 and "done in" in status
    with Image.open(gallery[1]["image"]) as picture:
        assert np.array_equal(picture, wanted[1])
        said = json.loads(picture.info["parameters"])
    assert link.startswith("?tab=draw&class_labels=dog&batch_size=2&seed=5&num_inference_steps=3")
    assert (said.pop("command"), said.pop("model"), said.pop("seed")) == ("sample", "org/tiny", 6)
    page.pipe.save_pretrained(tmp_path / "model")
    options = [f"--{name}={said[name]}" for name in ("class_labels", "num_inference_steps", "guidance_scale")]
    options += ["--seed", "6", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["ldm", "sample", str(tmp_path / "model"), *options])
    command_line.main()
    with Image.open(tmp_path / "sample-0000.png") as picture:
        assert np.array_equal(picture, wanted[1])


def test_pictures_are_changed_like_in_python(served, tmp_path):
    page, url = served
    given = photo(16, 16)
    given.save(tmp_path / "photo.png")
    file = handle_file(str(tmp_path / "photo.png"))
    few = {"num_inference_steps": 3}
    for kind, values, wanted in (
        ("edit", {"strength": 0.5}, lambda **own: page.pipe(image=given, strength=0.5, **own).images),
        ("restore", {"degradation": "grey"}, lambda **own: editing.restore(page.pipe, given, "grey", **own)),
    ):
        gallery = ask(url, page, kind, image=file, **values)[0]
        with Image.open(gallery[0]["image"]) as picture:
            assert np.array_equal(picture, wanted(**few, generator=generators(0))[0]), kind
    row = ask(url, page, "interpolate", first="cat", last="owl", frames=4)
    assert len(row[0]) == 4
    with Image.open(row[4]["value"] if isinstance(row[4], dict) else row[4]) as moving:
        assert moving.n_frames == 6


def test_ten_requests_at_once_are_all_answered(served):
    page, url = served
    values = [filled(page.tabs, "draw", seed=seed, scheduler="DDIMScheduler") for seed in range(10)]
    client = Client(url, verbose=False)
    jobs = [client.submit(*(each[name] for name in page.fields["draw"]), api_name="/draw") for each in values]
    answers = [job.result(timeout=120)[0] for job in jobs]
    assert [answer[0]["caption"] for answer in answers] == [f"seed {seed}" for seed in range(10)]
    pictures = [np.asarray(Image.open(answer[0]["image"])) for answer in answers]
    assert len({picture.tobytes() for picture in pictures}) == 10 and not page.running


def test_bad_requests_are_answered_in_words(served, tmp_path):
    page, url = served
    (tmp_path / "notes.png").write_text("no picture")
    for kind, values, message in (
        ("edit", {}, "There is no picture"),
        ("edit", {"image": handle_file(str(tmp_path / "notes.png"))}, "^notes.png cannot be read"),
        ("draw", {"class_labels": "unicorn"}, "unicorn"),
        ("draw", {"guidance_scale": 3.0}, "No class is chosen"),
    ):
        with pytest.raises(AppError, match=message):
            ask(url, page, kind, **values)


def test_a_link_fills_its_tab_or_says_why_not():
    page = Page(tiny_pipe(), "tiny")
    page.build()

    def opened(**query):
        tabs, *values = page.open_link(SimpleNamespace(query_params=query))
        values = dict(zip(page._in_links(), values, strict=True))
        return tabs.selected, {name: value for name, value in values.items() if value != gr.skip()}

    assert opened() == ("draw", {}) and opened(__theme="dark") == ("draw", {})
    kind, values = opened(tab="edit", class_labels="dog", strength="0.3", seed="7", image="/etc/passwd")
    wanted = {"class_labels": "dog", "strength": 0.3, "seed": 7, "new_seed": False}
    assert kind == "edit" and values == {("edit", name): value for name, value in wanted.items()}
    for query, message in (
        (
            {"class_labels": "unicorn"},
            "class_labels=unicorn; this model has: any class, cat, dog, owl",
        ),
        ({"tab": "fly"}, "asks for the tab 'fly'; this model has: draw, edit"),
        ({"num_inference_steps": "9999"}, "num_inference_steps=9999; wanted a whole number from 1 to 200"),
        ({"guidance_scale": "much"}, "guidance_scale=much; wanted a number from 0 to 15"),
        ({"scheduler": "LCMScheduler"}, "scheduler=LCMScheduler"),
    ):
        with pytest.raises(gr.Error, match=message):
            opened(**query)


def test_a_picture_gives_back_its_seed():
    assert use_seed(SimpleNamespace(value={"caption": "seed 12"})) == (12, False)


def test_without_gradio_the_page_says_what_is_missing(monkeypatch):
    """The rest does not need it: no other module imports it."""
    for path in (ROOT / "ldm_pipeline").glob("*.py"):
        assert ("gradio" in imports(path)) == (path.name in ("app.py", "fields.py")), path
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ldm_pipeline.app")
    monkeypatch.setattr("sys.argv", ["ldm", "app", "org/tiny"])
    with pytest.raises(SystemExit, match="error: the page needs Gradio: pip install"):
        command_line.main()
