"""Metrics that compare the features of samples with those of real images."""

import warnings
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from training.data.order import seeded_generator

MANY_SAMPLES = 10_000  # metrics of fewer have the number in their names; manifolds take no more
MIN_SAMPLES = 10  # fewer give no metric at all
PRECISION_K, DENSITY_K = 3, 5  # neighbours, as in arXiv:1904.06991 and arXiv:2002.09797
ONE_PROCESS = {"sync_on_compute": False}  # torchmetrics would wait for the other processes


class _Identity(nn.Module):
    """The network of a torchmetrics metric that is given features instead of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def metric_name(name: str, count: int) -> str:
    """A metric's name, with the number of samples if it is below 10,000: `FID-2k`, `recall-500`."""
    if count >= MANY_SAMPLES:
        return name
    return f"{name}-{count / 1000:g}k" if count >= 1000 else f"{name}-{count}"


def ranking_metric(metrics: dict[str, float]) -> str:
    """The name of the metric that settings are ranked by: the Frechet distance; lower is better."""
    return next(name for name in metrics if name.split("-")[0] in ("FID", "FD"))


class FrechetDistance:
    """Frechet distance to real features `(N, D)`, whose moments are computed once.

    Gaussians are fitted to both sets, in float64 (arXiv:1706.08500).
    """

    def __init__(self, real: Tensor):
        self.metric = FrechetInceptionDistance(
            _Identity(real.shape[1]), reset_real_features=False, **ONE_PROCESS
        )
        self._update(real, real=True)

    def __call__(self, samples: Tensor) -> float:
        """The distance of features `(M, D)`."""
        self.metric.reset()
        self._update(samples, real=False)
        return self.metric.compute().item()

    def _update(self, features: Tensor, real: bool) -> None:
        for part in features.split(4096):
            self.metric.update(part.double(), real=real)


def kernel_distance(real: Tensor, samples: Tensor) -> tuple[float, float]:
    """Squared MMD of a cubic kernel between features `(N, D)` and `(M, D)`, unbiased (arXiv:1801.01401).

    Returns its mean and standard deviation over 100 subsets of at most 1,000.
    """
    size = min(1000, len(real), len(samples))
    updates = ({"imgs": real, "real": True}, {"imgs": samples, "real": False})
    return _mean_and_deviation(KernelInceptionDistance, real.shape[1], *updates, subset_size=size)


def classifier_score(logits: Tensor) -> tuple[float, float]:
    """The Inception score (arXiv:1606.03498) from logits `(N, K)` of any classifier.

    It is exp of the mean KL divergence between p(class | image) and p(class). Returns mean and standard
    deviation over 10 parts.
    """
    return _mean_and_deviation(InceptionScore, logits.shape[1], {"imgs": logits})


def _mean_and_deviation(kind: type, num_features: int, *updates: dict, **options) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features in memory
        metric = kind(_Identity(num_features), **options, **ONE_PROCESS)
    for update in updates:
        metric.update(**update | {"imgs": update["imgs"].double()})
    with torch.random.fork_rng(devices=[]):  # it takes subsets by the global generator
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def manifold_metrics(real: Tensor, samples: Tensor, device: torch.device | str = "cpu") -> dict[str, float]:
    """Precision and recall (k = 3, arXiv:1904.06991), density and coverage (k = 5, arXiv:2002.09797).

    Args:
        real, samples: features `(N, D)` of equally many images, because the values depend on the number.
        device: where the distances are computed, in float64.
    """
    real, samples = (features.double().to(device) for features in (real, samples))
    real_radii, sample_radii = _radii(real), _radii(samples)
    nearest = torch.full((len(real),), torch.inf, dtype=torch.float64, device=device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    inside, balls, start = 0.0, 0.0, 0
    for distances in _distances(samples, real):
        inside += (distances <= real_radii[PRECISION_K]).any(1).sum().item()
        balls += (distances <= real_radii[DENSITY_K]).sum().item()
        radii = sample_radii[PRECISION_K][start : start + len(distances)]
        recalled |= (distances <= radii[:, None]).any(0)
        nearest = torch.minimum(nearest, distances.amin(0))
        start += len(distances)
    return {
        "precision": inside / len(samples),
        "recall": recalled.double().mean().item(),
        "density": balls / (DENSITY_K * len(samples)),
        "coverage": (nearest <= real_radii[DENSITY_K]).double().mean().item(),
    }


def _radii(features: Tensor) -> dict[int, Tensor]:
    """Distance of each vector to its k-th nearest other vector, by k."""
    nearest = [rows.topk(DENSITY_K + 1, largest=False).values for rows in _distances(features, features)]
    return {k: torch.cat(nearest)[:, k] for k in (PRECISION_K, DENSITY_K)}  # place 0 is the vector itself


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Euclidean distances, as many rows at once as make 256 MB."""
    for part in rows.split(max(1, 2**25 // len(columns))):
        yield torch.cdist(part, columns)


def nearest_neighbours(
    features: Tensor, others: Tensor, k: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Distances and indices, both `(N, k)`, of the k nearest of `others` `(M, D)` to `features` `(N, D)`."""
    others = others.double().to(device)
    rows = _distances(features.double().to(device), others)
    distances, indices = zip(*(part.topk(k, largest=False) for part in rows), strict=True)
    return torch.cat(distances).cpu(), torch.cat(indices).cpu()


class Reference:
    """Features of real images, and all metrics of samples against them.

    Args:
        network: name of the feature network; only Inception's metrics are called FID, KID and IS.
        real: "features" `(N, D)` and, of a classifier, "logits" `(N, K)`.
        labels: int64 `(N,)`, or None.
        device: where distances are computed.
    """

    def __init__(self, network: str, real: dict[str, Tensor], labels: Tensor | None, device: torch.device):
        inception = network == "inception"
        self.names = ("FID", "KID", "IS") if inception else ("FD", "KD", "classifier score")
        self.real, self.labels = real, labels
        self.device = device if device.type == "cuda" else torch.device("cpu")  # float64 is not everywhere
        self.distance = FrechetDistance(real["features"])

    def metrics(self, samples: dict[str, Tensor], labels: Tensor | None) -> dict[str, float]:
        """All metrics by name.

        Args:
            samples: as `real`, and errors of a task by name, `(M,)` each.
            labels: int64 `(M,)`, the classes that the samples were generated for, or None.
        """
        features, count = samples["features"], len(samples["features"])
        frechet, kernel, score = self.names
        metrics = {metric_name(frechet, count): self.distance(features)}
        pairs = {kernel: kernel_distance(self.real["features"], features)}
        if "logits" in samples:
            pairs[score] = classifier_score(samples["logits"])
        for name, (mean, deviation) in pairs.items():
            name = metric_name(name, count)
            metrics |= {name: mean, f"{name} deviation": deviation}
        number = min(count, len(self.real["features"]), MANY_SAMPLES)
        order = torch.randperm(len(self.real["features"]), generator=seeded_generator("cpu", "manifold"))
        subset = self.real["features"][order[:number]]
        manifold = manifold_metrics(subset, features[:number], self.device)
        metrics |= {metric_name(name, number): value for name, value in manifold.items()}
        if "clip" in samples:
            metrics[metric_name("CLIP score", count)] = samples["clip"].double().mean().item()
        errors = samples.keys() - {"features", "logits", "digests", "images", "clip"}
        metrics |= {metric_name(name, count): samples[name].double().mean().item() for name in sorted(errors)}
        if labels is not None and self.agreement_by:
            agreement = (self._classify(samples) == labels).double().mean().item()
            metrics[metric_name("agreement", count)] = agreement
        return metrics

    def by_class(self, samples: Tensor, labels: Tensor, id2label: dict[int, str]) -> dict:
        """The Frechet distance of each class to its real images, where there are ten of both."""
        groups = {
            name: (self.real["features"][self.labels == number], samples[labels == number])
            for number, name in id2label.items()
        }
        groups = {name: pair for name, pair in groups.items() if min(map(len, pair)) >= MIN_SAMPLES}
        fewest = min((len(samples) for _, samples in groups.values()), default=0)
        values = {name: FrechetDistance(real)(samples) for name, (real, samples) in groups.items()}
        return {"figure": metric_name(self.names[0], fewest), "values": values}

    @cached_property
    def agreement_by(self) -> str | None:
        """The classifier that decides whether samples agree with their classes; None without one."""
        classes = 0 if self.labels is None else int(self.labels.max()) + 1
        if classes and "logits" in self.real and self.real["logits"].shape[1] == classes:
            return "the network's classes"
        separable = classes and 1 < len(self.labels.unique()) < len(self.labels)
        return "linear discriminant" if separable else None

    def _classify(self, samples: dict[str, Tensor]) -> Tensor:
        if self.agreement_by == "the network's classes":
            return samples["logits"].argmax(1)
        return torch.from_numpy(self._discriminant.predict(samples["features"].numpy()))

    @cached_property
    def _discriminant(self):
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # here: it takes seconds

        discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        return discriminant.fit(self.real["features"].numpy(), self.labels.numpy())
