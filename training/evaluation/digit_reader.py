"""A feature network for handwritten digits that needs no download: their pixels, and the nearest digits."""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from training.config import DataConfig
from training.data.images import load_images


class DigitReader(nn.Module):
    """Features: the 64 pixels that scikit-learn's digits have. Logits: how near the nearest digit of a class
    is, among the training images of `--data.dataset digits`."""

    def __init__(self):
        super().__init__()
        train = load_images(DataConfig(dataset="digits", resolution=8, channels=1)).train
        images = torch.stack([train[index, False]["images"] for index in range(len(train))])
        self.register_buffer("digits", images.flatten(1) / 2 + 0.5)
        self.register_buffer("labels", train.labels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(N, 64)` and logits `(N, 10)` of float32 images `(N, 3, R, R)` in [0, 1]."""
        features = adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        distances = torch.cdist(features, self.digits)
        nearest = [distances[:, self.labels == digit].amin(1) for digit in range(10)]
        return features, -torch.stack(nearest, 1).square()
