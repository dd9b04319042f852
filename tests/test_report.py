"""The report of a run: what it shows, and what it must not hold."""

import base64
import json
import re
import shutil
import signal
from html.parser import HTMLParser
from io import BytesIO

import pytest
from conftest import launch, start
from PIL import Image

from training.evaluation.curves import draw_charts
from training.evaluation.report import main, save_report
from training.runtime.signals import EXIT_CODE

VOID = {"meta", "link", "img", "input"}
FINISHED = ["progress", "samples", "figures", "denoiser", "autoencoder", "neighbours", "configuration"]


class Page(HTMLParser):
    """A report, parsed; an element that is not closed, or not open, fails.

    Attributes:
        elements: Tag and attributes of every element.
        text: What a reader sees and what the script says.
    """

    def __init__(self, run):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed((run / "report.html").read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (self.getpos(), tag)

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self):
        assert [a["href"] for a in self.all("a")] == [f"#{a['id']}" for a in self.all("section")]
        return [attributes["id"] for attributes in self.all("section")]

    def charts(self):
        return [svg["aria-label"].split(":")[0] for svg in self.all("svg")]


def test_a_finished_run_shows_all_that_it_has_in_one_file(tiny_run):
    page = Page(tiny_run)
    assert page.sections == FINISHED
    assert page.text.count("finished") >= 4 and "Not finished" not in page.text
    shown = {"Loss in training": 2, "Learning rate": 2, "Rate of training": 2, "Waiting for data": 2}
    shown |= {"Held-out error by noise level": 1, "PSNR of held-out reconstructions": 1}
    assert shown.items() <= {title: page.charts().count(title) for title in page.charts()}.items()
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert f"{metrics['reconstruction']['PSNR']:.4g}" in page.text
    assert metrics["samples"]["protocol"]["samples_sha256"] in page.text
    assert (tiny_run / "config.yaml").read_text() in page.text

    sizes = {}
    for image in page.all("img"):
        kind, _, data = image["src"].partition(";base64,")
        assert kind in ("data:image/png", "data:image/webp")
        picture = Image.open(BytesIO(base64.b64decode(data)))
        assert picture.size == (int(image["width"]), int(image["height"]))
        sizes[image["alt"]] = picture.size
    # Of both networks' grids over the steps, and at the end.
    grids = {f"Grid of reconstructions at step {step}" for step in (6, 12)}
    assert grids | {"Grid of samples at step 12", "Grid of samples of the finished model"} < sizes.keys()

    for _, attributes in page.elements:  # whatever a browser would fetch
        for name in {"src", "href", "srcset", "data", "poster", "action"} & attributes.keys():
            assert attributes[name].startswith(("data:", "#"))
    assert not re.search(r"url\(|@import|https?://|fetch|XMLHttp", (tiny_run / "report.html").read_text())


def test_a_stopped_run_shows_what_it_has_and_how_it_goes_on(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    options = ["--output_dir", run, "--redo=[denoiser]", "--denoiser.max_steps=100000"]
    options += ["--denoiser.checkpoint_every=100000", "--denoiser.sample_every=100000"]
    with start("train_ldm.py", *options) as process:
        process.wait_until(lambda: '"step": 18, "val_loss"' in (run / "metrics.jsonl").read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_CODE
    page = Page(run)
    # The grids and figures of the model that is trained again are not those of this one.
    assert page.sections == ["progress", "denoiser", "autoencoder", "configuration"]
    assert not [image for image in page.all("img") if "samples" in image["alt"]]
    assert "Not finished" in page.text and "of 100,000" in page.text
    assert f"python training/train_ldm.py --config {run / 'config.yaml'}" in page.text
    done, wanted = (int(page.all("progress")[0][name]) for name in ("value", "max"))
    saved = int(re.search(r"stopped in stage denoiser.*checkpoint-(\d+)", process.stdout)[1])
    assert 18 <= done == saved and wanted == 100000  # written after the signal


def test_names_from_the_data_are_text(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    name = "</script><script>alert('x')</script><img src=http://x.org onerror='alert(1)'>\"&"
    data, metrics = (json.loads((run / file).read_text()) for file in ("data.json", "metrics.json"))
    data["scan"]["classes"] = {name: 3}
    metrics["prompts"] = [name]
    metrics["samples"]["per_class"] = {"figure": "FD", "values": {name: 1.0}}
    (run / "data.json").write_text(json.dumps(data))
    (run / "metrics.json").write_text(json.dumps(metrics))
    before = Page(run)
    save_report(run)
    page = Page(run)
    assert page.text.count(name) == 3
    assert [len(page.all(tag)) for tag in ("script", "img")] == [1, len(before.all("img"))]


def test_a_report_that_fails_ends_no_run(tiny_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "sweep").mkdir()
    (run / "sweep" / "sweep.json").write_text("{")
    assert "no new report.html" in launch("train_ldm.py", "--output_dir", run).stdout
    for folder, message in ((run, "sweep.json"), (tmp_path, "want a run folder")):
        monkeypatch.setattr("sys.argv", ["report", str(folder)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert message in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="no Chromium here; make browser installs it")
def test_a_browser_moves_slider_and_pointer_without_an_error_or_a_request(tiny_run):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver"))) as browser:
        browser.get((tiny_run / "report.html").as_uri())
        film = browser.find_element("css selector", "#autoencoder .film")
        grids = film.find_elements("tag name", "img")
        assert [grid.is_displayed() for grid in grids] == [False, True]  # the last one first
        film.find_element("tag name", "input").send_keys(Keys.HOME)
        assert [grid.is_displayed() for grid in grids] == [True, False]
        assert film.find_element("tag name", "output").text == "Step 6"

        chart = browser.find_element("css selector", "#denoiser .chart")
        drawing, value = chart.find_element("tag name", "svg"), chart.find_element("css selector", "li b")
        at_the_end = value.text
        ActionChains(browser).move_to_element(drawing).perform()  # its middle
        assert chart.find_element("tag name", "output").text == "step 6" and value.text != at_the_end

        assert browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if "request" in event["params"]]
        assert sent and not [url for url in sent if url.startswith(("http", "ws"))]


def test_a_chart_has_its_lines_in_its_frame_and_round_numbers_on_its_axes():
    records = [{"step": step, "loss": 2.0 * 0.99**step, "error": -1.0} for step in range(10, 2001, 10)]
    records += [{"step": 2000, "loss": float("nan"), "FD-20": 3, "val_loss_by_timestep": [1.0, 2.0, 3.0]}]
    charts = {chart.title: chart for chart in draw_charts(records)}
    assert list(charts) == ["Loss in training", "Prediction error", "Held-out error by noise level", "FD-20"]
    for chart in charts.values():
        for line in chart.lines:
            places = [tuple(map(float, point.split(","))) for point in line.points.split()]
            assert len(places) == len(line.steps) == len(line.values) <= 200
            assert all(54 <= x <= 352 and 8 <= y <= 186 for x, y in places)
    loss = charts["Loss in training"]
    assert [text for _, text in loss.x_ticks] == ["0", "500", "1000", "1500", "2000"]
    assert {"1", "0.01", "1e-08"} <= {text for _, text in loss.y_ticks}  # logarithmic
    levels = charts["Held-out error by noise level"].lines
    assert [line.name for line in levels] == ["clean", "2 of 3", "noisy"]
    assert loss.lines[0].steps[-1] == "2,000" and loss.lines[0].values[-1] == f"{2.0 * 0.99**2000:.4g}"
