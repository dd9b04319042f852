"""Damaged copies of one tiny pipeline folder, and what becomes of each when it is loaded."""

import collections
import json
import math
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ldm_pipeline import LDMPipeline
from ldm_pipeline.loading import load_autoencoder
from tests.test_pipeline import generators, tiny_pipe

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
# What must be named for a person to find the fault; the rest of a message is free.
CLEAR = (ValueError, OSError)
UNCLEAR = (json.JSONDecodeError, UnicodeDecodeError)
WRONG_VALUES = (None, "x", -1, 0, 1.5, math.nan, math.inf, True, [], ["x"], [7, 7], {}, {"a": 1}, "../..")


class Trap:
    """What a pickle can do when it is read: here, leave a file."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def set_trap(path: Path, witness: Path) -> None:
    """A pickle at `path` which creates `witness` if anybody reads it."""
    path.write_bytes(pickle.dumps({"conv_in.weight": Trap(witness)}))


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_weights(folder: Path, change) -> None:
    """Save the weights of a component as `change` leaves them."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path, rename=lambda name: name, **index) -> None:
    """Split the weights of a component in two files with an index, whose names `rename` may falsify."""
    weights, names = load_file(folder / WEIGHTS), {}
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        part = {key: weight for i, (key, weight) in enumerate(weights.items()) if i % 2 == number - 1}
        save_file(part, folder / name, {"format": "pt"})
        names |= dict.fromkeys(part, rename(name))
    (folder / WEIGHTS).unlink()
    content = {"metadata": {"total_size": 1}, "weight_map": names} | index
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


def build(folder: Path) -> Path:
    """A sound pipeline folder, of the real classes."""
    tiny_pipe().save_pretrained(folder)
    return folder


def _set(name: str, value):
    """A change of all of one weight's numbers."""

    def change(weights):
        weights[name].fill_(value)

    return change


def _damage_weights(folder: Path, part: str):
    """(kind, damage) of one component's weights; `damage(copy)` writes it."""
    weights = load_file(folder / part / WEIGHTS)
    names = list(weights)
    first, last = names[0], names[-1]

    def write(damage):
        return lambda copy: damage(copy / part / WEIGHTS)

    def alter(change):
        return lambda copy: change_weights(copy / part, change)

    size = (folder / part / WEIGHTS).stat().st_size
    for length in (0, 7, 8, 100, size // 2, size - 1):
        yield "truncated weights", write(lambda path, length=length: os.truncate(path, length))
    yield "weights of other bytes", write(lambda path: path.write_bytes(b"\xff" * 1000))
    yield "weights of other bytes", write(lambda path: path.write_bytes(path.read_bytes() + b"more"))
    yield "weights missing", write(Path.unlink)
    yield "weights are a folder", write(lambda path: (path.unlink(), path.mkdir()))
    for name in (first, last, names[len(names) // 2]):
        yield "missing keys", alter(lambda w, name=name: w.pop(name))
        yield "extra keys", alter(lambda w, name=name: w.update({f"{name}.more": w[name].clone()}))
        yield "keys of another name", alter(lambda w, name=name: w.update({f"_orig_mod.{name}": w.pop(name)}))
        yield "wrong shapes", alter(lambda w, name=name: w.update({name: torch.zeros(*w[name].shape, 2)}))
        yield "wrong shapes", alter(lambda w, name=name: w.update({name: w[name].flatten()[:1].clone()}))
        yield "integer weights", alter(lambda w, name=name: w.update({name: w[name].to(torch.int64)}))
        for value in (math.nan, math.inf, -math.inf):
            yield "weights that are not finite", alter(_set(name, value))
    yield "all keys missing", alter(dict.clear)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        yield (
            f"weights in {dtype}",
            alter(lambda w, dtype=dtype: w.update({k: v.to(dtype) for k, v in w.items()})),
        )
    for change in (
        {},
        {"metadata": ...},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {first: 1}},
        {"weight_map": {first: "none.safetensors"}},
    ):
        kept = {key: value for key, value in change.items() if value is not ...}
        yield (
            f"shards{', damaged index' if change else ''}",
            lambda copy, kept=kept, change=change: (
                shard(copy / part, **kept),
                change_json(copy / part / f"{WEIGHTS}.index.json", **change),
            ),
        )
    renamed = (
        lambda name: f"../{part}/{name}",
        lambda name: f"/{name}",
        lambda name: "..",
        lambda name: PICKLE,
        lambda name: name.replace("1-of", "2-of"),
    )
    for rename in renamed:
        yield "shards, names that lead astray", lambda copy, rename=rename: shard(copy / part, rename)


def _damage_files(folder: Path):
    """(kind, damage) of whole files and folders."""
    for name in CONFIGS:
        for text in ("", "{", "[]", "[1]", "null", "3", '"text"', "[" * 100_000, "\x00", '{"a": 1}', "{}"):
            yield "malformed JSON", lambda copy, name=name, text=text: (copy / name).write_text(text)
        yield "malformed JSON", lambda copy, name=name: (copy / name).write_bytes(b"\xff\xfe{}")
        yield "missing JSON", lambda copy, name=name: (copy / name).unlink()
        yield "a link to nothing", lambda copy, name=name: _link(copy / name, copy / "nothing")
        yield "a link to a device", lambda copy, name=name: _link(copy / name, Path("/dev/zero"))
    for name in ("unet", "vae", "scheduler"):
        yield "missing component folder", lambda copy, name=name: shutil.rmtree(copy / name)
        yield "an unknown file beside", lambda copy, name=name: (copy / name / "LICENSE").write_text("free")
    for name, other in (("unet", "vae"), ("vae", "unet"), ("scheduler", "unet")):
        yield (
            "another component's folder",
            lambda copy, name=name, other=other: (
                shutil.rmtree(copy / name),
                shutil.copytree(copy / other, copy / name),
            ),
        )
    witness = folder.parent / "harm"
    for name in ("unet", "vae"):
        yield "a pickle beside", lambda copy, name=name: set_trap(copy / name / PICKLE, witness)
        for also in (PICKLE, WEIGHTS):
            yield (
                "a pickle alone",
                lambda copy, name=name, also=also: (
                    (copy / name / WEIGHTS).unlink(),
                    set_trap(copy / name / also, witness),
                ),
            )
        yield (
            "a link that leaves the folder",
            lambda copy, name=name: _link(copy / name / WEIGHTS, folder / name / WEIGHTS),
        )
        yield "a link to other weights", lambda copy, name=name: _link(copy / name / WEIGHTS, Path(__file__))


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _damage_index(folder: Path):
    """(kind, damage) of what `model_index.json` says."""

    def index(**changes):
        return lambda copy: change_json(copy / "model_index.json", **changes)

    for name in ("unet", "vae", "scheduler"):
        for value in (
            ...,
            None,
            [],
            ["diffusers"],
            [None, None],
            "x",
            ["diffusers", 3],
            {"a": "b"},
            [[], []],
        ):
            yield "malformed component entry", index(**{name: value})
        for value in (
            ["diffusers", "NoSuchClass"],
            ["diffusers", "AutoencoderTiny"],
            ["diffusers", "__name__"],
            ["diffusers", "StableDiffusionPipeline"],
            ["os", "system"],
            ["no_such_library", "Evil"],
            ["transformers", "CLIPTextModel"],
            ["../..", "Evil"],
        ):
            yield "unknown classes", index(**{name: value})
    for key in ("../x", "/etc", "x/../../y", "..", "tokenizer", ""):
        yield "path tricks and unknown components", index(**{key: ["diffusers", "UNet2DModel"]})
    for value in (
        ...,
        None,
        [],
        3,
        "StableDiffusionPipeline",
        ["pipeline"],
        [["a"]],
        {"a": 1},
        "DiffusionPipeline",
    ):
        yield "malformed _class_name", index(_class_name=value)
    vp = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    epsilon = {"prediction_type": "epsilon"} | vp
    for value in (
        ...,
        None,
        [],
        "epsilon",
        {},
        {"prediction_type": "x"},
        {"prediction_type": ["epsilon"]},
        3,
    ):
        yield "malformed objective", index(objective=value)
    for key, values in {
        "num_train_timesteps": (0, -5, "x", 10**15, 1.5, [1], None),
        "beta_start": ("x", math.nan, -0.1, 2, [1]),
        "beta_schedule": ("x", 3, None),
        "trained_betas": (["x"], 3, [0.5, math.nan]),
        "zeta": (1,),
    }.items():
        for value in values:
            yield "malformed objective", index(objective=epsilon | {key: value})
    for value in (
        ["cat"],
        [],
        "cat",
        3,
        {"cat": 0},
        {"0": "cat", "3": "fox"},
        {"-1": "cat"},
        {"0": 1},
        {"0": None},
        {"0.0": "cat"},
        {" 0": "cat"},
        {"01": "cat"},
        {"²": "cat"},
        {str(i): f"class {i}" for i in range(50)},
        {"0": ["cat"]},
    ):
        yield "malformed id2label", index(id2label=value)
    for value in ({}, None, ..., {"0": "cat"}, {"0": "cat", "2": "cat"}):
        yield "few names", index(id2label=value)


def _damage_configs(folder: Path):
    """(kind, damage) of the components' configs."""
    lists = (..., None, [], "x", 3, {"a": 1}, [1.0] * 3, [1.0] * 5, ["x"] * 4, [None] * 4, [[1.0]] * 4)
    numbers = [[1.0, 1.0, value, 1.0] for value in (math.nan, math.inf, 1e300, 10**400)]
    for value in (*lists, *numbers):
        for key in ("latents_mean", "latents_std"):
            yield (
                "malformed statistics",
                lambda copy, key=key, value=value: change_json(copy / "vae/config.json", **{key: value}),
            )
    for value in (0, -1.0, 1e-60):
        yield (
            "deviations not above 0",
            lambda copy, value=value: change_json(
                copy / "vae/config.json", latents_std=[1.0, value, 1.0, 1.0]
            ),
        )
    chance = random.Random(0)
    for name in CONFIGS[1:]:
        part = name.split("/")[0]
        for key in sorted(json.loads((folder / name).read_text())):
            for value in chance.sample(WRONG_VALUES, 4 if part == "scheduler" else 3):
                yield (
                    f"wrong values in the config of the {part}",
                    lambda copy, name=name, key=key, value=value: change_json(copy / name, **{key: value}),
                )
    for part in ("unet", "vae"):
        yield (
            "quantized",
            lambda copy, part=part: change_json(
                copy / part / "config.json", quantization_config={"quant_method": "torchao"}
            ),
        )
        yield (
            "another _class_name",
            lambda copy, part=part: change_json(copy / part / "config.json", _class_name="AutoencoderTiny"),
        )
    yield (
        "another _class_name",
        lambda copy: change_json(copy / CONFIGS[3], _class_name="EulerDiscreteScheduler"),
    )


def damages(folder: Path, per_kind: int) -> list:
    """(kind, damage), the same ones every time, at most `per_kind` of each kind."""
    every = [("nothing", lambda copy: None)]
    for part in ("unet", "vae"):
        every += _damage_weights(folder, part)
    every += [*_damage_files(folder), *_damage_index(folder), *_damage_configs(folder)]
    by_kind, chance = collections.defaultdict(list), random.Random(0)
    for kind, damage in every:
        by_kind[kind].append((kind, damage))
    return [one for same in by_kind.values() for one in chance.sample(same, min(per_kind, len(same)))]


def draw(pipe) -> np.ndarray:
    """One guided picture."""
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "np"}
    return pipe(class_labels=1, generator=generators(5), **options).images


def _outcome(attempt, subject) -> tuple[str, object]:
    try:
        return "works", attempt()
    except CLEAR as error:
        text = str(error)
        if isinstance(error, UNCLEAR) or not any(name in text for name in subject):
            raise AssertionError(f"no clear error: {type(error).__name__}: {text}") from error
        return "refused", text
    except Exception as error:
        raise AssertionError(f"no clear error: {type(error).__name__}: {error}") from error


def outcomes(folder: Path, per_kind: int = 3) -> collections.Counter:
    """How many damaged copies, written under `folder`, load and work, and how many are refused, by kind.

    "works": loads and draws a finite picture, the very one of the sound folder unless numbers were changed
    that may change it. "refused": a ValueError or OSError, which names the folder, at loading, or which names
    what is wrong, at drawing. AssertionError, with the damage, for anything else.
    """
    sound, counts = build(folder / "sound"), collections.Counter()
    expected = draw(LDMPipeline.from_pretrained(sound))
    for number, (kind, damage) in enumerate(damages(sound, per_kind)):
        copy = folder / f"copy{number}"
        shutil.copytree(sound, copy)
        damage(copy)
        try:
            counts.update((kind, outcome) for outcome in _try(copy, kind, expected))
            assert not (folder / "harm").exists(), "a pickle was read"
        except AssertionError as error:
            changed = [
                f"{name}: {text[:300]}"
                for name in CONFIGS
                if (copy / name).is_file()
                and (text := (copy / name).read_text(errors="replace")) != (sound / name).read_text()
            ]
            raise AssertionError(f"copy {number}, {kind}, {changed}: {error}") from error
        shutil.rmtree(copy)
    return counts


def _try(copy: Path, kind: str, expected: np.ndarray):
    """The outcomes of one copy: of the pipeline, of its picture, of its autoencoder alone."""
    loaded, pipe = _outcome(lambda: LDMPipeline.from_pretrained(copy), [str(copy)])
    yield loaded
    if loaded == "works":
        drawn, picture = _outcome(lambda: draw(pipe), ("Scheduler", "wanted"))
        yield f"drawing {drawn}"
        if drawn == "works":
            assert np.isfinite(picture).all(), "no finite picture"
            may_differ = kind.startswith(("weights in", "wrong values", "malformed objective"))
            assert may_differ or np.array_equal(picture, expected), "another picture"
    alone, autoencoder = _outcome(lambda: load_autoencoder(copy / "vae"), [str(copy)])
    yield f"autoencoder {alone}"
    if alone == "works":
        assert all(value.isfinite().all() for value in autoencoder.state_dict().values())
