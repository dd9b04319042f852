"""The metrics against independent computations, and against what is known in closed form."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from training.evaluation.metrics import (
    FrechetDistance,
    Reference,
    classifier_score,
    kernel_distance,
    manifold_metrics,
    metric_name,
    nearest_neighbours,
)


def gaussian(count, dimension, shift=0.0, scale=1.0, seed=0):
    noise = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * scale + shift


def test_frechet_distance_is_that_of_the_fitted_gaussians():
    mixing = gaussian(12, 12, seed=9)
    real, samples = gaussian(3000, 12) @ mixing, gaussian(2000, 12, shift=0.3, scale=1.4, seed=1)
    pairs = [(x.numpy().mean(0), np.cov(x.numpy().T)) for x in (real, samples)]
    means, covariances = zip(*pairs, strict=True)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert FrechetDistance(real)(samples) == pytest.approx(expected, rel=1e-4)
    assert FrechetDistance(real.float())(samples.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_to_itself_and_to_a_known_map():
    """To 1.5 x + 0.5 of the vectors x it is |mean / 2 + 1 / 2|^2 + trace(covariance) / 4."""
    features = gaussian(500, 30, shift=2.0).float().double()
    distance, trace = FrechetDistance(features), features.var(0).sum()
    assert abs(distance(features)) < 1e-4 * trace
    expected = (features.mean(0) / 2 + 0.5).square().sum() + trace / 4
    assert distance(1.5 * features + 0.5) == pytest.approx(expected.item(), rel=1e-6)


def test_kernel_distance_is_the_unbiased_cubic_mmd():
    real, samples = gaussian(60, 5), gaussian(60, 5, shift=0.5, seed=1)
    mean, deviation = kernel_distance(real, samples)  # subsets of all 60: each is the whole set
    x, y = real.numpy(), samples.numpy()
    a, b, c = ((p @ q.T / 5 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    own = sum((k.sum() - np.trace(k)) / (60 * 59) for k in (a, b))
    assert mean == pytest.approx(own - 2 * c.mean(), rel=1e-4) and deviation < 1e-6
    assert kernel_distance(real, samples) == (mean, deviation)


def test_classifier_score_lies_between_one_and_the_number_of_classes():
    sure = torch.eye(5).repeat(400, 1) * 100
    assert classifier_score(sure)[0] == pytest.approx(5, rel=0.05)
    assert classifier_score(torch.zeros(200, 5)) == pytest.approx((1, 0), abs=1e-6)


def naive_manifold(real, samples):
    """The definitions, pair by pair (arXiv:1904.06991, eq. 1 to 3; arXiv:2002.09797, eq. 3 and 4)."""

    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(points, i, k):
        return sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real3, real5 = ([radius(real, i, k) for i in range(len(real))] for k in (3, 5))
    samples3 = [radius(samples, i, 3) for i in range(len(samples))]
    to_real = [[distance(s, r) for r in real] for s in samples]
    count, total = len(samples), len(real)
    return {
        "precision": sum(any(d <= r for d, r in zip(row, real3, strict=True)) for row in to_real) / count,
        "recall": sum(any(to_real[j][i] <= samples3[j] for j in range(count)) for i in range(total)) / total,
        "density": sum(d <= r for row in to_real for d, r in zip(row, real5, strict=True)) / (5 * count),
        "coverage": sum(min(to_real[j][i] for j in range(count)) <= real5[i] for i in range(total)) / total,
    }


@pytest.mark.parametrize("shift, scale", [(0.0, 1.0), (0.7, 0.6), (0.0, 2.0)])
def test_manifold_metrics_follow_their_definitions(shift, scale):
    real, samples = gaussian(70, 6), gaussian(70, 6, shift, scale, seed=1)
    found = manifold_metrics(real, samples)
    assert found == pytest.approx(naive_manifold(real.numpy(), samples.numpy()), rel=1e-4)
    assert 0 < found["precision"] < 1 or shift == 0


def test_a_set_against_itself_is_perfect():
    features, labels = gaussian(300, 8).float(), torch.arange(300) % 3
    features += 20 * labels[:, None]
    found = Reference("net", {"features": features}, labels, torch.device("cpu")).metrics(
        {"features": features}, labels
    )
    assert abs(found["FD-300"]) < 1e-3
    assert [found[f"{name}-300"] for name in ("precision", "recall", "coverage", "agreement")] == [1.0] * 4
    assert found["density-300"] >= 1


def test_collapsed_samples_have_precision_and_no_recall():
    real = gaussian(300, 8)
    found = manifold_metrics(real, real[:1] + gaussian(300, 8, scale=1e-3, seed=1))
    assert found["precision"] == 1 and found["recall"] < 0.05 and found["coverage"] < 0.1


def test_agreement_and_distances_by_class():
    labels = torch.arange(400) % 2
    real = gaussian(400, 6) + 10 * labels[:, None]
    samples = gaussian(100, 6, seed=1) + 10 * (torch.arange(100) % 2)[:, None]
    reference = Reference("inception", {"features": real.float()}, labels, torch.device("cpu"))
    drawn = torch.arange(100) % 2
    drawn[:25] = 1 - drawn[:25]  # a quarter was drawn as the other class
    assert reference.metrics({"features": samples.float()}, drawn)["agreement-100"] == 0.75
    by_class = reference.by_class(samples.float(), torch.arange(100) % 2, {0: "low", 1: "high"})
    assert by_class["figure"] == "FID-50" and set(by_class["values"]) == {"low", "high"}
    expected = FrechetDistance(real[labels == 1].float())(samples[1::2].float())
    assert by_class["values"]["high"] == pytest.approx(expected)


def test_a_classifier_of_the_data_is_asked_itself():
    labels = torch.arange(60) % 3
    logits = torch.nn.functional.one_hot(labels, 3).float()
    given = {"features": gaussian(60, 4).float(), "logits": logits}
    reference = Reference("net", given, labels, torch.device("cpu"))
    assert reference.metrics(given, labels)["agreement-60"] == 1
    assert "classifier score-60" in reference.metrics(given, labels)


@pytest.mark.parametrize("labels", [torch.zeros(40).long(), torch.arange(40)])
def test_labels_that_no_classifier_can_learn_give_no_agreement(labels):
    """One class, as of a folder of images in one subfolder; or one image per class."""
    features = {"features": gaussian(40, 4).float()}
    reference = Reference("net", features, labels, torch.device("cpu"))
    assert "FD-40" in (metrics := reference.metrics(features, labels)) and "agreement-40" not in metrics


def test_small_numbers_are_in_the_names():
    names = {count: metric_name("FID", count) for count in (500, 2000, 2500, 9999, 10_000, 50_000)}
    assert list(names.values()) == ["FID-500", "FID-2k", "FID-2.5k", "FID-9.999k", "FID", "FID"]


def test_nearest_neighbours():
    points = gaussian(50, 3)
    distances, indices = nearest_neighbours(points[:7] + 1e-4, points, 2, "cpu")
    assert indices[:, 0].tolist() == list(range(7))
    assert distances[:, 0] == pytest.approx(1e-4 * 3**0.5, rel=1e-3)
