"""What the features of two sets of images say of each other: distances, precision, recall, copies."""

import warnings
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from training.config import RunError
from training.data.order import seeded_generator

ENOUGH = 10_000  # samples from which on a figure needs no note; also the most that manifolds are made of
FEWEST = 10
NEIGHBOURS = {"precision": 3, "density": 5}  # k of arXiv:1904.06991 and of arXiv:2002.09797
ALONE = {"sync_on_compute": False}  # one process has all features: torchmetrics would wait for the others


class Given(nn.Module):
    """Stands in torchmetrics where a network would be: the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def label(name: str, count: int) -> str:
    """The name of a figure, with the number of samples if it is below 10,000: `FID-2k`, `recall-500`."""
    if count >= ENOUGH:
        return name
    return f"{name}-{count / 1000:g}k" if count >= 1000 else f"{name}-{count}"


def frechet_distance(real: Tensor, samples: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features `(N, D)`, `(M, D)`; float64 (arXiv:1706.08500)."""
    return FrechetDistance(real)(samples)


class FrechetDistance:
    """`frechet_distance` to features `(N, D)` whose moments are computed once."""

    def __init__(self, real: Tensor):
        self.metric = FrechetInceptionDistance(Given(real.shape[1]), reset_real_features=False, **ALONE)
        self._update(real, real=True)

    def __call__(self, samples: Tensor) -> float:
        self.metric.reset()
        self._update(samples, real=False)
        return self.metric.compute().item()

    def _update(self, features: Tensor, real: bool) -> None:
        for part in features.split(4096):
            self.metric.update(part.double(), real=real)


def kernel_distance(real: Tensor, samples: Tensor) -> tuple[float, float]:
    """Squared MMD of a cubic kernel, unbiased, and its deviation over 100 subsets (arXiv:1801.01401)."""
    size = min(1000, len(real), len(samples))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features, which it is given
        metric = KernelInceptionDistance(Given(real.shape[1]), subset_size=size, **ALONE)
    metric.update(real.double(), real=True)
    metric.update(samples.double(), real=False)
    return _seeded(metric)


def classifier_score(logits: Tensor) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from p(class), and its deviation over 10 parts; the
    Inception score (arXiv:1606.03498) if the logits `(N, K)` are Inception's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        metric = InceptionScore(Given(logits.shape[1]), **ALONE)
    metric.update(logits.double())
    return _seeded(metric)


def _seeded(metric) -> tuple[float, float]:
    with torch.random.fork_rng(devices=[]):  # both draw subsets from the global generator
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def manifold_figures(real: Tensor, samples: Tensor, device: torch.device | str = "cpu") -> dict[str, float]:
    """Improved precision and recall (k = 3, arXiv:1904.06991), density and coverage (k = 5,
    arXiv:2002.09797).

    Args:
        real, samples: features `(N, D)`, of equally many images: the figures depend on their number.
        device: where distances are computed, in float64.
    """
    real, samples = (features.double().to(device) for features in (real, samples))
    first, second = NEIGHBOURS.values()
    real_radii, sample_radii = _radii(real), _radii(samples)
    nearest = torch.full((len(real),), torch.inf, dtype=torch.float64, device=device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    inside, balls, done = 0.0, 0.0, 0
    for distances in _blocks(samples, real):
        inside += (distances <= real_radii[first]).any(1).sum().item()
        balls += (distances <= real_radii[second]).sum().item()
        own = sample_radii[first][done : done + len(distances)]
        recalled |= (distances <= own[:, None]).any(0)
        nearest = torch.minimum(nearest, distances.amin(0))
        done += len(distances)
    return {
        "precision": inside / len(samples),
        "recall": recalled.double().mean().item(),
        "density": balls / (second * len(samples)),
        "coverage": (nearest <= real_radii[second]).double().mean().item(),
    }


def _radii(features: Tensor) -> dict[int, Tensor]:
    """Distance of each vector to its k-th nearest other one, by k."""
    found = []
    for distances in _blocks(features, features):
        found.append(distances.topk(max(NEIGHBOURS.values()) + 1, largest=False).values)  # with itself
    return {k: torch.cat(found)[:, k] for k in NEIGHBOURS.values()}


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Euclidean distances, some rows at once."""
    for part in rows.split(max(1, 2**25 // len(columns))):
        yield torch.cdist(part, columns)


def nearest(features: Tensor, among: Tensor, k: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Distances and indices, both `(N, k)`, of the k nearest of `among` `(M, D)` to each of `(N, D)`."""
    among = among.double().to(device)
    found = [d.topk(k, largest=False) for d in _blocks(features.double().to(device), among)]
    return torch.cat([each.values for each in found]).cpu(), torch.cat([each.indices for each in found]).cpu()


class Reference:
    """Real images, in features, to which samples are compared.

    Args:
        network: the name of the network; Inception's figures have names of their own.
        real: "features" `(N, D)` and, of a classifier, "logits" `(N, K)`.
        labels: int64 `(N,)`, or None.
        device: where distances are computed.
    """

    def __init__(self, network: str, real: dict[str, Tensor], labels: Tensor | None, device: torch.device):
        inception = network == "inception"
        self.frechet, self.kernel, self.score = (
            ("FID", "KID", "IS") if inception else ("FD", "KD", "classifier score")
        )
        self.real, self.labels = real, labels
        self.device = device if device.type == "cuda" else torch.device("cpu")  # float64 is not everywhere
        self.distance = FrechetDistance(real["features"])

    def figures(self, samples: dict[str, Tensor], labels: Tensor | None) -> dict[str, float]:
        """All figures of samples by their names.

        Args:
            samples: as `real`.
            labels: int64 `(M,)`, what they were drawn as, or None.
        """
        features, count = samples["features"], len(samples["features"])
        found = {label(self.frechet, count): self.distance(features)}
        pairs = {self.kernel: kernel_distance(self.real["features"], features)}
        if "logits" in samples:
            pairs[self.score] = classifier_score(samples["logits"])
        for name, (value, deviation) in pairs.items():
            found |= {label(name, count): value, f"{label(name, count)} deviation": deviation}
        number = min(count, len(self.real["features"]), ENOUGH)
        order = torch.randperm(len(self.real["features"]), generator=seeded_generator("cpu", "manifold"))
        some = self.real["features"][order[:number]]
        manifold = manifold_figures(some, features[:number], self.device)
        found |= {label(name, number): value for name, value in manifold.items()}
        if labels is not None and self.labels is not None:
            found[label("agreement", count)] = (self.classes(samples) == labels).double().mean().item()
        return found

    def by_class(self, samples: Tensor, labels: Tensor, id2label: dict[int, str]) -> dict:
        """The Frechet distance of each class to the real images of it, where both are ten or more."""
        groups = {
            name: (self.real["features"][self.labels == number], samples[labels == number])
            for number, name in id2label.items()
        }
        groups = {name: pair for name, pair in groups.items() if min(map(len, pair)) >= FEWEST}
        fewest = min((len(pair[1]) for pair in groups.values()), default=0)
        values = {name: frechet_distance(*pair) for name, pair in groups.items()}
        return {"figure": label(self.frechet, fewest), "values": values}

    def classes(self, samples: dict[str, Tensor]) -> Tensor:
        """What class the network, or else a linear discriminant of its features, takes images for `(M,)`."""
        if self.reads_classes:
            return samples["logits"].argmax(1)
        return torch.from_numpy(self._discriminant.predict(samples["features"].numpy()))

    @property
    def reads_classes(self) -> bool:
        """Whether the network has the data's classes itself."""
        return "logits" in self.real and self.real["logits"].shape[1] == int(self.labels.max()) + 1

    @cached_property
    def _discriminant(self):
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # here: it takes seconds

        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        return fitted.fit(self.real["features"].numpy(), self.labels.numpy())


def check_arithmetic(features: Tensor) -> dict[str, float]:
    """The Frechet distance where it is known: of a set to itself, and to 1.5 x + 0.5 of its vectors x.

    Returns:
        "itself", and the relative error of the other against |mean / 2 + 1 / 2|^2 + trace(covariance) / 4.

    Raises:
        RunError: if either is off by more than 1e-4 of the trace.
    """
    features = features[:2048, :256].double()
    variance = features.var(0).sum().item()
    expected = ((features.mean(0) / 2 + 0.5).square().sum() + variance / 4).item()
    itself = frechet_distance(features, features)
    error = frechet_distance(features, 1.5 * features + 0.5) / expected - 1
    if not max(abs(itself) / max(variance, 1e-12), abs(error)) < 1e-4:
        raise RunError(
            f"the Frechet distance of the features to themselves is {itself:g}, that to 1.5 x + 0.5 off by "
            f"{error:.2%}: these features or the installed torchmetrics cannot be used; choose other "
            "--evaluation.features"
        )
    return {"itself": itself, "closed form": error}
