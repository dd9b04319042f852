"""Text to image: captions are found, encoded once, exactly masked, dropped, learned from, and published."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from captioned import DIGITS, captioned_digits
from conftest import launch
from datasets import Dataset, load_from_disk
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from ldm_pipeline import LDMPipeline
from ldm_pipeline.loading import load_text_encoder
from ldm_pipeline.models import build_unet
from ldm_pipeline.pipeline import Condition, denoise, encode_tokens, to_pixels, tokenize
from tests.test_loading import HOSTED
from tests.test_pipeline import FLOW, generators, tiny_vae
from tests.test_task_training import untrained_autoencoder
from training.config import DenoiserConfig, parse_config
from training.data.captions import CaptionDataset, encode_captions, unique_captions
from training.data.conditions import drop
from training.data.images import load_images

TEXT_CLASSES = "T5EncoderModel CLIPTextModel SiglipTextModel BertModel ModernBertModel".split()
WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "the", "digit", "a", *DIGITS, *"0123456789"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
ENCODERS = {
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "CLIP": lambda: CLIPModel(CLIPConfig(text_config=SIZES | ENDS, vision_config=VISION)),
    "SigLIP": lambda: SiglipModel(SiglipConfig(text_config=SIZES | ENDS, vision_config=VISION)),
    "BERT": lambda: BertModel(BertConfig(**SIZES), add_pooling_layer=False),
    "ModernBERT": lambda: ModernBertModel(
        ModernBertConfig(**SIZES, **ENDS, cls_token_id=1, sep_token_id=2, attn_implementation="sdpa")
    ),
}


def save_encoder(folder, kind="T5", limit=12):
    """A folder of transformers with a random text encoder of a real class, and a tokenizer of words."""
    torch.manual_seed(0)
    ENCODERS[kind]().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[BOS]", 1), ("[EOS]", 2)]
    words.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=limit, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return captioned_digits(tmp_path_factory.mktemp("captioned") / "data")


def tiny_text_pipe(encoder, classes=None):
    tokenizer, text_encoder = load_text_encoder(encoder)
    torch.manual_seed(1)
    unet = build_unet(8, 4, [8, 16], 1, [False, True], 8, 4, num_classes=classes, text_width=16).eval()
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, **FLOW)
    parts = {"text_encoder": text_encoder, "tokenizer": tokenizer}
    pipe = LDMPipeline(tiny_vae(), unet, scheduler, objective=FLOW, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *prompt, **options):
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": generators(0)} | options
    return pipe(*prompt, **options).images


# ----------------------------------------------------------------------------------- encoding and the network
@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_changes_nothing_from_the_text_to_the_prediction(kind, tmp_path):
    tokenizer, text_encoder = load_text_encoder(save_encoder(tmp_path, kind))
    assert (
        "Text" in type(text_encoder).__name__
        or "Encoder" in type(text_encoder).__name__
        or kind[-4:] == "BERT"
    )
    alone = tokenize(tokenizer, text_encoder, ["a 3"])
    beside = tokenize(tokenizer, text_encoder, ["a 3", "the digit seven the digit seven"])
    hidden, padded = encode_tokens(text_encoder, *alone), encode_tokens(text_encoder, *beside)
    count = int(alone[1].sum())
    torch.testing.assert_close(padded[:1, :count], hidden[:, :count], rtol=1e-5, atol=1e-5)
    unet = build_unet(8, 4, [8, 16], 1, [False, True], 8, 4, text_width=16).eval()
    noisy, time = torch.randn(1, 4, 8, 8), torch.tensor(500.0)
    short, long = (Condition(None, h[:1], m[:1]) for h, m in ((hidden, alone[1]), (padded, beside[1])))
    with torch.no_grad():
        assert (denoise(unet, noisy, time, short) - denoise(unet, noisy, time, long)).abs().max() < 1e-5


def test_an_empty_text_keeps_a_token(encoder, tmp_path):
    tokenizer, text_encoder = load_text_encoder(encoder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    for texts in ([""], ["", "a 3"]):
        assert tokenize(tokenizer, text_encoder, texts)[1].any(1).all()


def test_cached_captions_are_the_live_ones(encoder, captioned, tmp_path):
    tokenizer, text_encoder = load_text_encoder(encoder)
    data = load_images(parse_config(["--data.dataset", str(captioned), "--data.channels", "1"]).data, True)
    unique = unique_captions(data)
    assert unique[0] == "" and len(unique) == len(set(unique)) == 21
    shard = encode_captions(unique, tokenizer, text_encoder, batch_size=4, ids_only=False)
    assert shard["tokens"].dtype == torch.bfloat16 and len(shard["tokens"]) == shard["lengths"].sum()
    save_file(shard, tmp_path / "captions.safetensors")
    for resident in ("device", "disk"):
        cached = CaptionDataset(
            [tmp_path / "captions.safetensors"], unique, data.train.captions, torch.device("cpu"), resident
        )
        indices = torch.arange(0, 200, 9)
        first, second = (cached.draw(indices, torch.full((len(indices),), u)) for u in (0.0, 0.99))
        for numbers, place in ((first, 0), (second, 1)):
            texts = [data.train.captions[i][place] for i in indices.tolist()]
            assert [unique[n] for n in numbers] == texts
            hidden, mask = cached.batch(numbers, cached.longest(numbers))
            ids, live_mask = tokenize(tokenizer, text_encoder, texts)
            live = encode_tokens(text_encoder, ids, live_mask)
            length = live.shape[1]
            assert torch.equal(mask[:, :length], live_mask) and not mask[:, length:].any()
            kept = live_mask[..., None]
            torch.testing.assert_close(hidden[:, :length].float() * kept, live * kept, rtol=1e-2, atol=1e-2)


def test_shares_of_dropped_conditions():
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    text, labels = torch.ones(count, 1, 1), torch.zeros(count, dtype=torch.int64)
    condition = Condition(labels, text, torch.ones(count, 1, dtype=torch.bool))
    null = Condition(labels + 10, text * 0, condition.encoder_attention_mask)
    dropped = drop(condition, null, uniform, DenoiserConfig(label_dropout=0.1, text_dropout=0.2))
    no_class, no_text = dropped.class_labels == 10, dropped.encoder_hidden_states[:, 0, 0] == 0
    for found, wanted in ((no_class, 0.1), (no_text, 0.2), (no_class & no_text, 0.05)):
        share = found.double().mean().item()
        assert abs(share - wanted) < 3 * (wanted * (1 - wanted) / count) ** 0.5


# ----------------------------------------------------------------------------------------------- the pipeline
def test_prompts(encoder):
    pipe = tiny_text_pipe(encoder)
    three, seven = (draw(pipe, text) for text in ("a 3", "the digit seven"))
    assert not torch.allclose(three, seven, atol=1e-4)
    both = draw(pipe, ["a 3", "the digit seven"], generator=generators(0, 0))
    torch.testing.assert_close(both, torch.cat([three, seven]), rtol=1e-4, atol=1e-5)
    embeds, mask = pipe.encode_prompt(["a 3"])
    torch.testing.assert_close(draw(pipe, prompt_embeds=embeds, prompt_attention_mask=mask), three)
    torch.testing.assert_close(draw(pipe), draw(pipe, ""))  # nothing said is the empty text
    torch.testing.assert_close(draw(pipe, "a 3", guidance_scale=0.0), draw(pipe, ""), rtol=1e-4, atol=1e-5)
    away = draw(pipe, "a 3", negative_prompt="the digit seven", guidance_scale=3.0)
    assert not torch.allclose(away, draw(pipe, "a 3", guidance_scale=3.0), atol=1e-4)
    several = draw(pipe, ["a 3", "a 7"], num_images_per_prompt=2, generator=generators(1, 0, 1, 0))
    assert several.shape[0] == 4
    torch.testing.assert_close(several[1:2], three, rtol=1e-4, atol=1e-5)


def test_text_and_classes_together(encoder):
    pipe = tiny_text_pipe(encoder, classes=3)
    pictures = [draw(pipe, *text, **label) for text in ((), ("a 3",)) for label in ({}, {"class_labels": 1})]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert all(not torch.allclose(pictures[a], pictures[b], atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": [3]}, "prompt has 3; wanted a text"),
        ({"prompt": ["a 3", "a 7"], "batch_size": 3}, "one positive number of images"),
        ({"prompt_embeds": torch.zeros(1, 2, 16)}, r"wanted \(N, L, 16\) and \(N, L\)"),
        ({"guidance_scale": 2.0}, "needs a prompt to guide to"),
    ],
)
def test_what_cannot_be_meant_is_refused(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_text_pipe(encoder)(**options)


def test_a_model_without_text_refuses_a_prompt():
    from tests.test_pipeline import tiny_pipe

    with pytest.raises(ValueError, match="prompt is given, but this model was trained without text"):
        tiny_pipe()("a 3")


def test_saved_and_loaded_with_the_package_and_without(encoder, tmp_path):
    pipe = tiny_text_pipe(encoder)
    pipe.save_pretrained(tmp_path / "model")
    expected = draw(pipe, "a 3", guidance_scale=2.0)
    torch.testing.assert_close(
        draw(LDMPipeline.from_pretrained(tmp_path / "model"), "a 3", guidance_scale=2.0), expected
    )
    script = HOSTED + (
        "options = dict(guidance_scale=2.0, num_inference_steps=3, output_type='np')\n"
        "seed = [torch.Generator().manual_seed(0)]\n"
        "numpy.save('hosted.npy', pipe('a 3', generator=seed, **options).images)"
    )
    command = [sys.executable, "-I", "-c", f"folder = {str(tmp_path / 'model')!r}\n{script}"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    hosted = torch.from_numpy(np.load(tmp_path / "hosted.npy")).permute(0, 3, 1, 2)
    torch.testing.assert_close(hosted, expected, rtol=1e-4, atol=1e-5)


def test_missing_weights_of_the_text_encoder_are_an_error(encoder, tmp_path):
    tiny_text_pipe(encoder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "text_encoder" / "model.safetensors")
    weights.pop(next(key for key in weights if "block.1" in key))
    save_file(weights, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing_keys"):
        LDMPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 weights of T5EncoderModel are missing"):
        (tmp_path / "tokenizer" / "config.json").write_text("{}")
        for path in (tmp_path / "tokenizer").glob("tokenizer*"):
            path.rename(tmp_path / "text_encoder" / path.name)
        load_text_encoder(tmp_path / "text_encoder")


# ---------------------------------------------------------------------------------------------- the whole run
def run(captioned, folder, *options, **more):
    options = ("--data.dataset", captioned, "--output_dir", folder, "--evaluation.num_samples", 0, *options)
    return launch("train_ldm.py", *options, **more)


def test_the_whole_job_with_an_encoder_that_is_not_trained(captioned, encoder, tmp_path):
    finished = run(captioned, tmp_path / "run", "--denoiser.text_encoder", encoder)
    assert "captions: 20 different ones" in finished.stdout
    pipe = LDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    stored = load_text_encoder(encoder)[1].state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in pipe.text_encoder.state_dict().items())
    shard = tmp_path / "run" / "latents" / "captions-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    again = run(captioned, tmp_path / "run", "--denoiser.text_encoder", encoder)
    assert "captions: 20 different ones" in again.stdout and shard.read_bytes() == whole
    assert all(f"{stage}: " in again.stdout for stage in ("autoencoder", "denoiser", "evaluation"))
    prompts = json.loads((tmp_path / "run" / "metrics.json").read_text())["prompts"]
    assert set(prompts) <= {f"the digit {name}" for name in DIGITS}


def test_a_model_of_images_and_texts_judges_samples(captioned, encoder, tmp_path):
    save_encoder(tmp_path / "clip", "CLIP")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 16}}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    options = ("--denoiser.text_encoder", encoder, "--evaluation.clip")
    finished = run(captioned, tmp_path / "run", *options, encoder, "--evaluation.num_samples=16", check=False)
    assert finished.returncode == 2 and f"--evaluation.clip {encoder} " in finished.stderr, finished.stderr
    run(captioned, tmp_path / "run", *options, tmp_path / "clip", "--evaluation.num_samples", 16)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert -100 <= metrics["samples"]["figures"]["CLIP score-16"] <= 100


def test_words_are_learned_and_tell_the_right_caption_from_a_wrong_one(tmp_path):
    """Of pictures that are all dark or all bright: in much noise only the caption tells which."""
    brightness = {"dark": 25, "bright": 230}
    right = 60 * [*brightness]
    pictures = [Image.new("L", (16, 16), brightness[word]) for word in right]
    data = Dataset.from_dict({"image": pictures, "text": [f"a {word} picture" for word in right]})
    data.save_to_disk(tmp_path / "data")
    untrained_autoencoder().save_pretrained(tmp_path / "vae")
    options = ["--denoiser.text_encoder=words", f"--autoencoder.pretrained={tmp_path / 'vae'}"]
    options += ["--denoiser.max_steps=80", "--denoiser.learning_rate=2e-3", "--denoiser.logit_mean=3"]
    options += [f"--denoiser.{name}_every=100" for name in ("validate", "sample", "checkpoint")]
    run(tmp_path / "data", tmp_path / "run", *options, "--denoiser.dropout=0")
    pipe = LDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    clean = pipe.encode(torch.stack([to_pixels(picture)[0] for picture in pictures]))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy, timesteps, errors = 0.1 * clean + 0.9 * noise, torch.tensor(900.0), []
    for words in (right, right[::-1]):
        text = pipe.encode_prompt([f"a {word} picture" for word in words])
        with torch.no_grad():
            prediction = denoise(pipe.unet, noisy, timesteps, Condition(None, *text))
        errors.append((prediction - (noise - clean)).square().mean().item())
    assert errors[0] < 0.5 * errors[1], errors


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda rows: rows.remove_columns("text"), (), "no column is named text, caption"),
        (
            lambda rows: rows.map(
                lambda row, i: {"text": row["text"] if i != 7 else [" "]}, with_indices=True
            ),
            (),
            "1 of 300 images of 'train' have no caption in column 'text'; the first is row 7",
        ),
        (
            lambda rows: rows.map(lambda row: {"text": ["the digit " * 9]}),
            (),
            "have more than 12 tokens, the longest has 20",
        ),
        (lambda rows: rows, ("--denoiser.text_max_length", 99), "takes texts of 12 tokens, fewer than 99"),
        (lambda rows: rows, ("--data.caption_column", "image"), "'image' is no column of captions"),
    ],
)
def test_bad_captions_are_refused_before_the_first_step(
    captioned, encoder, tmp_path, change, options, message
):
    change(load_from_disk(captioned)).save_to_disk(tmp_path / "data")
    options = ("--denoiser.text_encoder", encoder, *options)
    finished = run(tmp_path / "data", tmp_path / "run", *options, check=False)
    assert finished.returncode == 2 and message in finished.stderr, finished.stderr
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_an_encoder_of_another_kind_is_refused(captioned, tmp_path):
    ViTModel(ViTConfig(**VISION)).save_pretrained(tmp_path / "vit")
    finished = run(captioned, tmp_path / "run", "--denoiser.text_encoder", tmp_path / "vit", check=False)
    assert finished.returncode == 2 and "no text encoder of transformers" in finished.stderr, finished.stderr


def test_an_encoder_with_code_of_its_own_is_refused_without_running_it(encoder, tmp_path):
    for path in encoder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="no text encoder of transformers"):
        load_text_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_captions_in_files_beside_the_images(tmp_path):
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / f"{number:02d}.png")
        (tmp_path / f"{number:02d}.txt").write_text(f"red of {number}\n")
    data = load_images(parse_config(["--data.dataset", str(tmp_path), "--data.held_out", "0.2"]).data, True)
    assert data.train.captions[0] == ("red of 0",) and len(unique_captions(data)) == 13
