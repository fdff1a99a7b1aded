"""How many candidates live at each step of TTS-VAR, and where they are selected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genscale.errors import ConfigError
from genscale.search.cost import StepCosts

Kind = Literal["cluster", "resample"]

SHAPE = (8, 6, 4, 2, 1)  # candidates a returned sample, as published: 8 begin, 6, 4, 2 and 1 stay
CLUSTER_AT = (4 / 64, 12 / 64)  # resolutions of the published scales 2 and 5, over the last one's
RESAMPLE_AT = (16 / 64, 32 / 64)  # and of the scales 6 and 9
# earlier than this part of all scales a selection knows too little, whatever the resolution; the
# published places obey both
_CLUSTER_FROM = 0.15
_RESAMPLE_FROM = 0.4


@dataclass(frozen=True, slots=True)
class Selection:
    """One selection: after ``step`` was evaluated, ``kept`` candidates a prompt stay."""

    step: int
    kind: Kind
    kept: int


@dataclass(frozen=True, slots=True)
class CandidateSchedule:
    """How many candidates begin, and what becomes of them.

    Attributes:
        begin: candidates at the start.
        selections: in the order of their steps.
    """

    begin: int
    selections: tuple[Selection, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Candidates at the start and after each selection."""
        return (self.begin, *(selection.kept for selection in self.selections))

    def before(self, number: int) -> int:
        """Return how many candidates selection ``number`` chooses from."""
        return self.counts[number]

    def evaluations(self, costs: StepCosts) -> float:
        """Return the network evaluations a prompt.

        A step is evaluated by those alive before its selection and taken by those after it.
        """
        alive, total = self.begin, 0.0
        kept = {selection.step: selection.kept for selection in self.selections}
        for step in range(len(costs)):
            total += alive * float(costs.evaluate[step])
            alive = kept.get(step, alive)
            total += alive * float(costs.advance[step])
        return total

    def with_begin(self, begin: int) -> CandidateSchedule:
        """Return a schedule of the same shape that begins with another number of candidates."""
        return CandidateSchedule(
            begin,
            tuple(
                Selection(each.step, each.kind, max(1, begin * each.kept // self.begin))
                for each in self.selections
            ),
        )


def published_resampling(resolutions: Sequence[float]) -> tuple[int, ...]:
    """Return where TTS-VAR resamples, mapped to other scales.

    That is at the first scale of each published relative resolution, but not within the first
    40 % of all scales, nor at the last one.

    Args:
        resolutions: of every scale over the last one's, ascending.
    """
    return _mapped(RESAMPLE_AT, _RESAMPLE_FROM, resolutions)


def published_clusters(resolutions: Sequence[float], resample: Sequence[int]) -> tuple[int, ...]:
    """Return where TTS-VAR clusters, mapped to other scales: before all resampling.

    That is at the first scale of each published relative resolution, but not within the first
    15 % of all scales.

    Args:
        resolutions: of every scale over the last one's, ascending.
        resample: the steps of resampling; a cluster that would come there or later is left out.
    """
    last = min(resample, default=len(resolutions))
    steps = _mapped(CLUSTER_AT, _CLUSTER_FROM, resolutions)
    return tuple(step for step in steps if step < last)


def _mapped(at: Sequence[float], least: float, resolutions: Sequence[float]) -> tuple[int, ...]:
    count = len(resolutions)
    if count < 2:
        return ()
    first = math.ceil(least * count)
    places = {min(max(_first(resolutions, each), first), count - 2) for each in at}
    return tuple(sorted(places))


def steps_of(
    places: Sequence[int | float], resolutions: Sequence[float], setting: str
) -> tuple[int, ...]:
    """Return the steps that a setting names.

    Args:
        places: whole numbers are steps; fractions in (0, 1) are resolutions over the last one's,
            or shares of a diffusion trajectory, and name the first step that has reached them.
        resolutions: of every step, ascending, the last one 1.
        setting: what the sentence calls it.

    Raises:
        ConfigError: a step that does not exist, or is the last, behind which nothing is left to
            sample; or one named twice.
    """
    count, found = len(resolutions), []
    for at in places:
        whole = isinstance(at, int) and not isinstance(at, bool)
        step = int(at) if whole else _first(resolutions, float(at))
        if (not whole and not 0.0 < at < 1.0) or not 0 <= step < count - 1:
            raise ConfigError(
                f"search.{setting} must name steps 0 to {count - 2} of the model's {count}, or "
                f"fractions between 0 and 1, but has {at}. After the last step there is nothing "
                "left to select for."
            )
        found.append(step)
    if len(set(found)) < len(found):
        raise ConfigError(
            f"search.{setting} must name different steps, but {list(places)} are the steps {found} "
            "of this model. Leave one out."
        )
    return tuple(sorted(found))


def shaped(
    cluster: Sequence[int], resample: Sequence[int], counts: Sequence[int] | None, num_steps: int
) -> CandidateSchedule:
    """Return the schedule of given selections.

    Args:
        cluster: steps at which candidates are clustered.
        resample: steps at which they are resampled.
        counts: candidates at the start and after each selection, or after each of all steps as
            the paper writes them; None reads :data:`SHAPE` at even spaces.
        num_steps: S.

    Raises:
        ConfigError: a step in both, or counts that do not fit.
    """
    both = sorted(set(cluster) & set(resample))
    if both:
        raise ConfigError(
            f"A step is for clusters or for resampling, but step {both[0]} is in both "
            "search.cluster_scales and search.resample_scales. Leave it out of one."
        )
    kinds: dict[int, Kind] = dict.fromkeys(cluster, "cluster")
    kinds |= dict.fromkeys(resample, "resample")
    steps = sorted(kinds)
    if counts is None:
        last = len(SHAPE) - 1
        begin, *kept = [SHAPE[round(i * last / max(len(steps), 1))] for i in range(len(steps) + 1)]
    else:
        begin, *kept = _checked(counts, steps, num_steps)
    return CandidateSchedule(
        begin,
        tuple(Selection(step, kinds[step], n) for step, n in zip(steps, kept, strict=True)),
    )


def _checked(counts: Sequence[int], steps: Sequence[int], num_steps: int) -> list[int]:
    """Return candidates at the start and after each selection."""
    given, stages = list(counts), len(steps) + 1
    if len(given) == num_steps and len(given) != stages:
        changes = [k for k in range(1, num_steps) if given[k] != given[k - 1]]
        stray = [k for k in changes if k not in steps]
        if stray:
            raise ConfigError(
                f"search.batch_schedule changes at scale {stray[0]}, where nothing is selected: "
                f"selections are at {list(steps)}. Change it there, or name the scale in "
                "search.cluster_scales or search.resample_scales."
            )
        given = [given[0], *(given[k] for k in steps)]
    if len(given) != stages:
        raise ConfigError(
            f"search.batch_schedule must have {stages} numbers, candidates at the start and after "
            f"each of {stages - 1} selections, or {num_steps}, one a step, but has {len(given)}. "
            "null takes the published shape."
        )
    if given[-1] < 1 or any(one < other for one, other in itertools.pairwise(given)):
        raise ConfigError(
            "search.batch_schedule must hold whole numbers of at least 1 that do not rise, but is "
            f"{list(counts)}. Give e.g. [8, 6, 4, 2, 1]."
        )
    return given


def _first(resolutions: Sequence[float], at: float) -> int:
    """Return the first step that has reached a resolution."""
    return next((k for k, each in enumerate(resolutions) if each >= at - 1e-9), len(resolutions))
