"""A vision-language model as judge, in the manner of RewardDance (arXiv:2509.08826).

The reward is the probability of the answer "yes". No official program is public; instructions,
orders and references are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from genscale.conditioning.transformers_folder import Folder, load_model
from genscale.errors import CheckpointError, ConfigError
from genscale.rewards import duels
from genscale.rewards.base import Request, RewardOutput
from genscale.rewards.learned import (
    LearnedReward,
    captions_of,
    check_setting,
    need_transformers,
    once_each,
)
from genscale.rewards.preprocessing import as_unit_rgb, to_pictures
from genscale.rewards.vision_language import Part, Verdicts, VisionLanguage

Mode = Literal["pointwise", "pairwise"]
References = Literal["best_so_far", "tournament", "random_k", "all_pairs"]

_WHAT = (
    "an instruction-tuned vision-language model, e.g. HuggingFaceTB/SmolVLM-Instruct (Apache-2.0)"
)
_CRITERIA = "how well it shows what was described, its composition and its quality"
_AT_ONCE = "Answer with yes or no."
_THINK = "Think step by step about what you see. Then answer with yes or no."


@dataclass(slots=True)
class Sitting:
    """What a judge knows of the requests of one search.

    Attributes:
        captions: of every request.
        values: judged so far, a request each.
    """

    captions: list[str]
    values: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A picture that may have to be compared with others.

    Attributes:
        caption: what it was asked to be.
        picture: ``(H, W, 3)`` uint8.
    """

    caption: str
    picture: np.ndarray


class Judge(LearnedReward):
    """P("yes") to the question whether a picture is good, or better than another one.

    The value is always that of the picture alone. In ``pairwise`` mode candidates of a request are
    ordered by duels: "is the second picture better than the first?". The reference comes first,
    so that many candidates can share what is computed of it. Pictures are then kept, with 8 bits,
    until the next search.

    Parts of the value: ``entropy`` of the answer in nats; ``std_within_group``, the deviation of
    all values of the same request so far: where it halves while the mean rises, a search has
    found the judge's weakness; ``thoughts``, tokens decoded before the answer.

    Args:
        folder: a vision-language model of the transformers library, with its processor.
        mode: ``pointwise`` or ``pairwise``.
        references: whom candidates meet in ``pairwise`` mode; see
            :mod:`genscale.rewards.duels`. ``best_so_far``: N - 1 duels one after the other;
            ``tournament``: N - 1 in rounds; ``random_k``: each against the same few;
            ``all_pairs``: N (N - 1) / 2.
        num_references: candidates drawn by ``random_k``.
        debias: ask in both orders, 1/2 [r(x, y) + 1 - r(y, x)]: models prefer a place.
        logit_reward: l_yes - l_no as value, which does not saturate.
        criteria: what the judge looks at, in words.
        chain_of_thought: let the model write a rationale first, greedily.
        max_thought_tokens: the most tokens of it.
        cache_prefix: compute the instruction and the reference once for all candidates.
        batch_size: pictures in one forward pass.
        seed: of the draw of ``random_k``.
        precision: of weights and arithmetic: float32 or bfloat16.

    Attributes:
        comparisons: pictures asked about in duels so far.

    Raises:
        ConfigError: an unknown mode, kind of references or precision, or counts below 1.
    """

    needs = frozenset({"caption"})
    licence = "of the model in reward.folder"

    def __init__(
        self,
        *,
        folder: str | None = None,
        mode: Mode = "pointwise",
        references: References = "best_so_far",
        num_references: int = 4,
        debias: bool = True,
        logit_reward: bool = False,
        criteria: str = _CRITERIA,
        chain_of_thought: bool = False,
        max_thought_tokens: int = 256,
        cache_prefix: bool = True,
        batch_size: int = 8,
        seed: int = 0,
        precision: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        check_setting("reward.precision", precision, ("float32", "bfloat16"))
        super().__init__(precision)
        check_setting("reward.mode", mode, ("pointwise", "pairwise"))
        known = ("best_so_far", "tournament", "random_k", "all_pairs")
        check_setting("reward.references", references, known)
        for name, count in (
            ("num_references", num_references),
            ("max_thought_tokens", max_thought_tokens),
            ("batch_size", batch_size),
        ):
            if count < 1:
                raise ConfigError(f"reward.{name} must be at least 1, but {count} was given.")
        self.folder = Folder("reward.folder", folder, _WHAT)
        self.mode, self.references, self.num_references = mode, references, num_references
        self.debias, self.logit_reward = debias, logit_reward
        self.criteria = criteria.strip().rstrip(".")
        self.chain_of_thought, self.max_thought_tokens = chain_of_thought, max_thought_tokens
        self.cache_prefix, self.batch_size, self.seed = cache_prefix, batch_size, seed
        self.potential = mode == "pointwise"
        self.comparisons = 0
        self._reader: VisionLanguage | None = None
        self._candidates: dict[int, Candidate] = {}
        self._issued = 0  # candidates so far; numbers are never given twice
        self._chances: dict[tuple[int, int], float] = {}

    @property
    def settings(self) -> list[str]:
        """How it is asked, and whom candidates meet."""
        words: list[str] = [self.mode]
        if self.mode == "pairwise":
            drawn = f" {self.num_references} seed {self.seed}"
            words += [self.references + drawn * (self.references == "random_k")]
            words += ["debiased"] * self.debias
        words += ["logit"] * self.logit_reward
        words += [f"thoughts {self.max_thought_tokens}"] * self.chain_of_thought
        return words + [f"criteria {self.criteria!r}"] * (self.criteria != _CRITERIA)

    def digests(self) -> list[str]:
        """Return that of the model."""
        return [self.folder.digest()]

    def find(self) -> None:
        """Look for the folder and the package."""
        self.folder.path()
        need_transformers(self)

    def load(self) -> nn.Module:
        """Read the model."""
        need_transformers(self)
        return load_model(self.folder, "AutoModelForImageTextToText", self.precision)

    def to(self, device: torch.device | str) -> Self:
        """Move the model; what was computed of instructions is computed again."""
        self._reader = None
        return super().to(device)

    # ------------------------------------------------------------------ one picture

    def prepare(self, requests: Sequence[Request]) -> Sitting:
        """Begin a search; candidates of the one before are forgotten."""
        captions = captions_of(requests)
        self._candidates.clear()
        self._chances.clear()
        return Sitting(captions, [[] for _ in captions])

    def score(self, images: Tensor, handle: Sitting, index: Tensor) -> RewardOutput:
        """Judge each picture for itself."""
        pictures = to_pictures(as_unit_rgb(images))
        captions = [handle.captions[i] for i in index.tolist()]
        yes, no, thoughts = (torch.zeros(len(pictures)) for _ in range(3))
        texts, places = once_each(captions)
        for number, caption in enumerate(texts):
            rows = (places == number).nonzero()[:, 0]
            found = self._ask_alone(caption, [pictures[i] for i in rows.tolist()])
            yes[rows], no[rows], thoughts[rows] = found.yes, found.no, found.thoughts.float()
        odds = yes - no
        value = odds if self.logit_reward else odds.sigmoid()
        parts = {
            "entropy": torch.special.entr(odds.sigmoid()) + torch.special.entr((-odds).sigmoid()),
            "std_within_group": self._deviations(value, handle, index),
            "thoughts": thoughts,
        }
        if self.mode == "pairwise":
            parts["candidate"] = self._keep(captions, pictures)
        return RewardOutput(value, parts)

    def _ask_alone(self, caption: str, pictures: Sequence[np.ndarray]) -> Verdicts:
        before = [f"A picture was made for this description: {caption}\nThis is the picture:"]
        question = f"Is it a good picture? Judge by {self.criteria}. {self._ending}"
        return self._asked().ask(before, pictures, question)

    def _deviations(self, value: Tensor, handle: Sitting, index: Tensor) -> Tensor:
        """Add values to those of their requests, and return the deviation of each request's."""
        for i, each in zip(index.tolist(), value.tolist(), strict=True):
            handle.values[i].append(each)
        return torch.tensor(
            [float(np.std(handle.values[i])) for i in index.tolist()], dtype=torch.float32
        )

    # ------------------------------------------------------------------ two pictures

    def compare(self, output: RewardOutput, group: Tensor) -> Tensor:
        """Order candidates by their values, or by duels in ``pairwise`` mode."""
        if self.mode == "pointwise":
            return output.value
        order = torch.full((len(group),), -torch.inf, dtype=torch.float64)
        value = output.value.double().cpu()
        numbers = output.parts["candidate"].long().tolist()
        for request in dict.fromkeys(group.tolist()):
            rows = ((group == request) & value.isfinite()).nonzero()[:, 0].tolist()
            if rows:
                own = [numbers[i] for i in rows]
                ranks = self._arrange([float(value[i]) for i in rows], own, request)
                order[rows] = torch.tensor(ranks, dtype=torch.float64)
        return order

    def chances(self, pairs: Sequence[tuple[int, int]]) -> list[float]:
        """Return the probabilities that the first of two candidates is the better one.

        Args:
            pairs: numbers of candidates, from the part ``candidate`` of scores; what was asked
                once is remembered.
        """
        wanted = dict.fromkeys(pairs)
        if self.debias:
            wanted |= dict.fromkeys((other, one) for one, other in pairs)
        by_reference: dict[int, list[int]] = {}
        for one, reference in wanted:
            if (one, reference) not in self._chances:
                by_reference.setdefault(reference, []).append(one)
        for reference, those in by_reference.items():
            found = self._ask_beside(reference, those)
            self.comparisons += len(those)
            for one, chance in zip(those, (found.yes - found.no).sigmoid().tolist(), strict=True):
                self._chances[one, reference] = chance
        if not self.debias:
            return [self._chances[pair] for pair in pairs]
        return [
            0.5 * (self._chances[one, other] + 1.0 - self._chances[other, one])
            for one, other in pairs
        ]

    def _arrange(self, values: list[float], numbers: list[int], request: int) -> list[float]:
        def beats(pairs: list[tuple[int, int]]) -> list[float]:
            return self.chances([(numbers[i], numbers[j]) for i, j in pairs])

        if self.references == "best_so_far":
            return duels.champion_ladder(values, beats)
        if self.references == "tournament":
            return duels.tournament(values, beats)
        if self.references == "all_pairs":
            return duels.all_pairs(values, beats)
        return duels.against_references(
            values, beats, count=self.num_references, seed=self.seed, request=request
        )

    def _ask_beside(self, reference: int, those: Sequence[int]) -> Verdicts:
        first = self._candidates[reference]
        before: list[Part] = [
            f"Two pictures were made for this description: {first.caption}\n"
            "This is the first picture:",
            first.picture,
            "This is the second picture:",
        ]
        question = (
            f"Is the second picture better than the first? Judge by {self.criteria}. {self._ending}"
        )
        return self._asked().ask(before, [self._candidates[i].picture for i in those], question)

    def _keep(self, captions: Sequence[str], pictures: np.ndarray) -> Tensor:
        first = self._issued
        self._issued += len(captions)
        for i, caption in enumerate(captions):
            self._candidates[first + i] = Candidate(caption, pictures[i])
        return torch.arange(first, self._issued, dtype=torch.float64)

    # ------------------------------------------------------------------ the model

    @property
    def _ending(self) -> str:
        return _THINK if self.chain_of_thought else _AT_ONCE

    def _asked(self) -> VisionLanguage:
        if self._reader is None:
            model = self.network
            self._reader = VisionLanguage(
                model,
                self._processor(),
                batch_size=self.batch_size,
                cache_prefix=self.cache_prefix,
                max_thoughts=self.max_thought_tokens if self.chain_of_thought else 0,
            )
        return self._reader

    def _processor(self) -> Any:
        from transformers import AutoProcessor

        processors: Any = AutoProcessor  # its loader has no types
        try:
            return processors.from_pretrained(self.folder.path(), local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            problem = " ".join(str(error).split()).rstrip(".")[:300]
            raise CheckpointError(
                f"The processor of reward.folder={self.folder.place} cannot be loaded: {problem}. "
                "Copy the whole folder, the processor's json files included."
            ) from error
