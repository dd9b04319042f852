"""Conditions of images in the latent cache, dropped for classifier-free guidance."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldm_pipeline.pipeline import Condition, encode_tokens, num_classes
from training.config import DenoiserConfig
from training.data.captions import CaptionDataset
from training.data.latents import LatentDataset
from training.data.tasks import ImageConditions


@dataclass(frozen=True)
class Conditions:
    """The conditions of the images of one split.

    Args:
        latents: has the classes.
        denoiser: decides which conditions there are.
        captions: of a denoiser that takes text.
        text_encoder: encodes captions that are cached as token numbers; None leaves that to the loss, which
            trains the encoder.
        images: of a task; its field `concat` is not in `batch`, as it depends on more than the image.
    """

    latents: LatentDataset
    denoiser: nn.Module
    captions: CaptionDataset | None = None
    text_encoder: nn.Module | None = None
    images: ImageConditions | None = None

    def batch(self, indices: Tensor, captions: Tensor | None = None, length: int | None = None) -> Condition:
        """The condition of images `indices` `(N,)`.

        Args:
            captions: numbers `(N,)` of the images' captions, as `CaptionDataset.draw` gives them. Default:
                the first ones.
            length: tokens to which the captions are padded. Default: the longest one's.
        """
        if num_classes(self.denoiser):
            condition = Condition(class_labels=self.latents.class_labels(indices))
        else:
            condition = Condition()
        if self.captions is None:
            return condition
        if captions is None:
            captions = self.captions.draw(indices, torch.zeros(len(indices)))
        return self._with_text(condition, captions, length or self.captions.longest(captions))

    def training_batch(self, batch: dict[str, Tensor], rows: slice, config: DenoiserConfig) -> Condition:
        """The condition of some rows of a global batch, `random_batch` of train_denoiser.py, with dropout."""
        indices, text = batch["indices"][rows], ()
        if self.captions is not None:
            text = batch["captions"][rows], self.captions.longest(batch["captions"])  # equal on all processes
        null = self.null(*text[1:])
        return drop(self.batch(indices, *text), null, batch["dropped"][rows], config)

    def null(self, length: int | None = None) -> Condition:
        """The condition of one image that says nothing; `length` as for `batch`."""
        condition = Condition.null(self.denoiser, 1, self.latents.device)
        if self.captions is None:
            return condition
        empty = torch.zeros(1, dtype=torch.int64)
        return self._with_text(condition, empty, length or self.captions.longest(empty))

    def _with_text(self, condition: Condition, captions: Tensor, length: int) -> Condition:
        tokens, mask = self.captions.batch(captions, length)
        if self.text_encoder is not None and not tokens.is_floating_point():
            tokens = encode_tokens(self.text_encoder, tokens, mask)
        return replace(condition, encoder_hidden_states=tokens, encoder_attention_mask=mask)


def drop(condition: Condition, null: Condition, uniform: Tensor, config: DenoiserConfig) -> Condition:
    """The condition with classes and captions dropped (classifier-free guidance, arXiv:2207.12598).

    Each is dropped in its share of the images; half of the smaller share loses both, as guidance needs it.

    Args:
        null: the condition that says nothing, of one image or of as many, with texts of the same length.
        uniform: numbers `(N,)` in [0, 1).
    """
    classes, text = condition.class_labels is not None, condition.encoder_hidden_states is not None
    label_share = config.label_dropout if classes else 0.0
    text_share = config.text_dropout if text else 0.0
    both = min(label_share, text_share) / 2
    if classes:
        condition = condition.drop(uniform < label_share, replace(condition, class_labels=null.class_labels))
    if text:
        dropped = (uniform < both) | ((uniform >= label_share) & (uniform < label_share + text_share - both))
        condition = condition.drop(dropped, replace(null, class_labels=condition.class_labels))
    return condition
