"""Reward-based noise optimisation (ReNO, arXiv:2406.04312): of a noise or of what changes it."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.search.descent import Descent, NoiseDescent, OptimiserName
from genscale.search.engine import Engine
from genscale.search.gradient import Noises, Trajectory
from genscale.search.noise_modifier import NoiseModifier
from genscale.search.noise_regularisers import norm_penalty

Param = Literal["noise", "modifier"]


class NoiseOptimisation(NoiseDescent):
    """The start noise of every prompt goes down the gradient of the reward's loss.

    The loss is the reward's plus ``regulariser`` times
    :func:`~genscale.search.noise_regularisers.norm_penalty`. All prompts are optimised in one
    batch, but each has its own clip, its own best sample and its own end; a prompt ends when its
    reward has called its request met often enough (the part ``met``). The first sample is the
    plain one, and the best by reward is returned. Meant for samplers of a few steps.

    Args:
        iterations: gradient steps, one sample more; None takes as many as the budget allows.
        optimiser: ``"sgd"`` (ReNO's, Nesterov's momentum 0.9), ``"adam"`` or ``"lbfgs"``.
        rate: learning rate; None is the optimiser's own: 5, 0.01 and 1.
        clip: the most that a prompt's gradient may measure; None does not clip. ``lbfgs`` never
            does.
        regulariser: weight of the penalty.
        param: ``"noise"``, or ``"modifier"``: the weights of a small network that changes the noise
            (D2D, arXiv:2510.19278; :class:`~genscale.search.noise_modifier.NoiseModifier`), with
            ``adam`` and a rate of 1e-3, say.
        width: channels of the modifier.
        patience: samples in a row that meet the request, and so end a prompt.
        checkpoint: see :class:`~genscale.search.gradient.Trajectory`; off is faster where
            activations of all steps fit into memory.
        network_steps: see there.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        iterations: int | None = 50,
        *,
        optimiser: OptimiserName = "sgd",
        rate: float | None = None,
        clip: float | None = 0.1,
        regulariser: float = 0.01,
        param: Param = "noise",
        width: int = 32,
        patience: int = 2,
        checkpoint: bool = True,
        network_steps: int | None = None,
    ) -> None:
        if param not in get_args(Param):
            raise ConfigError(
                f"search.param must be one of {', '.join(get_args(Param))}, but is {param!r}."
                f"{did_you_mean(str(param), get_args(Param))}"
            )
        for name, value, least in (
            ("regulariser", regulariser, 0),
            ("width", width, 1),
            ("network_steps", network_steps, 0),
        ):
            if value is not None and not least <= value < float("inf"):
                raise ConfigError(
                    f"search.{name} must be at least {least} and finite, but is {value}."
                )
        self.descent = Descent(
            iterations,
            optimiser,
            _RATES.get(optimiser, 0.0) if rate is None else rate,
            clip,
            patience=patience,
            epsilon=1e-2,
        )
        self.regulariser, self.param, self.width = regulariser, param, width
        self.checkpoint, self.network_steps = checkpoint, network_steps

    @property
    def label(self) -> str:
        """The name, and everything that changes the results."""
        words = [*self.descent.words(), f"regulariser {self.regulariser:g}"]
        if self.param == "modifier":
            words.append(f"modifier {self.width}")
        if self.network_steps is not None:
            words.append(f"network_steps {self.network_steps}")
        return f"NoiseOptimisation({', '.join(words)})"

    def explore(self, engine: Engine) -> dict[str, Tensor]:
        """Descend from the plain samples' noises."""
        trajectory = Trajectory(
            engine, checkpoint=self.checkpoint, network_steps=self.network_steps
        )
        noise = engine.noise(engine.seeds)
        shape = tuple(noise.shape[1:])
        modifier = NoiseModifier(shape, self.width) if self.param == "modifier" else None
        if modifier is None:
            parameters = noise.flatten(1)
        else:
            parameters = modifier.initial(engine.seeds).to(noise.device)

        def build(own: Tensor, rows: Tensor) -> Noises:
            if modifier is None:
                return Noises(own.view(len(own), *shape))
            return Noises(modifier(own, noise[rows.to(noise.device)]))

        def penalty(noises: Noises, turn: int) -> Tensor:
            assert noises.start is not None
            return self.regulariser * norm_penalty(noises.start)

        return self.descent.run(engine, trajectory, engine.start(1), parameters, build, penalty)


_RATES = {"sgd": 5.0, "adam": 0.01, "lbfgs": 1.0}
