"""Which candidates to keep so that they differ: one of each cluster of what they show."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError, did_you_mean
from genscale.io.images import to_uint8
from genscale.metrics.features import FeatureNetwork
from genscale.rng import Purpose

FeatureMode = Literal["flat", "pca", "pca_raw", "pca_all", "pool"]
FeatureName = Literal["pixel", "latent"]
_RESTARTS = 16  # of k-means; the tightest clusters win
_ROUNDS = 100  # of k-means, where it does not settle before
_SLACK = 1e-7  # of the largest squared distance: what rounding moves squared distances by
_SIDE = 16  # pictures are averaged to this many pixels a side where pixels are the features


class Diversity:
    """Groups the candidates of a prompt by what they show and keeps one of each group.

    Features are tokens ``(n, L, D)``: places of a picture with D numbers each. A mode makes one
    vector a candidate of them:

    - ``flat``: all numbers.
    - ``pca``: every place's coordinate along the first principal direction of its own picture: a
      map of the layout. The direction's sign means nothing, so the map is turned until its third
      moment is positive; else two equal layouts may lie far apart.
    - ``pca_raw``: the same with whatever sign the decomposition gives, as TTS-VAR's program does.
    - ``pca_all``: along the first principal direction of all candidates' places together.
    - ``pool``: the mean over places.

    Args:
        features: ``pixel``: the decoded picture at 16 pixels a side; ``latent``: the latent, which
            need not be decoded; or a network of :mod:`genscale.metrics`.
        mode: None takes ``flat`` of pixels and latents, ``pca`` of networks that give maps, and
            ``pool`` of others.

    Raises:
        ConfigError: an unknown word, or a mode that needs maps of a network that gives none.
    """

    def __init__(
        self,
        features: FeatureName | FeatureNetwork = "pixel",
        mode: FeatureMode | None = None,
    ) -> None:
        if isinstance(features, str) and features not in get_args(FeatureName):
            raise ConfigError(
                f"search.features must be one of {', '.join(get_args(FeatureName))}, or a feature "
                f"network, but is '{features}'.{did_you_mean(features, get_args(FeatureName))}"
            )
        if mode is not None and mode not in get_args(FeatureMode):
            raise ConfigError(
                f"search.feature_mode must be one of {', '.join(get_args(FeatureMode))}, but is "
                f"'{mode}'.{did_you_mean(mode, get_args(FeatureMode))}"
            )
        self.features = features
        maps = isinstance(features, str) or features.gives_maps
        if not isinstance(features, str) and not maps and mode not in (None, "pool"):
            raise ConfigError(
                f"search.feature_mode={mode} needs a map of features, but the network "
                f"'{features.name}' gives one vector a picture. Use search.feature_mode=pool."
            )
        usual: FeatureMode = "flat" if isinstance(features, str) else "pca" if maps else "pool"
        self.mode: FeatureMode = mode or usual

    @property
    def label(self) -> str:
        """What it looks at."""
        name = self.features if isinstance(self.features, str) else self.features.description
        return f"{name} {self.mode}"

    @property
    def needs_images(self) -> bool:
        """Whether latents have to be decoded first."""
        return self.features != "latent"

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing: weights, packages."""
        return [] if isinstance(self.features, str) else self.features.check()

    def tokens(self, inputs: Tensor) -> Tensor:
        """Return the features ``(n, L, D)`` float32 of candidates.

        Args:
            inputs: ``(n, C, H, W)`` latents, or pictures in about [-1, 1] if :attr:`needs_images`.
        """
        network = self.features
        if network == "latent":
            return inputs.float().flatten(2).mT
        if isinstance(network, str):
            size = (min(_SIDE, inputs.shape[-2]), min(_SIDE, inputs.shape[-1]))
            return F.adaptive_avg_pool2d(inputs.float().clamp(-1, 1), size).flatten(2).mT
        network.prepare()
        network.to(inputs.device)
        with torch.no_grad():
            if network.gives_maps:
                unit = (inputs.float() * 0.5 + 0.5).clamp(0.0, 1.0)
                deepest: Tensor = network.maps(unit)[-1]
                return deepest.float().flatten(2).mT
            vectors: Tensor = network(to_uint8(inputs))[network.tap]
            return vectors.float()[:, None]

    def choose(self, tokens: Tensor, group: Tensor, seeds: Tensor, step: int, count: int) -> Tensor:
        """Return the rows of ``count`` candidates of every prompt, prompt by prompt, ascending.

        Args:
            tokens: ``(n, L, D)``.
            group: ``(n,)`` int64 prompts, on the CPU; each has at least ``count`` candidates.
            seeds: ``(G,)`` int64 of the prompts; clusters start from draws of theirs.
            step: the draws' number.
            count: candidates to keep a prompt.
        """
        keys = rng.key(seeds, step, Purpose.DIVERSITY)
        draws = rng.uniform(keys, (_RESTARTS, count))
        kept = []
        for prompt in range(len(seeds)):
            rows = (group == prompt).nonzero()[:, 0]
            vectors = candidate_features(tokens[rows.to(tokens.device)], self.mode)
            kept.append(rows[select_diverse(vectors, count, draws[prompt])])
        return torch.cat(kept)


def candidate_features(tokens: Tensor, mode: FeatureMode) -> Tensor:
    """Return one vector a candidate ``(n, d)``; see :class:`Diversity` for the modes.

    Args:
        tokens: ``(n, L, D)`` of the candidates of one prompt.
        mode: which vector.
    """
    if mode == "flat":
        return tokens.flatten(1)
    if mode == "pool":
        return tokens.mean(dim=1)
    if mode == "pca_all":
        places = tokens.flatten(0, 1)
        places = places - places.mean(dim=0)
        direction = torch.linalg.svd(places, full_matrices=False).Vh[:1].mT  # (D, 1)
        shared: Tensor = places @ direction
        return shared.view(tokens.shape[:2])
    places = tokens - tokens.mean(dim=1, keepdim=True)
    directions = torch.linalg.svd(places, full_matrices=False).Vh[:, :1].mT  # (n, D, 1)
    scores: Tensor = (places @ directions)[..., 0]
    return scores if mode == "pca_raw" else canonical_sign(scores)


def canonical_sign(scores: Tensor) -> Tensor:
    """Turn each row of ``(n, L)`` so that its third moment is not negative."""
    return torch.where((scores**3).sum(dim=1, keepdim=True) < 0, -scores, scores)


def select_diverse(features: Tensor, count: int, uniforms: Tensor) -> Tensor:
    """Return the row nearest to the centre of each of ``count`` clusters, rows ascending.

    Args:
        features: ``(n, d)``, n at least ``count``.
        count: clusters k.
        uniforms: ``(R, k)`` float64 in [0, 1): what R starts of k-means++ draw.

    Returns:
        ``(k,)`` int64 on the CPU. Where candidates are equal and clusters stay empty, those
        furthest from the chosen ones fill the places.
    """
    squares = _squares(features)
    labels, distances = candidate_clusters(features, uniforms)
    slack = _SLACK * float(squares.max())
    chosen: list[int] = []
    for cluster in range(count):
        inside = labels == cluster
        if bool(inside.any()):
            chosen.append(_first_least(distances[cluster].where(inside, torch.inf), slack))
    while len(chosen) < count:
        apart = squares[chosen].amin(dim=0)
        apart[chosen] = -torch.inf
        chosen.append(_first_least(-apart, slack))
    return torch.tensor(sorted(chosen))


def _first_least(values: Tensor, slack: float) -> int:
    """Return the first of the least values; what differs by rounding alone is equal."""
    least = values.min()
    return int((values <= least + slack + 1e-5 * least.abs()).int().argmax())


def candidate_clusters(features: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return clusters of candidates by k-means, the tightest of several starts.

    Args:
        features: ``(n, d)``.
        uniforms: ``(R, k)`` as in :func:`select_diverse`.

    Returns:
        labels ``(n,)`` int64, and squared distances ``(k, n)`` float64 to the centroids, inf of a
        cluster that is empty.
    """
    squares = _squares(features)
    return _tightest_clusters(squares, _first_centres(squares, uniforms))


def _squares(features: Tensor) -> Tensor:
    """Return squared distances ``(n, n)`` float64 on the CPU, bitwise symmetric.

    Coarse pictures are often equal, and the features of equal ones differ in their last digits
    from batch to batch: that is no distance.
    """
    rows = features.detach().double().cpu().nan_to_num()
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    squares = (squares + squares.mT) / 2
    rounding = 1e-9 * float(rows.square().sum(dim=1).max())
    return squares.where(squares > rounding, 0.0)


def _first_centres(squares: Tensor, uniforms: Tensor) -> Tensor:
    """Return the rows ``(R, k)`` that k-means++ starts from (Arthur and Vassilvitskii 2007).

    Each is drawn in proportion to its squared distance from those before it.
    """
    size = len(squares)
    drawn = [(uniforms[:, 0] * size).long().clamp(max=size - 1)]
    nearest = squares[drawn[0]]  # (R, n)
    for number in range(1, uniforms.shape[1]):
        total = nearest.cumsum(dim=1)
        point = uniforms[:, number, None] * total[:, -1:]
        drawn.append(torch.searchsorted(total, point, right=True)[:, 0].clamp(max=size - 1))
        nearest = torch.minimum(nearest, squares[drawn[-1]])
    return torch.stack(drawn, dim=1)


def _tightest_clusters(squares: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels ``(n,)`` and squared distances ``(k, n)`` to centroids, of the best start.

    Lloyd's iteration needs no coordinates: with D the squared distances, a candidate i lies at
    mean_j D_ij - mean_jl D_jl / 2 from the centroid of a cluster of candidates j, l.
    """
    count = centres.shape[1]
    distances = squares[centres]  # (R, k, n)
    labels = distances.argmin(dim=1)
    for _ in range(_ROUNDS):
        inside = F.one_hot(labels, count).double().mT  # (R, k, n)
        sizes = inside.sum(dim=2, keepdim=True)
        share = inside / sizes.clamp(min=1.0)
        mean = share @ squares
        spread = (mean * share).sum(dim=2, keepdim=True) / 2
        distances = (mean - spread).where(sizes > 0, torch.inf)
        before, labels = labels, distances.argmin(dim=1)
        if torch.equal(before, labels):
            break
    scatter = distances.amin(dim=1).sum(dim=1)
    best = int(scatter.argmin())
    return labels[best], distances[best]
