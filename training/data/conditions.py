"""Conditions of training images, dropped for classifier-free guidance."""

from torch import Tensor, nn

from ldm_pipeline.pipeline import Condition, num_classes
from training.data.latents import LatentDataset


def training_condition(
    latents: LatentDataset, denoiser: nn.Module, indices: Tensor, dropped: Tensor
) -> Condition:
    """The condition of images `indices` `(N,)`, empty if the denoiser takes none.

    Args:
        latents: the cache that holds the class labels.
        denoiser: decides which conditions there are.
        indices: images of `latents`.
        dropped: bool `(N,)` on the denoiser's device; where true, the image gets the null condition
            (classifier-free guidance, arXiv:2207.12598).
    """
    if not num_classes(denoiser):
        return Condition()
    null = Condition.null(denoiser, len(indices), dropped.device)
    return Condition(class_labels=latents.class_labels(indices)).drop(dropped, null)
