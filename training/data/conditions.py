"""Conditions of images in the latent cache, dropped for classifier-free guidance."""

from torch import Tensor, nn

from ldm_pipeline.pipeline import Condition, num_classes
from training.data.latents import LatentDataset


def cached_condition(
    latents: LatentDataset, denoiser: nn.Module, indices: Tensor, dropped: Tensor | None = None
) -> Condition:
    """The condition of images `indices` `(N,)`, empty if the denoiser takes none.

    Args:
        latents: the cache that holds the class labels.
        denoiser: decides which conditions there are.
        indices: images of `latents`.
        dropped: bool `(N,)` on the denoiser's device; where true, the image gets the null condition
            (classifier-free guidance, arXiv:2207.12598). None drops nothing.
    """
    if not num_classes(denoiser):
        return Condition()
    condition = Condition(class_labels=latents.class_labels(indices))
    if dropped is None:
        return condition
    return condition.drop(dropped, Condition.null(denoiser, len(indices), dropped.device))
