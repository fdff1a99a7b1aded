"""Direct noise optimisation (DNO, arXiv:2405.18881): every noise that a sample is made of."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.search.descent import Descent, NoiseDescent
from genscale.search.engine import Engine
from genscale.search.gradient import Noises, Trajectory
from genscale.search.noise_regularisers import shuffles, typicality_penalty


class DirectNoiseOptimisation(NoiseDescent):
    """Start noise and step noises of every prompt go down the gradient of the reward's loss.

    The loss is the reward's plus ``regulariser`` times
    :func:`~genscale.search.noise_regularisers.typicality_penalty` of all noises that are
    optimised. Prompts are optimised in one batch, each with its own clip, best and end; the first
    sample is the plain one, and the best by reward is returned.

    Args:
        iterations: gradient steps, one sample more; None takes as many as the budget allows.
        rate: learning rate of AdamW, whose decay is 0.01.
        clip: the most that a prompt's gradient may measure; None does not clip.
        regulariser: weight of the penalty.
        block: elements of its blocks.
        shuffles: its permutations an iteration.
        last_steps: only the noises of so many last steps are optimised, of which the very last
            draws none; what comes before them is computed once. None: all, and the start noise.
        patience: samples in a row that meet the request, and so end a prompt.
        checkpoint: see :class:`~genscale.search.gradient.Trajectory`.

    Raises:
        ConfigError: an impossible number.
    """

    needs_noise = True

    def __init__(
        self,
        iterations: int | None = 50,
        *,
        rate: float = 0.01,
        clip: float | None = 1.0,
        regulariser: float = 1.0,
        block: int = 4,
        shuffles: int = 100,
        last_steps: int | None = None,
        patience: int = 2,
        checkpoint: bool = True,
    ) -> None:
        for name, value, least in (
            ("regulariser", regulariser, 0),
            ("block", block, 1),
            ("shuffles", shuffles, 0),
            ("last_steps", last_steps, 2),
        ):
            if value is not None and not least <= value < float("inf"):
                raise ConfigError(
                    f"search.{name} must be at least {least} and finite, but is {value}."
                )
        self.descent = Descent(iterations, "adam", rate, clip, patience=patience, decay=0.01)
        self.regulariser, self.block, self.shuffles = regulariser, block, shuffles
        self.last_steps, self.checkpoint = last_steps, checkpoint

    @property
    def label(self) -> str:
        """The name, and everything that changes the results."""
        words = [*self.descent.words(), f"regulariser {self.regulariser:g}"]
        words += [f"block {self.block}", f"shuffles {self.shuffles}"]
        if self.last_steps is not None:
            words.append(f"last_steps {self.last_steps}")
        return f"DirectNoiseOptimisation({', '.join(words)})"

    def explore(self, engine: Engine) -> dict[str, Tensor]:
        """Descend from the noises of the plain samples."""
        last, shape = engine.sampler.num_steps, engine.sampler.noise_shape(engine.model)
        base, first = engine.start(1), 0
        whole = self.last_steps is None
        if self.last_steps is not None:
            first = max(0, last - self.last_steps)
            base = engine.evaluate(engine.run(base, first))
        draws = [
            engine.sampler.step_noise(
                engine.model, base.replace(step=torch.full_like(base.step, step))
            )
            for step in range(first, last)
        ]
        noises = torch.stack([engine.noise(engine.seeds)] * whole + draws, 1)

        def build(own: Tensor, rows: Tensor) -> Noises:
            parts = own.view(len(own), -1, *shape)
            return Noises(parts[:, 0], parts[:, 1:]) if whole else Noises(None, parts)

        elements = noises[0].numel()

        @lru_cache(maxsize=1)  # for the micro-batches of an iteration
        def orders(turn: int) -> Tensor:
            return shuffles(self.shuffles, elements, turn).to(noises.device)

        def penalty(given: Noises, turn: int) -> Tensor:
            assert given.steps is not None
            parts = [given.steps.flatten(1)]
            if given.start is not None:
                parts.insert(0, given.start.flatten(1))
            drawn = torch.cat(parts, 1)
            return self.regulariser * typicality_penalty(drawn, orders(turn), block=self.block)

        trajectory = Trajectory(engine, checkpoint=self.checkpoint)
        given = penalty if self.regulariser > 0 else None
        return self.descent.run(engine, trajectory, base, noises.flatten(1), build, given)
