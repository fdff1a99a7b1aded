"""Searches on the command line: built from the config, watched while they run, and told."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from genscale.cli.app import instantiate
from genscale.cli.numbers import number_problems
from genscale.cli.progress import track
from genscale.conditioning.labels import LabelLaw, labels_for
from genscale.errors import ConfigError
from genscale.pipeline import Generated, GenerationPipeline
from genscale.rewards.base import Request, Reward
from genscale.rewards.frames import FrameReward
from genscale.search.base import Search
from genscale.search.budget import Budget
from genscale.search.engine import Engine
from genscale.search.plain import PlainSampling
from genscale.search.setup import SearchSetup, requests_of

_LOOKED_AT = 10_000  # requests of a set that are checked before it is made
_EVERY = 10.0  # seconds between lines where there is no terminal


def search_setup(cfg: DictConfig, pipeline: GenerationPipeline) -> SearchSetup | None:
    """Build the search that a command line asks for; None where it asks for none.

    Rewards that learn from data are fitted to the run's own.

    Raises:
        ConfigError: parts that are missing or do not fit, a sentence each.
    """
    search = instantiate(cfg.search, "search")
    budget = Budget(**{name: cfg.budget[name] for name in ("nfe", "reward_calls", "seconds")})
    if not cfg.reward.get("_target_"):
        _refuse_without_reward(cfg, search, budget)
        return None
    return build_setup(cfg, search, pipeline, budget)


def build_setup(
    cfg: DictConfig,
    search: Search,
    pipeline: GenerationPipeline,
    budget: Budget | None = None,
) -> SearchSetup:
    """Put a search and the rewards of a command line together.

    Args:
        cfg: with ``reward``, ``held_out``, ``reward_frames``, ``same_reward``, ``micro_batch``
            and ``run``.
        search: the algorithm.
        pipeline: of the run.
        budget: the most to spend.

    Raises:
        ConfigError: parts that are missing or do not fit, a sentence each.
    """
    reward, held_out = (_reward(cfg, name, pipeline) for name in ("reward", "held_out"))
    if reward is None:
        raise ConfigError("There is nothing to search for. Give reward=scenes, say.")
    problems = number_problems(cfg, {"micro_batch": 1})
    studied = "methods" in cfg
    if not cfg.same_reward and (studied or not isinstance(search, PlainSampling)):
        problems += _same_reward(reward, held_out)
    setup = SearchSetup(
        search=search,
        reward=reward,
        held_out={} if held_out is None else {held_out.label: held_out},
        budget=budget or Budget(),
        micro_batch=cfg.micro_batch,
    )
    problems += setup.problems(pipeline.sampler, clips=pipeline.makes_clips)
    if problems:
        raise ConfigError("\n".join(problems))
    fit(setup, cfg.run)
    return setup


def plain_cost(pipeline: GenerationPipeline, prompts: Sequence[str] | None) -> float:
    """Return the network evaluations of one plain sample, guidance branches counted."""
    classes = torch.zeros(1, dtype=torch.int64) if pipeline.num_classes else None
    wish = None if pipeline.text is None else [(prompts or pipeline.example_captions)[0]]
    return pipeline.step_costs(pipeline.conditions(1, labels=classes, captions=wish)).total


def fit(setup: SearchSetup, run: Any) -> None:
    """Let rewards that learn from data learn from those that a run was trained on."""
    from genscale.cli.loading import datasets_of

    learning = [r for r in (setup.reward, *setup.held_out.values()) if r.learns]
    if learning:
        data = datasets_of(run)
        for reward in learning:
            reward.fit(data)


def _reward(cfg: DictConfig, name: str, pipeline: GenerationPipeline) -> Reward | None:
    """Build a reward; of clips, one for pictures judges the frames where that is asked for."""
    if not cfg[name].get("_target_"):
        return None
    reward: Reward = instantiate(cfg[name], name)
    if cfg.reward_frames is None:
        return reward
    if not pipeline.makes_clips:
        raise ConfigError(
            f"reward_frames={cfg.reward_frames} was given, but the model makes pictures, which "
            "have no frames. Leave it out."
        )
    return reward if reward.clips else FrameReward(reward, cfg.reward_frames)


def _refuse_without_reward(cfg: DictConfig, search: Search, budget: Budget) -> None:
    """Raise where something speaks of a search, but there is nothing to search for."""
    if not isinstance(search, PlainSampling):
        raise ConfigError(
            f"search={type(search).__name__} needs something to search "
            "for, but no reward was given. Give reward=scenes, say."
        )
    held_out = cfg.held_out.get("_target_")
    if held_out or budget != Budget():
        what = "held_out" if held_out else "a budget"
        raise ConfigError(
            f"{what} was given, but nothing is searched for. Give search=best_of_n and "
            "reward=..., or leave it out."
        )


def _same_reward(reward: Reward, held_out: Reward | None) -> list[str]:
    if held_out is None:
        return [
            f"The search follows {reward.label}, and nothing else would tell whether its samples "
            "are better: a search raises its own reward in any case. Give held_out=<another "
            "reward>, or same_reward=true."
        ]
    if held_out.label == reward.label:
        return [
            f"reward and held_out are both {reward.label}, so that a search would be judged by "
            "what it followed. Give another held_out=..., or same_reward=true."
        ]
    return []


def sample_requests(
    pipeline: GenerationPipeline,
    labels: LabelLaw,
    prompts: Sequence[str] | None,
    num_samples: int,
    seed: int,
) -> list[Request]:
    """Return what will be asked of the samples of a set, as rewards see it, each once."""
    count = min(num_samples, _LOOKED_AT)
    classes = labels_for(labels, torch.arange(count), num_classes=pipeline.num_classes, seed=seed)
    wishes = list(prompts or pipeline.example_captions) if pipeline.text is not None else []
    captions = [wishes[i % len(wishes)] for i in range(count)] if wishes else None
    return list(dict.fromkeys(requests_of(captions, classes, count)))


def check_requests(setup: SearchSetup, requests: Sequence[Request]) -> None:
    """Raise before anything is sampled where a reward cannot judge what is asked for."""
    problems = [
        problem
        for reward in (setup.reward, *setup.held_out.values())
        for problem in reward.problems(requests)
    ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


class SearchProgress:
    """Shows a search while it runs: prompts done, evaluations spent, the best reward so far.

    ``with SearchProgress(total) as shown: setup = replace(setup, watch=shown)``

    Args:
        total: prompts of all batches of this process.
        show: false stays silent.
    """

    def __init__(self, total: int, *, show: bool = True) -> None:
        self.total = total
        self.done = 0
        self._last = time.perf_counter()
        self._bar: Progress | None = None
        if show and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("searching"),
                BarColumn(),
                TextColumn("{task.fields[words]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
        self._show = show

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("searching", total=self.total, words="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, engine: Engine) -> None:
        """Take note of a micro-batch."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, words=self._words(engine))
        elif self._show and time.perf_counter() - self._last >= _EVERY:
            self._last = time.perf_counter()
            sys.stderr.write(f"searching: {self._words(engine)}\n")

    def finished(self, prompts: int) -> None:
        """Take note of a batch of prompts that is done."""
        self.done += prompts
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def _words(self, engine: Engine) -> str:
        spent = float(engine.meter.nfe.mean())
        limit = engine.budget.nfe
        words = [f"{self.done} of {self.total} prompts done", f"{spent:.0f}"]
        words[-1] += " evaluations" if limit is None else f" of {limit:g} evaluations"
        best = engine.best_so_far
        if best is not None:
            words.append(f"best reward {best:.4g}")
        if engine.budget.seconds is not None:
            words.append(f"{max(0.0, engine.budget.seconds - engine.seconds):.0f} s left")
        return ", ".join(words)


def _known(value: Tensor) -> float | None:
    """Return a number as json has it: None where a reward says nothing."""
    number = float(value)
    return number if math.isfinite(number) else None


def search_records(batch: Generated) -> list[dict[str, Any]]:
    """Return what is to be known of each sample of a searched batch, as plain containers."""
    found = batch.search
    if found is None:
        return []
    records = []
    for row, prompt in enumerate(found.group.tolist()):
        records.append(
            {
                "id": int(batch.ids[prompt]),
                "prompt": None if batch.captions is None else batch.captions[prompt],
                "label": None if batch.labels is None else int(batch.labels[prompt]),
                "rewards": {name: _known(value[row]) for name, value in found.rewards.items()},
                "held_out": {name: _known(value[row]) for name, value in found.held_out.items()},
                "seed": int(found.seeds[row]),
                "lineage": int(found.lineage[row]),
                "finished": bool(found.finished[row]),
                "state_bytes": found.state_bytes,
                "invalid": found.invalid / len(found.group),
                "cost": found.cost.row(prompt),
                "tree": found.genealogy.record(prompt),
            }
        )
    return records


def searched(
    pipeline: GenerationPipeline,
    setup: SearchSetup | None,
    settings: dict[str, Any],
    *,
    total: int,
    show: bool,
) -> Iterator[tuple[Generated, list[dict[str, Any]]]]:
    """Yield batches of samples, with a record of each that was searched for, and show progress.

    Args:
        pipeline: what makes them.
        setup: how they are searched for; None samples once.
        settings: of :meth:`~genscale.pipeline.GenerationPipeline.stream`.
        total: samples of this process.
        show: whether to show progress.
    """
    if setup is None:
        stream = pipeline.stream(**settings)
        yield from ((batch, []) for batch in track(stream, "sampling", total=total, show=show))
        return
    with SearchProgress(total, show=show) as shown:
        for batch in pipeline.stream(**settings, search=replace(setup, watch=shown)):
            shown.finished(len(batch.ids))
            yield batch, search_records(batch)
