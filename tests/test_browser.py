"""The page of a model as a person uses it: in Chromium, every tab, and no request to elsewhere.

`make browser` installs Chromium and runs these. The server is a process of its own, which notes every address
that it looks up or connects to.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from tests.test_captions import encoder, tiny_text_pipe  # noqa: F401, the fixture
from tests.test_pipeline import tiny_pipe
from tests.test_tasks import task_pipe

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no chromium and chromedriver here; make browser installs them"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)]
KINDS = ("draw", "edit", "inpaint", "restore", "interpolate", "film")
FLAGS = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1200")
SERVE = """
import sys
outside = open(sys.argv.pop(1), "a", buffering=1)
def note(event, arguments):
    if event == "socket.connect" and not isinstance(arguments[1], tuple):
        return  # within this machine
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1][0] if event == "socket.connect" else arguments[0]
        if host not in ("127.0.0.1", "localhost", "::1", None):
            print(event, host, file=outside)
sys.addaudithook(note)
from ldm_pipeline.__main__ import main
main()
"""


class Served:
    """A page of a model in a process of its own; a context manager."""

    def __init__(self, model: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.url, self.outside = f"http://127.0.0.1:{self.port}", model.parent / f"outside-{self.port}.txt"
        self.log = model.parent / f"log-{self.port}.txt"
        arguments = [
            str(self.outside),
            "app",
            str(model),
            "--port",
            str(self.port),
            "--device",
            "cpu",
            *options,
        ]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *arguments], cwd=ROOT, stdout=output, stderr=output,
                env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"},
            )  # fmt: skip

    def __enter__(self):
        until(lambda: urlopen(self.url).status == 200, lambda: self.log.read_text()[-2000:])
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def until(condition, told=lambda: "", seconds: float = 120):
    """The first true value of a condition, which may raise until then."""
    end, error = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except Exception as caught:  # of a page that is not there yet
            error = caught
        time.sleep(0.1)
    raise TimeoutError(f"{error}: {told()}")


class Person:
    """Somebody at a browser, who opens a page and uses it."""

    def __init__(self, url: str):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in FLAGS:
            options.add_argument(f"--{flag}")
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.browser, self.url = webdriver.Chrome(options=options, service=Service(DRIVER)), url
        self.errors: list[str] = []
        self.open()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.browser.quit()

    def open(self, query: str = ""):
        """Open the page, with a query such as "?tab=edit"."""
        self.errors += self.console()
        self.browser.get(self.url + query)
        # What is left behind breaks off its connections.
        self.errors += [each for each in self.console() if not re.search("Abort|Connection errored", each)]
        until(lambda: self.find("button[id$=-start]"))

    def find(self, css: str) -> list:
        """Visible ones of these elements."""
        return [each for each in self.browser.find_elements("css selector", css) if each.is_displayed()]

    def titles(self) -> list[str]:
        return [each.text for each in self.find("[role=tab]")]

    def tab(self, title: str):
        """Choose a tab, once the page reacts."""

        def chosen():
            tab = next(each for each in self.find("[role=tab]") if each.text == title)
            tab.click()
            return tab.get_attribute("aria-selected") == "true"

        until(chosen)

    def status(self, kind: str) -> str:
        return self.browser.find_element("id", f"{kind}-status").text

    def messages(self) -> str:
        return " ".join(each.text for each in self.find(".toast-body"))

    def is_told(self, message: str):
        """Wait for a message of this pattern."""
        until(lambda: re.search(message, self.messages()), self.messages, 60)

    def upload(self, field: str, path: Path):
        """Choose a file for a field."""
        css = f"#{field} input[type=file]"
        until(lambda: self.browser.find_element("css selector", css)).send_keys(str(path))

    def finished(self, kind: str) -> list[Image.Image]:
        """The pictures of a tab, once they are drawn."""
        until(lambda: "done" in self.status(kind), lambda: f"{self.status(kind)} {self.messages()}")
        shown = until(
            lambda: self.find(f"#{kind}-pictures .grid-container img, #{kind}-pictures .preview img")
        )
        return [picture_at(each.get_attribute("src")) for each in shown]

    def fill(self, field: str, text):
        """Write into a field, such as "draw-seed"."""
        box = self.browser.find_element("css selector", f"#{field} input, #{field} textarea")
        self.browser.execute_script("arguments[0].select()", box)
        box.send_keys(f"\b{text}\t")

    def value(self, field: str) -> str:
        return self.browser.find_element("css selector", f"#{field} input, #{field} textarea").get_attribute(
            "value"
        )

    def click(self, css: str, number: int = 0):
        """Click an element, once it is there and nothing lies over it."""

        def clicked():
            self.find(css)[number].click()
            return True

        until(clicked)

    def console(self) -> list[str]:
        """Errors since the last call."""
        entries = self.browser.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Addresses elsewhere that the browser asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        events = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
        asked = [each["request"]["url"] for each in events]
        assert [url for url in asked if url.startswith(self.url)]
        return [url for url in asked if not url.startswith((self.url, "data:", "blob:"))]


def picture_at(url: str) -> Image.Image:
    with urlopen(url) as file, Image.open(file) as picture:
        picture.load()
        return picture


def seed_of(picture: Image.Image) -> int:
    return json.loads(picture.info["parameters"])["seed"]


def nothing_left(person: Person, served: Served):
    """No request to elsewhere, by browser or server, and no error in the console."""
    assert person.requests() == [] and served.outside.read_text() == ""
    assert person.errors + person.console() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of classes."""
    folder = tmp_path_factory.mktemp("page") / "model"
    pipe = tiny_pipe()
    pipe.register_to_config(defaults={"num_inference_steps": 3})
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with Served(folder) as served:
        yield served


@pytest.fixture(scope="module")
def visitor(served):
    with Person(served.url) as person:
        yield person


@pytest.fixture
def person(visitor):
    visitor.open()
    return visitor


def every_example(person: Person, *kinds: str):
    """Click each example of each tab, and wait for its pictures."""
    for kind in kinds:
        person.open(f"?tab={kind}")
        for number in range(len(until(lambda css=f"#{kind}-examples button": person.find(css)))):
            if number:
                person.open(f"?tab={kind}")
            person.click(f"#{kind}-examples button", number)
            pictures = person.finished(kind)
            assert all(len(picture.getcolors(10**4)) > 1 for picture in pictures), (kind, number)


def test_every_example_of_every_tab_draws_and_nothing_leaves(person, served):
    assert person.titles() == ["Draw", "Edit", "Inpaint", "Restore", "Interpolate", "Film"]
    every_example(person, *KINDS)
    nothing_left(person, served)


@pytest.fixture
def phone(person):
    """Somebody at a phone of 390 pixels, in the dark."""
    tell, size = person.browser.execute_cdp_cmd, {"width": 390, "height": 844, "deviceScaleFactor": 1}
    tell("Emulation.setDeviceMetricsOverride", size | {"mobile": True})
    tell("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    yield person
    tell("Emulation.clearDeviceMetricsOverride", {})
    tell("Emulation.setEmulatedMedia", {"features": []})


def test_every_tab_fits_a_phone(phone):
    """Gradio hides what is too wide, so that a page which does not scroll may still be cut off."""
    edges = "[...document.querySelectorAll('.block')].map(x => x.getBoundingClientRect().right)"
    earlier = len(phone.errors)
    for kind in KINDS:
        phone.open(f"?tab={kind}")
        if kind == "film":
            phone.click("#film-examples button")
            phone.finished(kind)
        assert until(lambda kind=kind: phone.find(f"#{kind}-start")) and phone.find("body.dark")
        widest = phone.browser.execute_script(f"return Math.max(document.body.scrollWidth, ...{edges})")
        assert widest <= 390, kind
    assert phone.errors[earlier:] + phone.console() == []


@pytest.mark.parametrize("kind", ["text", "inpaint", "superres"])
def test_other_kinds_of_models(kind, encoder, tmp_path):  # noqa: F811
    tasks = {"inpaint": {"kind": "inpaint"}, "superres": {"kind": "superres", "factor": 2}}
    pipe = task_pipe(tasks[kind]) if kind in tasks else tiny_text_pipe(encoder)
    pipe.register_to_config(defaults={"num_inference_steps": 3, "guidance_scale": 2.0})
    pipe.save_pretrained(tmp_path / "model")
    with Served(tmp_path / "model", "--prompts", "a 3", "a 5") as served, Person(served.url) as person:
        every_example(person, {"text": "draw", "superres": "task"}.get(kind, kind), "film")
        if kind == "text":
            person.open("?tab=draw")
            person.fill("draw-prompt", "")
            person.click("#draw-start")
            person.is_told("The prompt is empty")
        nothing_left(person, served)


def test_a_picture_says_its_settings_and_gives_back_its_seed(person):
    person.fill("draw-seed", 7)
    person.click("#draw-new_seed input")
    person.click("#draw-start")
    pictures = person.finished("draw")
    assert [seed_of(each) for each in pictures] == [7, 8, 9, 10]
    assert json.loads(pictures[0].info["parameters"])["class_labels"] == "cat"
    person.click("#draw-pictures .thumbnail-lg", 2)
    until(lambda: person.value("draw-seed") == "9")
    person.click("#draw-start")
    # The one that was chosen is shown large, and all of them below it.
    until(lambda: {seed_of(each) for each in person.finished("draw")} == {9, 10, 11, 12})
    link = until(lambda: person.value("draw-link"))
    assert "seed=9" in link and link == person.browser.current_url
    person.browser.get(link)
    until(lambda: person.find("#draw-start") and person.value("draw-seed") == "9")
    person.click("#draw-start")
    assert np.array_equal(person.finished("draw")[0], pictures[2])


def test_what_is_drawn_is_seen_on_the_way_and_can_be_cancelled(person):
    person.open("?tab=draw&num_inference_steps=200&batch_size=16&seed=1")
    until(lambda: person.value("draw-seed") == "1")
    person.click("#draw-start")
    pictures = "return document.querySelectorAll('#draw-pictures img').length"
    until(lambda: "step" in person.status("draw") and person.browser.execute_script(pictures) == 16)
    person.click("#draw-cancel")
    until(lambda: person.status("draw") == "cancelled")
    person.tab("Film")
    person.click("#film-examples button")  # the next is not kept waiting
    person.finished("film")
    assert person.status("draw") == "cancelled" or not person.find("#draw-status")


def test_a_film_is_wound_by_its_slider(person):
    person.tab("Film")
    person.click("#film-examples button")
    person.finished("film")
    last = person.find("#film-pictures .preview img")[0].get_attribute("src")
    person.fill("film-frame", 1)
    until(lambda: person.find("#film-pictures .preview img")[0].get_attribute("src") != last)


def test_what_is_painted_over_changes_and_all_else_stays(person, tmp_path):
    from selenium.webdriver import ActionChains

    ramp = np.broadcast_to(np.linspace(40, 220, 256).astype(np.uint8), (256, 256))
    given = Image.fromarray(np.stack([ramp, ramp.T, ramp // 2], -1))
    given.save(tmp_path / "ramp.png")
    person.open("?tab=inpaint&seed=1")
    canvas = until(lambda: person.find("#inpaint-canvas canvas"))[0]
    person.upload("inpaint-canvas", tmp_path / "ramp.png")
    until(lambda: "Upload an image" not in person.find("#inpaint-canvas")[0].text)
    hand = ActionChains(person.browser).move_to_element(canvas)
    hand.move_by_offset(canvas.size["height"] // 8, canvas.size["height"] // 8)
    hand.click_and_hold().move_by_offset(20, 10).release().perform()
    time.sleep(1)
    person.click("#inpaint-start")
    found = np.asarray(person.finished("inpaint")[0], float)
    kept = np.asarray(given.resize((16, 16), Image.Resampling.BICUBIC), float)
    changed = np.abs(found - kept).max(-1) > 12
    assert changed.any() and not changed[:6].any() and not changed[:, :6].any()


def test_what_cannot_be_drawn_is_said_in_the_page(person, tmp_path):
    for name in ("notes.txt", "notes.png"):
        (tmp_path / name).write_text("no picture")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "huge.png")
    person.open("?tab=edit")
    person.click("#edit-start")
    person.is_told("There is no picture")
    for name, message in {
        "notes.txt": "file type",
        "notes.png": "notes.png cannot be read",
        "huge.png": "huge.png cannot be read.*pixels",
    }.items():
        person.open("?tab=edit")
        person.upload("edit-image", tmp_path / name)
        if name.endswith("png"):
            until(lambda: person.find("#edit-image img"))
            person.click("#edit-start")
        person.is_told(message)
    person.open("?class_labels=unicorn")
    person.is_told("class_labels=unicorn; this model has: any class, cat, dog, owl")


def test_a_model_whose_folder_vanishes_goes_on(person, folder):
    folder.rename(folder.with_name("elsewhere"))
    try:
        person.click("#draw-examples button")
        assert len(person.finished("draw")) == 4
    finally:
        folder.with_name("elsewhere").rename(folder)
