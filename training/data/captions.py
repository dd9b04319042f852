"""Captions of images: encoded once each, cached on disk, drawn for training."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipeline.pipeline import encode_tokens, tokenize
from training.config import DenoiserConfig, RunError
from training.data.images import ImageData
from training.data.latents import in_device_memory

WORDS_WIDTH = 256
WORDS_MAX_LENGTH = 77
SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
SHARD_SIZE = 8192  # captions in one file


def unique_captions(data: ImageData) -> list[str]:
    """The empty caption, then every other one of the data once, sorted."""
    every = {text for split in (data.train, data.held_out) for texts in split.captions for text in texts}
    return ["", *sorted(every - {""})]


def describe_captions(data: ImageData) -> str:
    """The line a person reads before a run."""
    numbers = [len(texts) for split in (data.train, data.held_out) for texts in split.captions]
    several = f", {sum(numbers) / len(numbers):.3g} per image" if max(numbers) > 1 else ""
    example = data.train.captions[0][0]
    return f"Captions: {len(unique_captions(data)) - 1:,} different ones{several}, such as {example!r}"


def captions_sha256(captions: list[str]) -> str:
    """Hexadecimal SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()


def caption_shards(folder: Path, unique: list[str]) -> list[Path]:
    """The files of the encoded captions."""
    return [folder / f"captions-{i:05d}.safetensors" for i in range(-(-len(unique) // SHARD_SIZE))]


def missing_shards(folder: Path, unique: list[str]) -> list[int]:
    """Numbers of the files of encoded captions that are not there or are damaged; reads headers only."""

    def stands(number: int, path: Path) -> bool:
        try:
            with safe_open(path, "pt") as shard:
                count = len(unique[number * SHARD_SIZE :][:SHARD_SIZE])
                return shard.get_slice("lengths").get_shape() == [count]
        except (OSError, SafetensorError):
            return False

    shards = enumerate(caption_shards(folder, unique))
    return [number for number, path in shards if not stands(number, path)]


def words_encoder(config: DenoiserConfig, data: ImageData, seed: int) -> tuple:
    """A tokenizer of the training captions' words, and an untrained text encoder; equal seeds, equal weights.

    The encoder is the text part of CLIP (arXiv:2103.00020) in small. It is trained with the denoiser, as that
    of the first latent diffusion models was (arXiv:2112.10752).
    """
    # Imported here, because only such an encoder needs them.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    captions = [text for texts in data.train.captions for text in texts]
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    split = (words.pre_tokenizer.pre_tokenize_str(words.normalizer.normalize_str(text)) for text in captions)
    known = sorted({word for pieces in split for word, _ in pieces} - set(SPECIAL))
    words.model = models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *known])}, "[UNK]")
    ends = [("[BOS]", 1), ("[EOS]", 2)]
    words.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    length = config.text_max_length or WORDS_MAX_LENGTH
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **names)
    torch.manual_seed(seed)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WORDS_WIDTH,
            intermediate_size=4 * WORDS_WIDTH,
            projection_dim=WORDS_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=length,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    return tokenizer, encoder


def check_lengths(captions: Iterable[str], tokenizer, cut: bool) -> None:
    """RunError where a caption has more tokens than the tokenizer's `model_max_length`, unless `cut`."""
    captions, most = list(captions), tokenizer.model_max_length
    numbers = [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
    if (longest := max(numbers)) > most and not cut:
        raise RunError(
            f"{sum(number > most for number in numbers):,} of {len(captions):,} captions have more than "
            f"{most} tokens, the longest has {longest} ({captions[numbers.index(longest)][:60]!r}...): "
            "raise --denoiser.text_max_length, if the encoder takes more, or set --denoiser.cut_captions"
        )


@torch.no_grad()
def encode_captions(captions: list[str], tokenizer, text_encoder, batch_size: int, ids_only: bool) -> dict:
    """The tensors of one shard.

    Returns:
        "lengths" int64 (n,), and of all real tokens, one caption after the other, "tokens": int64 (sum,) if
        `ids_only`, else their last hidden states, bfloat16 (sum, D).
    """
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))  # alike in length: little padding
    tokens: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = tokenize(tokenizer, text_encoder, [captions[i] for i in chosen])
        values = ids
        if not ids_only:
            device = text_encoder.device
            values = encode_tokens(text_encoder, ids.to(device), mask.to(device)).bfloat16().cpu()
        tokens |= {i: row[kept] for i, row, kept in zip(chosen, values, mask, strict=True)}
    every = [tokens[i] for i in range(len(captions))]
    return {"lengths": torch.tensor([len(each) for each in every]), "tokens": torch.cat(every)}


def padded_length(longest: int) -> int:
    """Tokens to which a batch is padded: a multiple of 8, so that few shapes occur."""
    return -(-longest // 8) * 8


class CaptionDataset:
    """The cached captions of the images of one split.

    Args:
        shards: files that `encode_captions` describes, in the order of `unique`.
        unique: the captions in them; number 0 is the empty one.
        captions: the texts of every image.
        device: of the batches.
        resident: see `LatentDataset`.
    """

    def __init__(
        self,
        shards: list[Path],
        unique: list[str],
        captions: list[tuple[str, ...]],
        device: torch.device,
        resident: str,
    ):
        number = {text: i for i, text in enumerate(unique)}
        self.device = device
        self.numbers = torch.tensor([number[text] for texts in captions for text in texts])
        self.counts = torch.tensor([len(texts) for texts in captions])
        self.first = self.counts.cumsum(0) - self.counts
        files = [load_file(path) for path in shards]
        self.lengths = torch.cat([file["lengths"] for file in files])
        self.tokens = [file["tokens"] for file in files]
        self.offsets = torch.cat([file["lengths"].cumsum(0) - file["lengths"] for file in files])
        self.resident = in_device_memory(sum(tokens.nbytes for tokens in self.tokens), device, resident)
        if self.resident:
            self.tokens = [torch.cat(self.tokens).to(device)]
            self.offsets = self.lengths.cumsum(0) - self.lengths

    def draw(self, indices: Tensor, uniform: Tensor) -> Tensor:
        """The number of one caption of each of the images (N,), by uniform numbers (N,) in [0, 1)."""
        chosen = (uniform.cpu() * self.counts[indices]).long()
        return self.numbers[self.first[indices] + chosen]

    def longest(self, numbers: Tensor) -> int:
        """Tokens to which a batch of these captions is padded."""
        numbers = torch.cat([numbers, torch.zeros(1, dtype=torch.int64)])
        return padded_length(int(self.lengths[numbers].max()))

    def batch(self, numbers: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Tokens (N, length) or (N, length, D) and their mask (N, length) bool of captions by number (N,)."""
        lengths, first = self.lengths[numbers], self.offsets[numbers]
        mask = torch.arange(length) < lengths[:, None]
        if self.resident:
            places = torch.where(mask, first[:, None] + torch.arange(length), 0).to(self.device)
            every, mask = self.tokens[0], mask.to(self.device)
            kept = mask.view(*mask.shape, *[1] * (every.ndim - 1))
            return torch.where(kept, every[places], every.new_zeros(())), mask
        tokens = self.tokens[0].new_zeros(*mask.shape, *self.tokens[0].shape[1:])
        rows = zip(numbers.tolist(), first.tolist(), lengths.tolist(), strict=True)
        for row, (number, start, count) in enumerate(rows):
            tokens[row, :count] = self.tokens[number // SHARD_SIZE][start : start + count]
        return tokens.to(self.device), mask.to(self.device)


def cached_captions(
    data: ImageData, split: str, folder: Path, device: torch.device, resident: str
) -> CaptionDataset:
    """The encoded captions of a split, from the latents folder of a run. RunError if they are not there."""
    unique = unique_captions(data)
    if missing_shards(folder, unique):
        raise RunError(f"{folder} lacks encoded captions: run training/encode_latents.py first")
    captions = getattr(data, split).captions
    return CaptionDataset(caption_shards(folder, unique), unique, captions, device, resident)
