"""Muon: orthogonal steps for the matrices inside of a network, AdamW's for its other parameters."""

import re

import torch
from torch import Tensor, nn

# Keller Jordan's numbers (https://kellerjordan.github.io/posts/muon, 2024).
MOMENTUM = 0.95
ITERATIONS = 3, 2  # with each product of the matrix with itself
COEFFICIENTS = 3.4445, -4.7750, 2.0315
# Root mean square of an update, in learning rates. That of AdamW is 0.2 to 0.4 in language models
# (arXiv:2502.16982), so one learning rate suits both; 0.6 gave lower losses here than 0.2 (docs/recipes.md).
UPDATE_RMS = 0.6
NARROW = 16  # channels; a layer with fewer reads or writes images, latents or scores


def inner_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers and convolutions, without those of embeddings and at the ends of networks.

    These are told by Diffusers' names for them, and by their numbers of channels.
    """
    return [
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and min(layer.weight.shape[:2]) >= NARROW
        and getattr(layer, "groups", 1) == 1
        and not re.search("conv_in|conv_out|quant_conv|emb", name)
    ]


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T `(m, n)`, roughly: singular values become 0.7 to 1.2, very small ones less.

    Newton-Schulz iterations with the coefficients of Keller Jordan, in float32: polynomials of the product
    of the matrix with itself, of size min(m, n), as convolutions are far from square. The product is
    computed again on the way, when the small singular values have grown: they would drown in rounding errors.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-12)
    identity = torch.eye(len(wide), device=wide.device)

    def factor(square: Tensor) -> Tensor:
        return torch.addmm(a * identity + b * square, square, square, alpha=c)

    for iterations in ITERATIONS:
        square = wide @ wide.T
        total = factor(square)
        for _ in range(iterations - 1):
            total = factor(total @ square @ total) @ total
        wide = total @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.AdamW):
    """Muon (Keller Jordan, 2024) for `inner_matrices`, fused AdamW for the other parameters.

    Learning rate and weight decay are AdamW's for all of them (arXiv:2502.16982). A convolution's weight
    `(out, in, h, w)` is a matrix `(out, in * h * w)`. Where `found_inf` is 1, a step changes nothing.

    Args:
        module: what is trained.
        options: AdamW's, among them `fused`.
    """

    def __init__(self, module: nn.Module, **options):
        super().__init__(module.parameters(), **options)
        self.matrices = inner_matrices(module)
        self.found_inf = torch.zeros((), device=next(module.parameters()).device)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient. The gradients of matrices are freed."""
        for matrix in self.matrices:
            if matrix.grad is not None:
                self._update(matrix)
                matrix.grad = None  # so that AdamW passes it by
        super().step()

    def _update(self, matrix: nn.Parameter) -> None:
        state, group, kept = self.state[matrix], self.param_groups[0], 1 - self.found_inf
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum = state["momentum"]
        gradient = torch.where(kept.bool(), matrix.grad, momentum)
        momentum.lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalized(gradient.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's
        scale = UPDATE_RMS * max(update.shape) ** 0.5  # an orthogonal matrix has RMS max(m, n) ** -0.5
        matrix.mul_(1 - group["lr"] * group["weight_decay"] * kept)
        matrix.addcmul_(update.reshape(matrix.shape), kept, value=-group["lr"] * scale)
