"""`--minutes`: what is chosen for a time, and a run that keeps to it."""

import re
import time
from dataclasses import replace

import pytest
import yaml
from conftest import TINY
from fork_server import Child

from training.config import Config, RunError, parse_config
from training.plan import choose
from training.recipes import AUTOENCODERS, UNETS, Facts, Speed, seen

CIFAR = Facts(images=50_000, held_out=10_000, side=32, classes=10, decoding=2e-4, scanning=12)
FLOWERS = Facts(images=2975, held_out=329, side=227, classes=5, decoding=1e-3, scanning=3)


def machine(speed: float = 1.0):
    """Speeds of a made-up machine, where time grows with pixels and with the square of the widths."""

    def measure(config: Config, name: str) -> Speed:
        if name == "autoencoder":
            stage, pixels = config.autoencoder, config.data.resolution**2
            step = pixels * sum(w * w for w in stage.widths) / 1e9 / speed
            side = config.data.resolution >> (len(stage.widths) - 1)
            return Speed(step, step / 3, 10**5, step / 6, step / 6, side)
        work = sum(w * w / 2**level for level, w in enumerate(config.denoiser.widths))
        return Speed(work / 2e6 / speed, work / 6e6 / speed, int(150 * work))

    return measure


def plan_of(minutes: float, facts: Facts = CIFAR, speed: float = 1.0, *given: str):
    config = parse_config(["--data.dataset", "x", "--minutes", str(minutes), *given])
    return choose(config, facts, minutes * 60 - 15, machine(speed))


@pytest.mark.parametrize("facts", [CIFAR, FLOWERS], ids=["cifar", "flowers"])
@pytest.mark.parametrize("speed", [1, 300], ids=["slow", "fast"])
def test_more_minutes_never_buy_less(facts, speed):
    plans = [plan_of(minutes, facts, speed) for minutes in (5, 10, 20, 40, 60, 120, 600)]
    for minutes, plan in zip((5, 10, 20, 40, 60, 120, 600), plans, strict=True):
        assert sum(plan.parts.values()) == pytest.approx(minutes * 60 - 15)
        assert 0 <= plan.parts["reserve"] < 0.15 * minutes * 60
    sizes = [
        (p.config.data.resolution, sum(p.config.autoencoder.widths), sum(p.config.denoiser.widths))
        for p in plans
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    work = [seen(p.config.denoiser) * sum(p.config.denoiser.widths) ** 2 for p in plans]
    assert work == sorted(work)


def test_what_is_chosen_suits_the_images():
    photographs, drawings = (
        plan_of(60, Facts(20_000, 500, 64, drawn=drawn), 30).config for drawn in (False, True)
    )
    assert photographs.data.horizontal_flip and not drawings.data.horizontal_flip
    assert (photographs.autoencoder.latent_channels, drawings.autoencoder.latent_channels) == (4, 8)
    assert plan_of(60, Facts(20_000, 500, 28, grey=True)).config.data.channels == 1
    assert plan_of(60, Facts(20_000, 500, 40)).config.data.resolution == 32  # never above what they have
    few, many = (plan_of(60, Facts(images, 50, 32), 30) for images in (400, 50_000))
    assert sum(few.config.denoiser.widths) < sum(many.config.denoiser.widths)
    assert few.config.denoiser.dropout and not many.config.denoiser.dropout
    assert any("parameters per image" in reason for reason in few.reasons)
    fast = plan_of(60, CIFAR, 10_000).config
    assert fast.denoiser.widths == UNETS[-1].widths and fast.autoencoder.widths == AUTOENCODERS[32][1].widths
    assert not any(plan_of(5).config.denoiser.attention) and fast.denoiser.attention == [False, True, True]


def test_of_many_images_as_many_are_read_as_can_be_seen():
    many = Facts(1_000_000, 50_000, 300, decoding=3e-3, scanning=1500)
    for minutes, speed in ((10, 1), (60, 1), (20, 30), (60, 300)):
        plan = plan_of(minutes, many, speed)
        number, images_seen = plan.config.data.max_images, seen(plan.config.denoiser)
        assert number < images_seen * 1.3
        assert plan.parts["latents"] < plan.parts["denoiser"]
    assert plan_of(5).config.data.max_images < 50_000 and plan_of(60).config.data.max_images is None
    given = plan_of(60, many.of(20_000), 1, "--data.max_images=20000")
    assert given.config.data.max_images == 20_000 < seen(given.config.denoiser)


def test_a_device_that_waits_for_python_gets_larger_batches():
    busy = machine(1000)

    def idle(config: Config, name: str) -> Speed:  # no step below 30 ms
        speed = busy(config, name)
        return replace(speed, step=max(speed.step, 0.03 / getattr(config, name).batch_size))

    facts, sizes = replace(CIFAR, typical_batch=512), []
    for measure in (busy, idle):
        config = parse_config(["--data.dataset", "x", "--minutes", "10"])
        sizes.append(choose(config, facts, 585, measure).config.denoiser.batch_size)
    assert sizes[0] < sizes[1] == 512


def test_options_that_are_given_stay(tmp_path):
    given = ("--denoiser.widths=[32,96,96]", "--data.resolution=16", "--autoencoder.max_steps=50", "--seed=3")
    config = plan_of(30, CIFAR, 1, *given).config
    assert (config.denoiser.widths, config.data.resolution) == ([32, 96, 96], 16)
    assert (config.autoencoder.max_steps, config.seed, config.denoiser.attention_head_dim) == (50, 3, 32)
    assert len(config.denoiser.attention) == 3 and config.denoiser.max_steps != Config().denoiser.max_steps
    for attention, widths in (([False, True], UNETS[1].widths), ([False, True, True], UNETS[-1].widths)):
        config = plan_of(60, CIFAR, 10_000, f"--denoiser.attention={str(attention).lower()}").config
        assert (config.denoiser.attention, config.denoiser.widths) == (attention, widths)
    with pytest.raises(RunError, match=r"denoiser \d{4}"):  # minutes that the given steps take
        plan_of(30, CIFAR, 1, "--denoiser.max_steps=1000000")


@pytest.mark.parametrize("recipe", UNETS, ids=lambda recipe: str(recipe.widths))
def test_given_widths_of_a_recipe_get_the_rest_of_it(recipe):
    chosen = plan_of(60, CIFAR, 10_000, f"--denoiser.widths={recipe.widths}").config.denoiser
    assert (chosen.layers_per_block, chosen.learning_rate) == (recipe.layers, recipe.learning_rate)
    assert any(chosen.attention) == recipe.attends
    assert chosen.guidance_scale == (2 if recipe.need >= 1_000_000 else 3)


def test_a_complete_file_is_not_sized(tmp_path):
    assert parse_config(["--config", str(TINY)]).minutes is None
    assert parse_config([]).minutes == 60 and parse_config([]).output_dir == "runs/cifar10"
    assert parse_config(["--data.dataset", "some/folder/", "--minutes=5"]).output_dir == "runs/folder"


def start(*options) -> Child:
    return Child("train_ldm.py", "--data.dataset", "digits", *options)


def test_half_a_minute_of_digits_is_kept_and_continued_without_sizing_anew(tmp_path):
    options = ("--minutes", "0.5", "--output_dir", tmp_path / "run", "--denoiser.layers_per_block", "1")
    begun = time.monotonic()
    with start(*options) as child:
        child.wait_until(lambda: (tmp_path / "run" / "autoencoder" / "done.json").exists())
        spent = time.monotonic() - begun
        child.send_signal(9)
        child.wait()
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        stored["minutes"] == 0.5 and stored["data"]["channels"] == 1 and not stored["data"]["horizontal_flip"]
    )
    begun = time.monotonic()
    with start(*options) as child:
        assert child.wait() == 0, child.stderr
    spent += time.monotonic() - begun
    assert "Sized" not in child.stdout and "configuration changed" not in child.stdout
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == stored
    assert spent < 60, spent  # a second start, and whatever else the machine does
    other = start("--minutes", "3", "--output_dir", tmp_path / "run")
    assert (
        other.wait() == 2 and "minutes changed" in other.stderr and "--redo '[autoencoder]'" in other.stderr
    )


def test_a_dry_run_says_what_more_and_less_time_would_buy(tmp_path):
    with start("--minutes", "2", "--dry_run", "--output_dir", tmp_path / "run") as child:
        assert child.wait() == 0, child.stderr
    printed = child.stdout
    assert "Sized for --minutes 2: 1,707 grey images of 8 pixels" in printed
    assert re.search(r"16x16 pixels, AutoencoderDC .* after [\d,]+ images, U-Net .* epochs", printed)
    assert "twice the time: 16x16" in printed and "half the time: 16x16" in printed
    parts = re.search(r"minutes: (sizing .*reserve [\d.]+)", printed)[1]
    assert sum(map(float, re.findall(r"[\d.]+", parts))) == pytest.approx(2, abs=0.3)
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"data.json", "samples", "data.png"}


def test_too_little_time_is_an_error_with_the_least(tmp_path):
    with start("--minutes", "0.1", "--output_dir", tmp_path / "run") as child:
        assert child.wait() == 2
    assert re.search(r"--minutes 0.1: too few .* at least [\d.]+ \(sizing", child.stderr)
    assert not (tmp_path / "run").exists()
