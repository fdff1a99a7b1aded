"""Keeping a codebook alive: k-means start, moving averages, restarts, and who uses what.

A codebook that is only trained by gradients tends to collapse: few codes are used, most of all at
the coarse scales (a frequent complaint about arXiv:2404.02905, whose training program was never
released). Everything here works on sums over all processes, so all of them hold the same codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genscale import rng
from genscale.autoencoders.quantizer import QuantizeOutput, ScaleQuantizer
from genscale.errors import ConfigError
from genscale.layers.scales import features_at, scale_spans
from genscale.rng import Purpose
from genscale.training.trainable import PictureBatch, all_reduce

_ROWS_A_CODE = 64  # that k-means looks at, at most
USED = 0.08  # a code is in use from this share of an even spread on (arXiv:2404.02905)
_FAST_UPDATES, _FAST, _SLOW = 100, 0.9, 0.99  # decays of the usage statistic


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookSettings:
    """How codes are learned.

    Args:
        learned_by: ``average``: every code is the moving average of the rows it was chosen for
            (arXiv:1711.00937, appendix A); ``gradient``: of the loss mse(f_hat, sg(f)).
        decay: share of the average kept a step; (1 + n) / (10 + n) at step n while that is less.
        kmeans_iterations: of Lloyd's algorithm, where the codes start; 0 leaves them as drawn.
        restart_below: a code chosen less often than this share of an even spread (as a moving
            average) becomes a row that was just seen; 0 restarts none.

    Raises:
        ConfigError: a value out of range.
    """

    learned_by: str = "average"
    decay: float = 0.98
    kmeans_iterations: int = 20
    restart_below: float = 0.05

    def __post_init__(self) -> None:
        if self.learned_by not in ("average", "gradient"):
            raise ConfigError(
                "objective.codebook.learned_by must be average or gradient, but "
                f"'{self.learned_by}' was given."
            )
        if not 0 <= self.decay < 1 or self.kmeans_iterations < 0 or not 0 <= self.restart_below < 1:
            raise ConfigError(
                "objective.codebook.decay and restart_below must be in [0, 1) and "
                f"kmeans_iterations at least 0, but {self.decay}, {self.restart_below} and "
                f"{self.kmeans_iterations} were given. Give e.g. 0.98, 0.05 and 20."
            )


class CodebookKeeper(nn.Module):
    """Statistics of a quantiser in training, and what is done with its codes after every step.

    The usage statistic is the quantiser's own ``hits`` ``(S, V)``: a moving average of how often
    each scale chose each code in a step. It advances once a step, with or without a process group.

    Args:
        quantizer: whose codes are kept; it belongs to the model.
        settings: how.
        seed: of everything drawn.
    """

    updates: Tensor
    sizes: Tensor
    sums: Tensor

    def __init__(self, quantizer: ScaleQuantizer, settings: CodebookSettings, *, seed: int) -> None:
        super().__init__()
        self._held = (quantizer,)  # no submodule: its weights are the model's
        self.settings = settings
        self.seed = seed
        table = quantizer.embedding.weight
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sizes", torch.zeros(len(table)))  # how often chosen in a step
        self.register_buffer("sums", torch.zeros_like(table.detach()))  # of the rows it was for
        self._seen: list[_Seen] = []  # of this step's batches
        self._rows: list[tuple[Tensor, Tensor]] = []  # positions and rows, for k-means

    @property
    def quantizer(self) -> ScaleQuantizer:
        """The quantiser whose codes are kept."""
        return self._held[0]

    @property
    def codes(self) -> Tensor:
        """The codebook ``(V, Cv)``, without gradient."""
        return self.quantizer.embedding.weight.detach()

    @torch.no_grad()
    def collect(self, latents: Tensor, position: Tensor) -> None:
        """Put rows aside for :meth:`start`: what the scales would see, were every row a code.

        Args:
            latents: ``(B, Cv, H, W)``.
            position: ``(B,)`` of the pictures.
        """
        rest, parts = latents.detach(), []
        for scale, size in enumerate(self.quantizer.scales):
            rows = features_at(rest, size)
            parts.append(rows)
            rest = rest - self.quantizer.contribution(rows, scale)
        self._rows.append((position, torch.cat(parts, dim=1)))

    @torch.no_grad()
    def start(self) -> None:
        """Let the codes be the centres of the rows that were put aside, of all processes."""
        position = torch.cat([position for position, _ in self._rows])
        rows = torch.cat([rows for _, rows in self._rows])
        self._rows.clear()
        order = torch.argsort(position := _gathered(position))
        rows = _gathered(rows)[order].flatten(0, 1)
        table = self.codes
        limit = _ROWS_A_CODE * len(table)
        if len(rows) > limit:
            chosen = rng.permutation(rng.key(self.seed, 0, Purpose.CODEBOOK), len(rows))[:limit]
            rows = rows[chosen.to(rows.device)]
        centres = kmeans(
            rows,
            len(table),
            iterations=self.settings.kmeans_iterations,
            key=rng.key(self.seed, 1, Purpose.CODEBOOK),
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(centres, src=0)
        table.copy_(centres)
        self.sizes.fill_(0.0)

    @torch.no_grad()
    def observe(self, quantized: QuantizeOutput, batch: PictureBatch) -> None:
        """Count what a batch chose, and draw from its rows what dead codes may become."""
        table = self.codes
        tokens = quantized.tokens
        rows = torch.cat(
            [rows.view(len(tokens), -1, rows.shape[-1]) for rows in quantized.residuals], dim=1
        )
        parts = self.quantizer.split(tokens)
        hits = torch.stack([_counts(part, len(table)) for part in parts])
        sums = _added(rows.flatten(0, 1), tokens.flatten(), len(table))
        self._seen.append(_Seen(hits, sums, self._candidates(rows, batch)))

    def _candidates(self, rows: Tensor, batch: PictureBatch) -> Tensor:
        """Return one row ``(V, Cv)`` for every code, where this batch has it; zeros elsewhere.

        Every code draws a picture of the whole step, a scale, and a token of it: coarse scales,
        which have few tokens and collapse first, get as many new codes as fine ones. Exactly one
        batch of one process has that picture, so the sum over all of them is the row itself,
        however the step is split.
        """
        device, count = rows.device, len(self.codes)
        spans = torch.tensor(scale_spans(self.quantizer.scales), device=device)
        code = torch.arange(count, device=device)
        keys = rng.key(self.seed, batch.step, code, Purpose.CODEBOOK)
        draws = rng.uniform(keys, (3,))
        picture = (draws[:, 0] * batch.size).long().clamp_(max=batch.size - 1)
        start, end = spans[(draws[:, 1] * len(spans)).long().clamp_(max=len(spans) - 1)].unbind(1)
        token = torch.minimum(start + (draws[:, 2] * (end - start)).long(), end - 1)
        place = torch.full((batch.size,), -1, dtype=torch.int64, device=device)
        own = batch.position - batch.step * batch.size
        place[own] = torch.arange(len(own), device=device)
        row = place[picture]
        return torch.where((row >= 0)[:, None], rows[row.clamp(min=0), token], 0.0)

    @torch.no_grad()
    def end_step(self, finite: Tensor, size: int) -> None:
        """Update codes and statistics from all batches of a step, on all processes alike.

        Args:
            finite: bool ``()``; nothing changes where it is False.
            size: pictures of the step.
        """
        if not self._seen:
            return
        seen = _Seen.total(self._seen)
        self._seen.clear()
        hits, table, settings = self.quantizer.hits, self.codes, self.settings
        first = self.updates == 0
        decay = torch.where(self.updates < _FAST_UPDATES, _FAST, _SLOW)
        averaged = torch.where(first, seen.hits, decay * hits + (1 - decay) * seen.hits)
        hits.copy_(torch.where(finite, averaged, hits))
        even = seen.tokens(size, self.quantizer.scales) / len(table)
        counts = seen.hits.sum(0)
        fresh = first.expand_as(counts)
        sizes = torch.where(fresh, even, self.sizes)
        sums = torch.where(fresh[:, None], even * table, self.sums)
        # short at first: the encoder still moves fast, and codes that it leaves behind start anew
        keep = ((1.0 + self.updates) / (10.0 + self.updates)).clamp(max=settings.decay)
        sizes = keep * sizes + (1 - keep) * counts
        sums = keep * sums + (1 - keep) * seen.sums
        codes = table
        if settings.learned_by == "average":
            codes = torch.where((sizes > 0)[:, None], sums / sizes.clamp(min=1e-12)[:, None], table)
        dead = sizes < settings.restart_below * even
        codes = torch.where(dead[:, None], seen.candidates, codes)
        sums = torch.where(dead[:, None], even * seen.candidates, sums)
        sizes = torch.where(dead, even, sizes)
        for held, new in ((self.sizes, sizes), (self.sums, sums), (table, codes)):
            held.copy_(torch.where(finite, new, held))
        self.updates += finite.long()

    @torch.no_grad()
    def usage(self, size: int) -> Tensor:
        """Return the share of codes that every scale uses: ``(S,)`` in [0, 1].

        Args:
            size: pictures of an optimizer step.
        """
        hits = self.quantizer.hits
        lengths = torch.tensor([h * w for h, w in self.quantizer.scales], device=hits.device)
        threshold = USED * size * lengths / hits.shape[1]
        return (hits >= threshold[:, None]).float().mean(1)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Counts ``(S, V)``, sums of rows ``(V, Cv)`` and candidates ``(V, Cv)`` of batches."""

    hits: Tensor
    sums: Tensor
    candidates: Tensor

    @staticmethod
    def total(parts: Sequence[_Seen]) -> _Seen:
        """Add up the batches of a step, over all processes."""
        stacks = [
            [part.hits for part in parts],
            [part.sums for part in parts],
            [part.candidates for part in parts],
        ]
        added = [torch.stack(stack).sum(0) for stack in stacks]
        flat = all_reduce(torch.cat([tensor.flatten() for tensor in added]))
        pieces = torch.split(flat, [tensor.numel() for tensor in added])
        return _Seen(*(p.view_as(t) for p, t in zip(pieces, added, strict=True)))

    @staticmethod
    def tokens(size: int, scales: Sequence[tuple[int, int]]) -> float:
        """Return how many tokens a step has."""
        return float(size * sum(height * width for height, width in scales))


def _counts(tokens: Tensor, vocab_size: int) -> Tensor:
    return _added(torch.ones(tokens.numel(), device=tokens.device), tokens.flatten(), vocab_size)


def _added(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Return for each of ``count`` places the sum of the rows whose index it is."""
    # not index_add_, whose order of summation is another one in every run on a GPU
    sums = rows.new_zeros(count, *rows.shape[1:])
    return sums.index_put_((index,), rows, accumulate=True)


def _gathered(tensor: Tensor) -> Tensor:
    """Join the tensors of all processes, which have one shape, along the first axis."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def kmeans(rows: Tensor, count: int, *, iterations: int, key: Tensor) -> Tensor:
    """Return ``count`` centres of rows ``(N, C)`` by Lloyd's algorithm; the same for a key.

    Starts at keyed rows, as they come: a start at rows far from one another gives codes to
    outliers, of which the encoder soon makes none. A centre that no row is nearest to becomes one
    of the rows that are farthest from theirs. Of fewer rows than centres, rows are repeated.

    Args:
        rows: at least one.
        count: number of centres.
        iterations: rounds of assignment and averaging.
        key: of the draw; see :func:`genscale.rng.key`.
    """
    order = rng.permutation(key, len(rows)).to(rows.device)
    centres = rows[order[torch.arange(count, device=rows.device) % len(rows)]].clone()
    for _ in range(iterations):
        distances = torch.cdist(rows, centres)
        nearest = distances.min(1)
        sizes = _counts(nearest.indices, count)
        sums = _added(rows, nearest.indices, count)
        far = nearest.values.argsort(descending=True, stable=True)
        # the n-th empty centre takes the n-th farthest row
        rank = (sizes == 0).cumsum(0).sub(1).clamp(min=0, max=len(rows) - 1)
        means = sums / sizes.clamp(min=1)[:, None]
        centres = torch.where((sizes == 0)[:, None], rows[far[rank]], means)
    return centres
