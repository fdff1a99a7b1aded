"""Next-scale decoding as a trajectory: a step is a scale, the state is the running latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.scales import features_at, scale_spans
from genscale.objectives.base import Family, ScaleDecoder
from genscale.rng import Purpose
from genscale.samplers.base import Sampler, State
from genscale.samplers.token_filters import draw_tokens, filter_logits, smooth_weights


class NextScale(Sampler):
    """Draws all tokens of a scale at once, coarse first (arXiv:2404.02905).

    ``evaluate`` asks the network for the logits of the next scale and draws provisional tokens;
    ``.clean`` is the running latent with them, which the tokenizer can decode. ``advance`` keeps
    them, or draws again from the same logits where it is given other noise.

    In ``state.history``: ``tokens`` ``(B, L)`` drawn so far, the rest 0; after ``evaluate`` also
    ``logits`` ``(B, l, V)`` and ``drawn`` ``(B, l)`` of the current scale, l being the size of the
    largest scale; rows behind the scale's own tokens are zeros.

    Args:
        num_scales: S; follows from the model.
        top_k: draw among so many likeliest tokens; 0 draws among all.
        top_p: draw among the likeliest tokens of this total probability; 0 draws among all.
        temperature: divides the guided logits: a number, or one a scale; 0 takes the likeliest.
        smooth: mix codes by Gumbel weights instead of drawing one: pictures that please the eye
            more, and that no score should be computed of.
        smooth_from: first scale that is smoothed.
        smooth_until: first scale that is not smoothed any more; None smooths to the end.
        smooth_filtered: mix only codes that pass ``top_k`` and ``top_p``, as VAR's program does;
            Switti's mixes all.

    Raises:
        ConfigError: an impossible number.
    """

    family: ClassVar[Family] = "scale_wise"

    def __init__(
        self,
        num_scales: int | None = None,
        *,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float | Sequence[float] = 1.0,
        smooth: bool = False,
        smooth_from: int = 0,
        smooth_until: int | None = None,
        smooth_filtered: bool = True,
    ) -> None:
        if num_scales is None or num_scales < 1:
            raise ConfigError(
                f"sampler.num_scales must be the number of a scale-wise model's scales, but is "
                f"{num_scales}. Diffusion models have none: choose another sampler=..."
            )
        if top_k < 0:
            raise ConfigError(f"sampler.top_k must not be negative, but is {top_k}. 0 keeps all.")
        if not 0.0 <= top_p <= 1.0:
            raise ConfigError(f"sampler.top_p must be in [0, 1], but is {top_p}. 0 keeps all.")
        temperatures = (
            tuple(temperature) if isinstance(temperature, Sequence) else (temperature,) * num_scales
        )
        if len(temperatures) != num_scales or not all(0.0 <= t < math.inf for t in temperatures):
            raise ConfigError(
                "sampler.temperature must be a finite number that is not negative, or one for each "
                f"of {num_scales} scales, but is {temperature}. 1 changes nothing."
            )
        self.num_scales = num_scales
        self.top_k = top_k
        self.top_p = float(top_p)
        self.temperatures = tuple(float(t) for t in temperatures)
        self.smooth = smooth
        self.smooth_from = smooth_from
        self.smooth_until = smooth_until
        self.smooth_filtered = smooth_filtered

    @property
    def stochastic(self) -> bool:
        """Whether some scale draws tokens, or mixes codes, at random."""
        return any(self.draws(scale) for scale in range(self.num_scales))

    def draws(self, scale: int) -> bool:
        """Whether a scale draws tokens, or mixes codes, at random."""
        return self._smooths(scale) or (self.top_k != 1 and self.temperatures[scale] > 0.0)

    @property
    def label(self) -> str:
        """The name, and everything that changes the law of the samples."""
        parts = ["NextScale"]
        if self.top_k:
            parts.append(f"top_k {self.top_k}")
        if 0.0 < self.top_p < 1.0:
            parts.append(f"top_p {self.top_p:g}")
        if set(self.temperatures) != {1.0}:
            shown = sorted(set(self.temperatures))
            text = f"{shown[0]:g}" if len(shown) == 1 else str(list(self.temperatures))
            parts.append(f"temperature {text}")
        if self.smooth:
            until = "" if self.smooth_until is None else f" to {self.smooth_until}"
            parts.append(f"smooth from {self.smooth_from}{until}")
        return ", ".join(parts)

    @property
    def num_steps(self) -> int:
        """Number of scales."""
        return self.num_scales

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from scale i to scale j, one branch a call."""
        if not 0 <= i <= j <= self.num_steps:
            raise ValueError(
                f"Scales 0 <= i <= j <= {self.num_steps} were expected, but i={i} and j={j} were "
                "given."
            )
        return j - i

    def noise_shape(self, model: ScaleDecoder) -> tuple[int, ...]:
        """Return ``(L,)``: a number a token."""
        return (sum(height * width for height, width in model.scales),)

    def start_noise(self, model: ScaleDecoder, seeds: Tensor) -> Tensor:
        """Return the noise ``(B, L)`` of all scales that trajectories of these seeds draw."""
        steps = enumerate(scale_spans(model.scales))
        lineage = torch.zeros_like(seeds)
        return torch.cat(
            [self._keyed(model, seeds, lineage, scale, end - at) for scale, (at, end) in steps], 1
        )

    def step_noise(self, model: ScaleDecoder, state: State) -> Tensor:
        """Return the noise ``(B, l)`` of the scale at hand.

        Where particles stand at different scales, l is the size of the largest, and the rows of
        smaller ones are longer than need be.
        """
        spans = scale_spans(model.scales)
        rows = state.step.clamp(max=self.num_scales - 1)
        length = max(spans[scale][1] - spans[scale][0] for scale in rows.unique().tolist())
        if "noise" not in state.history:
            return self._keyed(model, state.seeds, state.lineage, state.step, length)
        given = F.pad(state.history["noise"], (0, length))
        first = torch.tensor([at for at, _ in spans])[rows]
        places = first[:, None] + torch.arange(length)
        return given.gather(1, places.to(given.device))

    def start(
        self,
        model: ScaleDecoder,
        cond: Conditioning,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Begin at an empty running latent.

        Args:
            model: the view; its memory begins here.
            cond: conditions of B samples (no fields at all for an unconditional model).
            seeds: ``(B,)`` int64.
            noise: ``(B, L)`` unit normal, a number for every token of all scales; None draws them
                scale by scale from seeds and lineage.

        Raises:
            ConfigError: a model of another number of scales.
            ValueError: numbers of seeds, conditions and noises that differ.
        """
        if len(model.scales) != self.num_scales:
            raise ConfigError(
                f"sampler.num_scales is {self.num_scales}, but the model has {len(model.scales)} "
                "scales. Leave it to the model's config."
            )
        seeds = seeds.to(device="cpu", dtype=torch.int64)
        count = len(seeds)
        if len(cond) not in (0, count) or (noise is not None and len(noise) != count):
            raise ValueError(
                f"{count} seeds were given with {len(cond)} conditions and "
                f"{count if noise is None else len(noise)} noises. Give one of each a sample."
            )
        cond = cond.to(model.device)
        zero = torch.zeros(count, dtype=torch.int64, device="cpu")
        length = self.noise_shape(model)[0]
        history = {"tokens": torch.zeros(count, length, dtype=torch.int64, device=model.device)}
        if noise is not None:
            history["noise"] = noise.to(device=model.device, dtype=torch.float32)
        return State(
            x=torch.zeros(count, *model.sample_shape, device=model.device),
            cond=cond,
            step=zero,
            seeds=seeds,
            lineage=zero.clone(),
            group=torch.arange(count, device="cpu"),
            nfe=zero.double(),
            history=history,
            memory=model.begin(cond, count),
        )

    def edit(self, state: State, tokens: Tensor, keep: Tensor) -> State:
        """Return a state that keeps given tokens and draws the others: in-painting, class editing.

        Args:
            state: at its start.
            tokens: ``(B, L)`` of the picture to edit.
            keep: ``(B, L)`` bool, true where a token is kept; see :func:`keep_tokens`.
        """
        known = {"known": tokens.to(state.x.device), "keep": keep.to(state.x.device)}
        return state.replace(history={**state.history, **known})

    def evaluate(self, model: ScaleDecoder, state: State) -> State:
        """Set ``.clean``, ``logits`` and ``drawn``; finished particles have their own x."""
        if state.clean is not None:
            return state
        largest = max(height * width for height, width in model.scales)
        blank = {
            "logits": state.x.new_zeros(len(state), largest, model.vocab_size),
            "drawn": state.history["tokens"].new_zeros(len(state), largest),
        }
        state = state.replace(
            clean=state.x, pending=state.memory, history={**state.history, **blank}
        )
        return self._in_groups(state, lambda part, index: self._evaluate(model, part))

    def advance(self, model: ScaleDecoder, state: State, noise: Tensor | None = None) -> State:
        """Take one scale in all particles that have one left.

        Args:
            model: the view.
            state: evaluated first if need be.
            noise: ``(B, l)`` unit normal, l at least the size of the current scale: draw again
                with it. None keeps the provisional tokens.
        """
        if not bool((state.step < self.num_scales).any()):
            return state
        state = self.evaluate(model, state)
        rows = None if noise is None else noise.to(state.x)

        def take(part: State, index: Tensor) -> State:
            if rows is None:
                return self._commit(model, part, part.history["drawn"], part.clean)
            drawn, latent = self._draw(model, part, rows[index.to(rows.device)])
            return self._commit(model, part, drawn, latent)

        state = self._in_groups(state, take)
        left = {
            name: value for name, value in state.history.items() if name not in ("logits", "drawn")
        }
        return state.replace(clean=None, memory=state.pending, pending=None, history=left)

    def commit(
        self, model: ScaleDecoder, state: State, tokens: Tensor, codes: Tensor | None = None
    ) -> State:
        """Advance with given tokens: other draws than ours, or teacher forcing.

        Args:
            model: the view.
            state: all particles at one scale.
            tokens: ``(B, l)`` of that scale.
            codes: ``(B, l, Cv)`` to add instead of the tokens' own.
        """
        state = self.evaluate(model, state)
        scale = _scale_of(state)
        if codes is None:
            codes = model.tokenizer.codes(tokens)
        latent = model.tokenizer.add_scale(state.x, codes, scale)[0]
        drawn = _padded(tokens, state.history["drawn"].shape[1])
        forced = {**state.history, "drawn": drawn}
        return self.advance(model, state.replace(clean=latent, history=forced))

    def finish(self, state: State) -> Tensor:
        """Return the running latents after all scales.

        Raises:
            ValueError: a particle has scales left.
        """
        left = self.num_scales - int(state.step.min())
        if left:
            raise ValueError(
                f"A particle has {left} of {self.num_scales} scales left. Advance it until "
                "state.step is sampler.num_steps."
            )
        return state.x

    def _evaluate(self, model: ScaleDecoder, state: State) -> State:
        scale = _scale_of(state)
        features = features_at(state.x, model.scales[scale])
        prediction = model(features, scale, state.cond, state.memory)
        logits = _padded(prediction.logits, state.history["logits"].shape[1])
        state = state.replace(
            history={**state.history, "logits": logits},
            # keys and values were written in place: what was there before is not read again
            memory=prediction.memory,
            pending=prediction.memory,
            nfe=state.nfe + prediction.cost,
        )
        drawn, latent = self._draw(model, state, None)
        return state.replace(clean=latent, history={**state.history, "drawn": drawn})

    def _draw(
        self, model: ScaleDecoder, state: State, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return tokens ``(B, l_max)`` drawn from the logits, and the latent they lead to."""
        scale = _scale_of(state)
        start, end = scale_spans(model.scales)[scale]
        count = end - start
        raw = state.history["logits"][:, :count]
        temperature = self.temperatures[scale]
        scaled = raw if temperature in (0.0, 1.0) else raw / temperature
        filtered = filter_logits(scaled, self.top_k, self.top_p)
        if temperature == 0.0 or self.top_k == 1:
            tokens = filtered.argmax(dim=-1)
        else:
            tokens = draw_tokens(filtered, self._noise(model, state, start, end, noise))
        if "keep" in state.history:
            known, keep = (state.history[name][:, start:end] for name in ("known", "keep"))
            tokens = torch.where(keep, known, tokens)
        codes = model.tokenizer.codes(tokens)
        if self._smooths(scale):
            mixed = self._mix(model, state, filtered if self.smooth_filtered else scaled)
            if "keep" in state.history:
                mixed = torch.where(keep[..., None], codes, mixed)
            codes = mixed
        latent = model.tokenizer.add_scale(state.x, codes, scale)[0]
        return _padded(tokens, state.history["drawn"].shape[1]), latent

    def _noise(
        self, model: ScaleDecoder, state: State, start: int, end: int, noise: Tensor | None
    ) -> Tensor:
        """Return the unit noise ``(B, end - start)`` of a scale: given now, at start, or keyed."""
        if noise is not None:
            return noise[:, : end - start]
        if "noise" in state.history:
            return state.history["noise"][:, start:end]
        return self._keyed(model, state.seeds, state.lineage, state.step, end - start)

    def _keyed(
        self, model: ScaleDecoder, seeds: Tensor, lineage: Tensor, step: int | Tensor, count: int
    ) -> Tensor:
        """Draw the first ``count`` numbers of a scale's own noise; they do not depend on it."""
        keys = rng.key(seeds, lineage, step, Purpose.STEP)
        return rng.normal(keys.to(model.device, non_blocking=True), (count,))

    def _smooths(self, scale: int) -> bool:
        until = self.num_scales if self.smooth_until is None else self.smooth_until
        return self.smooth and self.smooth_from <= scale < until

    def _mix(self, model: ScaleDecoder, state: State, logits: Tensor) -> Tensor:
        """Return codes mixed by Gumbel weights ``(B, l, Cv)``."""
        keys = rng.key(state.seeds, state.lineage, state.step, Purpose.SMOOTH)
        uniform = rng.uniform(keys.to(logits.device, non_blocking=True), tuple(logits.shape[1:]))
        gumbel = -torch.log(-torch.log(uniform.clamp_min(2.0**-54))).to(logits.dtype)
        progress = _scale_of(state) / max(self.num_scales - 1, 1)
        codebook = model.tokenizer.codes(torch.arange(model.vocab_size, device=logits.device)[None])
        return smooth_weights(logits, gumbel, progress) @ codebook[0]

    def _commit(
        self, model: ScaleDecoder, state: State, drawn: Tensor, latent: Tensor | None
    ) -> State:
        assert latent is not None
        start, end = scale_spans(model.scales)[_scale_of(state)]
        tokens = state.history["tokens"].clone()
        tokens[:, start:end] = drawn[:, : end - start]
        return state.replace(
            x=latent, step=state.step + 1, history={**state.history, "tokens": tokens}
        )

    def _in_groups(self, state: State, move: Callable[[State, Tensor], State]) -> State:
        """Move particles of one scale together; those that have finished stay."""
        scale = state.shared_step
        everyone = torch.arange(len(state), device="cpu")
        if scale is not None:
            return state if scale >= self.num_scales else move(state, everyone)
        before = state.step  # those that have moved must not move again
        for scale in before.unique().tolist():
            if scale < self.num_scales:
                index = everyone[before == scale]
                state = state.put(index, move(state.select(index), index))
        return state


def keep_tokens(mask: Tensor, scales: Sequence[tuple[int, int]]) -> Tensor:
    """Return which tokens of all scales a mask over the picture keeps.

    Args:
        mask: ``(B, H, W)``, 1 where the picture is kept; at any resolution.
        scales: height and width of every scale.

    Returns:
        ``(B, L)`` bool: where the mask, resized to the scale bilinearly, is above a half. Scales of
        3 tokens or fewer are kept whole, as VAR's program does.
    """
    kept = []
    for height, width in scales:
        if height * width <= 3:
            kept.append(torch.ones(len(mask), height * width, dtype=torch.bool, device=mask.device))
            continue
        resized = F.interpolate(
            mask[:, None].float(), (height, width), mode="bilinear", align_corners=False
        )
        kept.append(resized.flatten(1) > 0.5)
    return torch.cat(kept, dim=1)


def _scale_of(state: State) -> int:
    scale = state.shared_step
    if scale is None:
        raise ValueError(
            "The particles stand at different scales. Select those of one scale first."
        )
    return scale


def _padded(rows: Tensor, length: int) -> Tensor:
    """Append zeros along axis 1 up to ``length``."""
    missing = length - rows.shape[1]
    if missing == 0:
        return rows
    return torch.cat((rows, rows.new_zeros(len(rows), missing, *rows.shape[2:])), dim=1)
