"""The residual quantiser of VAR: one token map a scale, coarse first (arXiv:2404.02905, sec. 3.2).

The latent f is written as a sum over scales of phi_k(upsample(codes_k)), where every scale codes
what the scales before have left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.layers.scales import Scales, as_scales, features_at, scale_spans

_ENTRIES = 2**26  # of the distances that are in memory at once


@dataclass(frozen=True, slots=True)
class QuantizeOutput:
    """What quantising gives in training.

    Attributes:
        latent: ``(B, Cv, H, W)``, the sum of all scales; its gradient goes to the encoder's
            output as if nothing had been quantised (straight-through).
        tokens: ``(B, L)`` int64.
        losses: ``(S,)``, for every scale beta mse(sg(f_hat), f) + mse(f_hat, sg(f)) of the running
            latent f_hat after it; the mean over scales is the training loss.
        residuals: for every scale the rows ``(B l_k, Cv)`` that were matched against the codebook;
            without gradient.
    """

    latent: Tensor
    tokens: Tensor
    losses: Tensor
    residuals: list[Tensor]


@lru_cache(maxsize=128)
def phi_of_scale(num_scales: int, num_phis: int) -> tuple[int, ...]:
    """Return which of the phi layers every scale uses: the nearest tick to its place in [0, 1].

    With 4 layers and 10 scales two places lie midway between ticks. float64 rounding decides
    them, and checkpoints depend on how: the formula must not be rearranged.

    Args:
        num_scales: S; scale k is at k / (S - 1).
        num_phis: n.
    """
    # parity: four layers are spaced by another rule than any other number
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    places = [k / (num_scales - 1) if num_scales > 1 else 0.0 for k in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)


class Phi(nn.Conv2d):
    """phi(h) = (1 - q) h + q conv(h), which smooths upsampled codes.

    Args:
        channels: Cv.
        weight: share q of the convolution.
    """

    def __init__(self, channels: int, weight: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.share = weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, Cv, H, W)`` to the same shape."""
        return (1 - self.share) * x + self.share * super().forward(x)


class ScaleQuantizer(nn.Module):
    """Latents <-> token maps of growing size.

    Args:
        vocab_size: codes V, shared by all scales.
        latent_channels: Cv.
        scales: sides or ``[height, width]`` of every scale; the last is the latents' size.
        num_phis: phi layers that the scales share; None gives every scale its own.
        phi_weight: share q of the convolution in a phi layer; 0 builds none.
        cosine: match by the angle to a code in place of the distance. What is looked up is the
            code itself either way.
        beta: weight of the loss that draws the encoder to the codes.

    Attributes:
        scales: heights and widths; see :meth:`use_scales`.
        hits: ``(S, V)``, how often each scale used each code: the running statistic of whoever
            trains; nothing here reads it.

    Raises:
        ConfigError: settings out of range.
    """

    hits: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        latent_channels: int,
        scales: Sequence[int | Sequence[int]],
        num_phis: int | None = 4,
        phi_weight: float = 0.5,
        cosine: bool = False,
        beta: float = 0.25,
    ) -> None:
        super().__init__()
        self.scales: Scales = as_scales(scales)
        count = len(self.scales) if num_phis is None else num_phis
        if vocab_size < 2 or latent_channels < 1 or count < 1 or not 0 <= phi_weight <= 1:
            raise ConfigError(
                "vocab_size must be at least 2, latent_channels and num_phis at least 1, and "
                f"phi_weight in [0, 1], but {vocab_size}, {latent_channels}, {num_phis} and "
                f"{phi_weight} were given. Change them."
            )
        self.cosine = cosine
        self.beta = beta
        self.embedding = nn.Embedding(vocab_size, latent_channels)
        self.phis = nn.ModuleList(
            Phi(latent_channels, phi_weight) for _ in range(count if phi_weight else 0)
        )
        self.register_buffer("hits", torch.zeros(len(self.scales), vocab_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew; codes start uniform in [-1 / V, 1 / V], as in VQGAN."""
        bound = 1 / self.embedding.num_embeddings
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        for module in self.phis:
            assert isinstance(module, Phi)
            module.reset_parameters()
        self.hits.zero_()

    def use_scales(self, scales: Sequence[int | Sequence[int]]) -> None:
        """Work with other scales from now on, for example those of another resolution.

        Weights stay; with S scales and n phi layers, scale k takes the layer nearest to
        k / (S - 1) whatever the S that was trained.
        """
        self.scales = as_scales(scales)

    def codes(self, tokens: Tensor) -> Tensor:
        """Look tokens ``(B, n)`` up: rows ``(B, n, Cv)`` of the codebook."""
        return self.embedding(tokens)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """Return the token ``(N,)`` int64 of the code nearest to each of the rows ``(N, Cv)``."""
        table = self.embedding.weight
        parts = rows.split(max(1, _ENTRIES // len(table)))
        if self.cosine:
            unit = F.normalize(table, dim=-1).T
            return torch.cat([(F.normalize(part, dim=-1) @ unit).argmax(1) for part in parts])
        lengths = table.square().sum(1)
        found = []
        for part in parts:
            # |z|^2 - 2 z e + |e|^2, in this order: it decides what rounds to a tie
            distances = part.square().sum(1, keepdim=True) + lengths
            found.append(distances.addmm_(part, table.T, alpha=-2).argmin(1))
        return torch.cat(found)

    def contribution(self, codes: Tensor, scale: int) -> Tensor:
        """Return what one scale adds to the running latent: ``(B, Cv, H, W)``.

        Args:
            codes: ``(B, l_k, Cv)``.
            scale: k.
        """
        maps = codes.transpose(1, 2).unflatten(2, self.scales[scale])
        if scale < len(self.scales) - 1:
            maps = F.interpolate(maps, size=self.scales[-1], mode="bicubic")
        if not self.phis:
            return maps
        return self.phis[phi_of_scale(len(self.scales), len(self.phis))[scale]](maps)

    def add_scale(self, running: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale; see :meth:`~genscale.autoencoders.base.ScaleTokenizer.add_scale`."""
        running = running + self.contribution(codes, scale)
        if scale == len(self.scales) - 1:
            return running, None
        return running, features_at(running, self.scales[scale + 1])

    @torch.no_grad()
    def encode(self, latent: Tensor) -> Tensor:
        """Return the tokens ``(B, L)`` of latents ``(B, Cv, H, W)``."""
        return torch.cat([tokens for _, tokens, _ in self._walk(latent)], dim=1)

    def snapshots(self, tokens: Tensor) -> list[Tensor]:
        """Return the running latent after every scale of ``tokens (B, L)``."""
        running = self._start(len(tokens))
        result = []
        for scale, part in enumerate(self.split(tokens)):
            running = running + self.contribution(self.codes(part), scale)
            result.append(running)
        return result

    def features(self, tokens: Tensor) -> Tensor:
        """Return ``(B, L, Cv)``: before every scale the running latent as that scale sees it."""
        running = self._start(len(tokens))
        parts = [features_at(running, self.scales[0])]
        for scale, part in enumerate(self.split(tokens)[:-1]):
            running, features = self.add_scale(running, self.codes(part), scale)
            assert features is not None  # only the last scale has none
            parts.append(features)
        return torch.cat(parts, dim=1)

    def forward(self, latent: Tensor) -> QuantizeOutput:
        """Quantise latents ``(B, Cv, H, W)`` for training."""
        fixed = latent.detach()
        running = torch.zeros_like(fixed)
        tokens, losses, residuals = [], [], []
        for rows, ids, added in self._walk(fixed):
            running = running + added
            committing = F.mse_loss(running.detach(), latent)
            losses.append(self.beta * committing + F.mse_loss(running, fixed))
            tokens.append(ids)
            residuals.append(rows)
        through = (running.detach() - fixed) + latent
        return QuantizeOutput(through, torch.cat(tokens, dim=1), torch.stack(losses), residuals)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Split ``(B, L, ...)`` into the parts of every scale.

        Raises:
            ValueError: another number of tokens than L.
        """
        spans = scale_spans(self.scales)
        if tokens.shape[1] != spans[-1][1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens were given, but the scales {list(self.scales)} have "
                f"{spans[-1][1]}. Give the tokens of all scales."
            )
        return [tokens[:, start:end] for start, end in spans]

    def _walk(self, latent: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for every scale the rows matched, their tokens ``(B, l_k)``, and what they add."""
        rest = latent
        for scale, size in enumerate(self.scales):
            rows = features_at(rest, size).flatten(0, 1)
            tokens = self.nearest(rows).unflatten(0, (len(latent), -1))
            added = self.contribution(self.codes(tokens), scale)
            rest = rest - added.detach()  # the codes learn from the losses alone
            yield rows, tokens, added

    def _start(self, batch: int) -> Tensor:
        table = self.embedding.weight
        return table.new_zeros(batch, table.shape[1], *self.scales[-1])
