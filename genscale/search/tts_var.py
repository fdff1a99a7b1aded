"""TTS-VAR: many candidates at coarse scales, few at fine ones (arXiv:2507.18537)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError, did_you_mean
from genscale.metrics.features import FeatureNetwork
from genscale.rewards.base import Reward
from genscale.rng import Purpose
from genscale.samplers.base import Sampler, State
from genscale.search.base import Search
from genscale.search.candidate_schedule import (
    CandidateSchedule,
    Selection,
    published_clusters,
    published_resampling,
    shaped,
    steps_of,
)
from genscale.search.diversity import Diversity, FeatureMode, FeatureName
from genscale.search.engine import Engine
from genscale.search.resampling import effective_size, resample, uniforms_needed
from genscale.search.scorer import Scores, best_first

ResamplingScheme = Literal["systematic", "multinomial", "top"]
_POTENTIALS = ("value", "diff", "sum", "max", "topk_2", "topk_3")


class TTSVAR(Search):
    """Keeps differing candidates at coarse scales, and those of high reward at middle ones.

    Steps are cheap at first, so that many candidates may begin. At cluster scales one of each
    cluster of pictures stays (see :class:`~genscale.search.diversity.Diversity`); rewards of such
    coarse pictures would mislead. At resampling scales candidates live on in proportion to
    ``exp(strength potential)``, the potential being a function of a candidate's own rewards so
    far. A selection chooses among the candidates of one prompt after a step's evaluation; what is
    decoded is what a selection looks at, and the final pictures.

    On diffusion models a scale is a step of the sampler, its resolution the share of the
    trajectory, and nothing is clustered by default.

    Args:
        batch_schedule: candidates at the start and after each selection, or after each scale as
            the paper writes them; None is the published shape, 8, 6, 4, 2, 1, at even spaces where
            the selections are not four.
        samples: that many times the schedule, the most; a budget that does not reach so far gets
            fewer candidates in the same proportions. None takes as many as the budget allows.
        cluster_scales: numbers of scales, or fractions of the last one's resolution; None maps
            the published ones.
        resample_scales: likewise.
        features: what clusters look at: ``pixel``, ``latent`` or a network of
            :mod:`genscale.metrics`.
        feature_mode: what becomes of a map of features; see
            :class:`~genscale.search.diversity.Diversity`.
        potential: of the rewards r_1 .. r_k of a candidate: ``value`` r_k, ``diff``
            r_k - r_(k-1), ``sum``, ``max``, or ``topk_n``, the sum of the n largest.
        strength: lambda, at least 0; 0 keeps the first candidates, inf only the best.
        scheme: ``systematic``: as often as the weight says, but for rounding; ``multinomial``, as
            published: independent draws, of which few candidates survive; ``top``: those of the
            highest potential, once each.

    Raises:
        ConfigError: an impossible setting.
    """

    grows: ClassVar[str | None] = "samples"

    def __init__(
        self,
        batch_schedule: Sequence[int] | None = None,
        *,
        samples: int | None = 1,
        cluster_scales: Sequence[int | float] | None = None,
        resample_scales: Sequence[int | float] | None = None,
        features: FeatureName | FeatureNetwork = "pixel",
        feature_mode: FeatureMode | None = None,
        potential: str = "value",
        strength: float = 10.0,
        scheme: ResamplingScheme = "systematic",
    ) -> None:
        if samples is not None and samples < 1:
            raise ConfigError(
                f"search.samples must be at least 1, but is {samples}. null takes as many as the "
                "budget allows."
            )
        if not strength >= 0.0:
            raise ConfigError(
                f"search.strength must not be negative, but is {strength}. 0 ignores the reward "
                "until the end."
            )
        if scheme not in get_args(ResamplingScheme):
            raise ConfigError(
                f"search.scheme must be one of {', '.join(get_args(ResamplingScheme))}, but is "
                f"'{scheme}'.{did_you_mean(scheme, get_args(ResamplingScheme))}"
            )
        _parsed(potential)
        self.batch_schedule = None if batch_schedule is None else tuple(batch_schedule)
        self.samples = samples
        self.cluster_scales = cluster_scales
        self.resample_scales = resample_scales
        self.diversity = Diversity(features, feature_mode)
        self.potential = potential
        self.strength = float(strength)
        self.scheme: ResamplingScheme = scheme

    @property
    def label(self) -> str:
        """The name, and what changes its results."""
        counts = "published" if self.batch_schedule is None else list(self.batch_schedule)
        times = "budget" if self.samples is None else self.samples
        places = [
            "published" if each is None else list(each)
            for each in (self.cluster_scales, self.resample_scales)
        ]
        return (
            f"TTSVAR({times} x {counts}, clusters {places[0]} of {self.diversity.label}, "
            f"resampling {places[1]} {self.scheme} {self.potential} x {self.strength:g})"
        )

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Return a sentence for everything that keeps this search from this sampler and reward."""
        found = super().problems(sampler, reward)
        found = found or self._misfit(sampler)
        if found:
            return found
        if self._clusters(sampler):
            found += self.diversity.check()
        if not self._resamples:
            return found
        if self.scheme != "top" and not sampler.stochastic:
            found.append(
                f"search TTSVAR copies candidates, which stay equal where a sampler draws no "
                f"noise, but {sampler.label} is deterministic with these settings. Use "
                "search.scheme=top, which copies none, or a sampler that draws noise."
            )
        ranks = self.scheme == "top" and self.potential == "value"
        if reward is not None and not reward.potential and not ranks:
            found.append(
                f"search TTSVAR weighs candidates by exp(lambda reward), but {reward.label} ranks "
                "them among each other. Use search.scheme=top search.potential=value, or choose a "
                "reward with values of its own."
            )
        return found

    @property
    def _resamples(self) -> bool:
        """Whether rewards decide before the end."""
        return self.resample_scales is None or len(self.resample_scales) > 0

    def _clusters(self, sampler: Sampler) -> bool:
        if self.cluster_scales is None:
            return sampler.family == "scale_wise"
        return len(self.cluster_scales) > 0

    # ------------------------------------------------------------------ the schedule

    def schedule(self, engine: Engine) -> CandidateSchedule:
        """Return how many candidates live when, within the budget.

        Raises:
            ConfigError: scales or numbers that do not fit the model, or neither a number of
                samples nor a budget.
        """
        whole = self._whole(engine.sampler, engine.model)
        if self.samples is None and (engine.budget.nfe, engine.budget.reward_calls) == (None, None):
            raise ConfigError(
                "The search has no end: neither search.samples nor a budget of evaluations or "
                "rewards was given. Give search.samples=1 or budget.nfe=..., say."
            )
        return self._within_budget(whole, engine)

    def _whole(self, sampler: Sampler, model: Any) -> CandidateSchedule:
        """Return the schedule that no budget cuts down; samples are counted later."""
        steps = sampler.num_steps
        resolutions = [(step + 1) / steps for step in range(steps)]
        if sampler.family == "scale_wise" and model is not None:
            sides = [height for height, _ in model.scales]
            resolutions = [side / sides[-1] for side in sides]
        if self.resample_scales is None:
            resampled = published_resampling(resolutions)
        else:
            resampled = steps_of(self.resample_scales, resolutions, "resample_scales")
        if self.cluster_scales is not None:
            clusters = steps_of(self.cluster_scales, resolutions, "cluster_scales")
        elif self._clusters(sampler):
            clusters = published_clusters(resolutions, resampled)
        else:
            clusters = ()
        return shaped(clusters, resampled, self.batch_schedule, steps)

    def _misfit(self, sampler: Sampler) -> list[str]:
        """Return why the schedule does not fit, as far as the sampler alone can tell.

        It knows no resolutions of scales; what depends on them is told when the search begins.
        """
        given = (self.cluster_scales, self.resample_scales)
        told = all(each is not None and all(isinstance(k, int) for k in each) for each in given)
        if sampler.family == "diffusion" or told:
            try:
                self._whole(sampler, None)
            except ConfigError as error:
                return [str(error)]
        return []

    def _within_budget(self, whole: CandidateSchedule, engine: Engine) -> CandidateSchedule:
        """Return the largest schedule of a shape that every prompt can pay."""

        def affords(begin: int) -> bool:
            plan = whole.with_begin(begin)
            nfe, rewards = plan.evaluations(engine.costs), float(self.rewards(plan))
            return engine.affords(nfe=nfe, rewards=rewards) > 0

        if self.samples is None:
            low = 1
            while affords(2 * low):
                low *= 2
            high = 2 * low
        else:
            low, high = 1, self.samples * whole.begin + 1
            if affords(high - 1):
                return whole.with_begin(high - 1)
        while high - low > 1:  # low can be paid, high cannot
            middle = (low + high) // 2
            low, high = (middle, high) if affords(middle) else (low, middle)
        return whole.with_begin(low)

    def rewards(self, schedule: CandidateSchedule) -> int:
        """Return how many pictures of a prompt are judged."""
        looked_at = sum(
            schedule.before(number)
            for number, selection in enumerate(schedule.selections)
            if self._scores(selection, schedule.before(number))
        )
        return looked_at + schedule.counts[-1]

    def decodes(self, schedule: CandidateSchedule) -> int:
        """Return how many latents of a prompt are made pictures."""
        clustered = sum(
            schedule.before(number)
            for number, selection in enumerate(schedule.selections)
            if selection.kind == "cluster" and schedule.before(number) > selection.kept
        )
        return self.rewards(schedule) + (clustered if self.diversity.needs_images else 0)

    def _scores(self, selection: Selection, before: int) -> bool:
        return selection.kind == "resample" and before > 1 and self.strength > 0.0

    # ------------------------------------------------------------------ the search

    def explore(self, engine: Engine) -> dict[str, Tensor]:
        """Begin with many, select on the way, finish the rest."""
        schedule = self.schedule(engine)
        state = engine.start(schedule.begin)
        engine.record("start", state)
        history = torch.zeros(len(state), 0, dtype=torch.float64)  # rewards, a candidate each
        sizes = []
        for number, selection in enumerate(schedule.selections):
            before = schedule.before(number)
            if before == 1 or (selection.kind == "cluster" and selection.kept == before):
                continue
            state = engine.evaluate(engine.run(state, until=selection.step))
            if selection.kind == "cluster":
                index = self._representatives(engine, state, selection)
            elif not self._scores(selection, before):
                index = _first_of_each(engine.num_prompts, before, selection.kept)
            else:
                scores = engine.preview(state)
                history = torch.cat((history, scores.value[:, None]), dim=1)
                index, size = self._survivors(engine, scores, history, selection)
                sizes.append(size)
            known = history[index, -1] if history.shape[1] else None
            state, history = engine.branch(state, index), history[index]
            event = "keep" if selection.kind == "cluster" else "resample"
            engine.record(event, state, parents=index, value=known)
        state = engine.run(state)
        scores = engine.finish(state)
        engine.record("finish", state, parents=torch.arange(len(state)), value=scores.value)
        counts = torch.tensor(schedule.counts).expand(engine.num_prompts, -1)
        found = {"candidates": counts}
        return {**found, "effective_size": torch.stack(sizes, dim=1)} if sizes else found

    def _representatives(self, engine: Engine, state: State, selection: Selection) -> Tensor:
        """Return the rows of one candidate of each cluster."""
        assert state.clean is not None
        inputs = state.clean
        if self.diversity.needs_images:
            inputs = engine.decode(state.clean, state.group)
        tokens = torch.cat(
            engine.each(len(inputs), "features", lambda rows: self.diversity.tokens(inputs[rows]))
        )
        return self.diversity.choose(
            tokens, state.group, engine.seeds, selection.step, selection.kept
        )

    def _survivors(
        self, engine: Engine, scores: Scores, history: Tensor, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """Return the rows that live on, and each prompt's effective sample size."""
        prompts, kept = engine.num_prompts, selection.kept
        values = _without_rounding(potential(history, self.potential).view(prompts, -1))
        if self.scheme == "top":
            ranked = engine.scorer.compare(scores) if self.potential == "value" else values.view(-1)
            rows = best_first(ranked, scores.group, kept).view(prompts, kept).sort(dim=1).values
            weights = particle_weights(values, self.strength)
            return rows.view(-1), effective_size(weights.log())
        weights = particle_weights(values, self.strength)
        keys = rng.key(engine.seeds, selection.step, Purpose.RESAMPLE)
        uniforms = rng.uniform(keys, (uniforms_needed(self.scheme, values.shape[1], kept),))
        ancestors = resample(weights, uniforms, self.scheme, kept)
        first = torch.arange(prompts)[:, None] * values.shape[1]
        return (first + ancestors).view(-1), effective_size(weights.log())


def potential(history: Tensor, kind: str) -> Tensor:
    """Return what a candidate is weighed by ``(n,)``; -inf where its last reward is not valid.

    Args:
        history: ``(n, k)`` float64 rewards of a candidate and its ancestors, in order; -inf where
            one was not valid, which then counts for nothing.
        kind: ``value``, ``diff``, ``sum``, ``max`` or ``topk_n``.
    """
    name, largest = _parsed(kind)
    last = history[:, -1]
    known = history > -torch.inf
    if name == "value" or history.shape[1] == 1:
        return last
    if name == "diff":
        found = last - history[:, -2].where(known[:, -2], 0.0)
    elif name == "max":
        found = history.amax(dim=1)
    else:
        count = history.shape[1] if name == "sum" else min(largest, history.shape[1])
        best = history.topk(count, dim=1).values
        found = best.where(best > -torch.inf, 0.0).sum(dim=1)
    return found.where(known[:, -1], -torch.inf)


def particle_weights(potentials: Tensor, strength: float) -> Tensor:
    """Return ``(G, N)`` float64 weights exp(strength potential) of each prompt, which sum to 1.

    Args:
        potentials: ``(G, N)``; -inf has no weight.
        strength: lambda; inf weighs the best alone.
    """
    top = potentials.amax(dim=1, keepdim=True)
    below = torch.where(potentials == top, 0.0, potentials - top)  # the best: 0 even of -inf
    scaled = torch.where(below == 0.0, 0.0, strength * below)
    weights = guarded_weights(scaled.double().exp())
    return weights / weights.sum(dim=1, keepdim=True)


def _without_rounding(values: Tensor) -> Tensor:
    """Round numbers ``(G, N)`` to 16 binary places of each prompt's largest, or of 1.

    Coarse pictures are often equal, and rewards of equal ones differ in their last digits from
    batch to batch: they must tie.
    """
    largest = values.where(values.isfinite(), 0.0).abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    place = torch.exp2(largest.log2().ceil() - 16)
    return (values / place).round() * place


def guarded_weights(weights: Tensor) -> Tensor:
    """Return ``(G, N)`` weights that can be drawn from, a prompt a row; TTS-VAR's four guards.

    In this order: where none is positive, those that are count alike; where one is NaN, the others
    count alike; where one is infinite, the infinite ones do; where the sum is still nothing, all
    do.
    """

    def where(condition: Tensor, then: Tensor) -> Tensor:
        return torch.where(condition.expand_as(weights), then.to(weights.dtype), weights)

    weights = where((weights <= 0).all(dim=1, keepdim=True), weights > 0)
    lost = weights.isnan()
    weights = where(lost.any(dim=1, keepdim=True), ~lost)
    huge = weights.isinf()
    weights = where(huge.any(dim=1, keepdim=True), huge)
    return where(weights.sum(dim=1, keepdim=True) <= 0, torch.ones_like(weights))


def _parsed(kind: str) -> tuple[str, int]:
    """Return the name of a potential, and of ``topk_n`` its number."""
    found = re.fullmatch(r"topk_([1-9]\d*)", str(kind))
    if found:
        return "topk", int(found[1])
    if kind not in _POTENTIALS:
        raise ConfigError(
            f"search.potential must be value, diff, sum, max or topk_n with a whole number n, but "
            f"is '{kind}'.{did_you_mean(str(kind), _POTENTIALS)}"
        )
    return kind, 0


def _first_of_each(prompts: int, before: int, kept: int) -> Tensor:
    """Return the first rows of each prompt."""
    return (torch.arange(prompts)[:, None] * before + torch.arange(kept)).view(-1)
