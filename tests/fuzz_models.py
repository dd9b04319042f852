"""Damaged copies of one tiny pipeline folder, and what becomes of each when it is loaded; for `make fuzz`."""

import collections
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ldm_pipeline import LDMPipeline
from ldm_pipeline.loading import load_autoencoder
from tests.test_bad_models import PICKLE, WEIGHTS, change_json, change_weights, set_trap
from tests.test_loading import draw
from tests.test_pipeline import tiny_pipe

CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
WRONG_VALUES = (None, "x", -1, 0, 1.5, float("nan"), True, [], ["x"], [7, 7], {}, {"a": 1}, "../..")
MAY_DIFFER = ("weights in", "wrong values")  # where another finite picture is right too


def damages_of_weights(folder: Path, part: str, chance: random.Random):
    """(kind, damage) of one component's weights; `damage(copy)` writes it."""
    path, names = f"{part}/{WEIGHTS}", list(load_file(folder / part / WEIGHTS))
    size = (folder / path).stat().st_size
    for length in (0, 8, chance.randrange(size), size - 1):
        yield "cut weights", lambda copy, length=length: os.truncate(copy / path, length)
    yield "weights missing", lambda copy: (copy / path).unlink()
    yield "weights of other bytes", lambda copy: (copy / path).write_bytes(b"\xff" * 1000)
    name = chance.choice(names)
    changes = {
        "missing keys": lambda w: w.pop(name),
        "extra keys": lambda w: w.update(more=torch.zeros(2)),
        "keys of another name": lambda w: w.update({f"_orig_mod.{name}": w.pop(name)}),
        "wrong shapes": lambda w: w.update({name: torch.zeros(*w[name].shape, 2)}),
        "weights that are not finite": lambda w: w[name].fill_(torch.nan),
        "all keys missing": dict.clear,
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        changes[f"weights in {dtype}"] = lambda w, dtype=dtype: w.update(
            {k: v.to(dtype) for k, v in w.items()}
        )
    for kind, change in changes.items():
        yield kind, lambda copy, change=change: change_weights(copy / part, change)
    for target in (f"../{part}/{WEIGHTS}", f"/{WEIGHTS}", "..", PICKLE, "none.safetensors", 1):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        yield (
            "an index that leads astray",
            lambda copy, index=index: (copy / f"{path}.index.json").write_text(json.dumps(index)),
        )
    witness = folder.parent / "harm"
    yield "a pickle beside", lambda copy: set_trap(copy / part / PICKLE, witness)
    for bait in (PICKLE, WEIGHTS):
        yield (
            "a pickle alone",
            lambda copy, bait=bait: ((copy / path).unlink(), set_trap(copy / part / bait, witness)),
        )


def damages_of_files(folder: Path, chance: random.Random):
    """(kind, damage) of JSON files, their values and whole folders."""
    for name in CONFIGS:
        for text in ("", "{", "[1]", "null", '"text"', "\x00"):
            yield "malformed JSON", lambda copy, name=name, text=text: (copy / name).write_text(text)
        yield "missing JSON", lambda copy, name=name: (copy / name).unlink()
        for key in sorted(json.loads((folder / name).read_text())):
            value = chance.choice(WRONG_VALUES)
            yield (
                f"wrong values in {name}",
                lambda copy, name=name, key=key, value=value: change_json(copy / name, **{key: value}),
            )
    entries = (["os", "system"], ["diffusers", "AutoencoderTiny"], ["../..", "Evil"], ["diffusers"], None)
    for part in ("unet", "vae", "scheduler"):
        yield "missing folder", lambda copy, part=part: shutil.rmtree(copy / part)
        for entry in entries:
            yield (
                "unknown classes",
                lambda copy, part=part, entry=entry: change_json(copy / "model_index.json", **{part: entry}),
            )


def outcomes(folder: Path, seed: int = 0) -> collections.Counter:
    """How many damaged copies, written under `folder`, load and work, and how many are refused, by kind.

    "works": loads and draws a finite picture, the very one of the sound folder unless numbers were changed
    that may change it. "refused": an error at loading. "fails": an error at drawing. AssertionError where a
    pickle was read or a wrong picture was drawn.
    """
    sound, counts, chance = folder / "sound", collections.Counter(), random.Random(seed)
    tiny_pipe().save_pretrained(sound)
    expected = draw(LDMPipeline.from_pretrained(sound))
    damages = [("nothing", lambda copy: None), *damages_of_files(sound, chance)]
    damages += [d for part in ("unet", "vae") for d in damages_of_weights(sound, part, chance)]
    for number, (kind, damage) in enumerate(damages):
        copy = folder / f"copy{number}"
        shutil.copytree(sound, copy)
        damage(copy)
        counts[kind, _outcome(copy, expected, kind.startswith(MAY_DIFFER))] += 1
        assert not (folder / "harm").exists(), f"a pickle was read: {copy}, {kind}"
        shutil.rmtree(copy)
    return counts


def _outcome(copy: Path, expected: np.ndarray, may_differ: bool) -> str:
    try:
        load_autoencoder(copy / "vae")
    except Exception:  # whatever it is; the same damage is counted by the pipeline below
        pass
    try:
        pipe = LDMPipeline.from_pretrained(copy)
    except Exception as error:
        assert str(error), f"an error without a word: {copy}"
        return "refused"
    try:
        picture = draw(pipe)
    except Exception:
        return "fails"
    assert np.isfinite(picture).all() and (may_differ or np.array_equal(picture, expected)), (
        f"another picture: {copy}"
    )
    return "works"
