"""What flow matching and DDPM share: noise the data, predict a target, compare at each scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from genscale.backbones.base import Backbone, BackboneOutput
from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Batch, LossOutput, Objective, on
from genscale.objectives.conversion import Target, network_input, target_of
from genscale.objectives.network import NetworkView, extras_of, velocity_is_reversed
from genscale.objectives.pyramid import pyramid_loss
from genscale.objectives.schedule import NoiseProcess
from genscale.objectives.self_conditioning import remembered
from genscale.objectives.time_input import TimeInput, time_input_of
from genscale.rng import Purpose, StepRandom

PyramidWeights = Literal["auto"] | Sequence[float] | None


class DenoisingObjective(Objective):
    """Mean squared error of a network's prediction at a random level.

    The error is not weighted by level, unless a subclass gives an :meth:`error_scale`.

    Args:
        process: the noising process.
        target: what the network predicts.
        time_input: which number the network is fed.
        pyramid_weights: weights of a multi-resolution backbone's predictions
            (``aux["pyramid"]``), coarse first; None trains the finest one only; ``"auto"`` asks
            the backbone's ``pyramid_weights`` and means None where it has none.
        sigma_data: standard deviation of the data, for the target ``edm``.
        sigma_in: its input scale; see :class:`~genscale.objectives.edm.EDM`.
        ignore_variance: accept networks that predict a variance nobody trains.
        self_conditioning: share of samples trained with what the network remembers of a first
            evaluation at the same x and time (arXiv:2208.04202), as it will remember the step
            before in sampling; 0 spends no first evaluation. The others are trained without.

    Raises:
        ConfigError: an unknown name or an impossible weight.
    """

    def __init__(
        self,
        *,
        process: NoiseProcess,
        target: Target,
        time_input: TimeInput,
        pyramid_weights: PyramidWeights,
        sigma_data: float = 0.5,
        sigma_in: float = 1.0,
        ignore_variance: bool = False,
        self_conditioning: float = 0.0,
    ) -> None:
        _check_choice("target", target, get_args(Target))
        _check_choice("time_input", time_input, get_args(TimeInput))
        self.process = process
        self.target = target
        self.time_input = time_input
        self.sigma_data = float(sigma_data)
        self.sigma_in = float(sigma_in)
        self.ignore_variance = ignore_variance
        if not 0.0 <= self_conditioning <= 1.0:
            raise ConfigError(
                f"objective.self_conditioning must lie in [0, 1], but is {self_conditioning}. "
                "0.9 is usual for networks that remember, 0 trains without."
            )
        self.self_conditioning = float(self_conditioning)
        self.pyramid_weights: Literal["auto"] | tuple[float, ...] | None
        if pyramid_weights is None or pyramid_weights == "auto":
            self.pyramid_weights = None if pyramid_weights is None else "auto"
        else:
            self.pyramid_weights = _checked_weights(pyramid_weights)

    @property
    def learns_variance(self) -> bool:
        """Whether a network's variance is trained too; the default is no."""
        return False

    def check_variance(self, predicted: bool) -> None:
        """Refuse a network whose variance nobody trains, or that lacks the one to train.

        Args:
            predicted: the network predicts a variance (``learn_sigma``).

        Raises:
            ConfigError: it does not fit this objective.
        """
        if predicted and not (self.learns_variance or self.ignore_variance):
            raise ConfigError(
                "model.learn_sigma=true gives the network a variance to predict, but the objective "
                "does not train it. Pass model.learn_sigma=false, or use objective=ddpm_dit."
            )
        if self.learns_variance and not predicted:
            raise ConfigError(
                "objective.learn_sigma=true needs a network that predicts its variance, but this "
                "one does not. Pass model.learn_sigma=true, or objective.learn_sigma=false."
            )

    @abstractmethod
    def sample_time(self, u: Tensor) -> Tensor:
        """Return process times of keyed uniforms ``u`` ``(B,)`` float64 in [0, 1)."""

    def error_scale(self, time: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Return what errors ``(B,)`` are multiplied by before they are squared; None is 1."""
        return None

    def complete_loss(
        self, result: LossOutput, output: BackboneOutput, clean: Tensor, x: Tensor, time: Tensor
    ) -> LossOutput:
        """Add terms beside the error of the prediction; the default has none.

        Args:
            result: of the prediction.
            output: of the network.
            clean: data x_0.
            x: what it became at ``time``.
            time: ``(B,)`` process times.
        """
        return result

    def loss(self, backbone: Backbone, batch: Batch, rng: StepRandom) -> LossOutput:
        """Compute the loss of a batch; see :class:`DenoisingObjective`.

        Raises:
            ConfigError: weights or a variance that do not fit the backbone's predictions.
        """
        clean = batch.clean
        time = self.sample_time(rng.uniform(Purpose.TIME)).to(clean.device, non_blocking=True)
        noise = rng.normal(Purpose.NOISE, tuple(clean.shape[1:])).to(clean, non_blocking=True)
        alpha, sigma = self.process.coefficients(time)
        alpha_x, sigma_x = on(alpha, clean), on(sigma, clean)
        x = alpha_x * clean + sigma_x * noise
        extras = extras_of(self.target, self.process, time, clean, self.sigma_data, self.sigma_in)
        fed = network_input(self.target, x, alpha_x, sigma_x, extras)
        number = time_input_of(self.time_input, time, alpha, sigma / self.sigma_in)
        memory = None
        if self.self_conditioning > 0.0:
            known = rng.uniform(Purpose.SELF_CONDITION) < self.self_conditioning
            memory = remembered(backbone, fed, number, batch.cond, known)
        output = backbone(fed, number, batch.cond, memory)
        self.check_variance("variance" in output.aux)
        target = target_of(self.target, clean, noise, alpha_x, sigma_x, extras)
        if velocity_is_reversed(self.target, self.time_input):
            target = -target
        scale = self.error_scale(time, alpha, sigma)
        result = self._compare(backbone, output, target, time, scale)
        return self.complete_loss(result, output, clean, x, time)

    def view(
        self, backbone: Backbone, tokenizer: Any = None, *, shape: tuple[int, ...] | None = None
    ) -> NetworkView:
        """Return the generator view of a trained backbone."""
        return NetworkView(
            backbone,
            self.process,
            self.target,
            self.time_input,
            sigma_data=self.sigma_data,
            sigma_in=self.sigma_in,
            shape=shape,
        )

    def _compare(
        self,
        backbone: Backbone,
        output: BackboneOutput,
        target: Tensor,
        time: Tensor,
        scale: Tensor | None = None,
    ) -> LossOutput:
        predictions = output.aux.get("pyramid") or [output.sample]
        if scale is not None:
            target = on(scale, target) * target
            # a prediction in half precision is weighed in float32
            predictions = [on(scale, target) * item.to(target.dtype) for item in predictions]
        weights = self._weights_for(backbone, len(predictions))
        per_sample, errors = pyramid_loss(predictions, target, weights)
        terms: dict[str, Tensor] = {}
        if len(errors) > 1:
            for prediction, error in zip(predictions, errors, strict=True):
                height, width = prediction.shape[-2:]
                terms[f"loss_{height}x{width}"] = error.detach().mean()
        return LossOutput(per_sample.mean(), terms, per_sample.detach(), time.float())

    def _weights_for(self, backbone: Backbone, count: int) -> Sequence[float]:
        """Return one weight a prediction, coarse first."""
        weights: Sequence[float] | None
        if self.pyramid_weights == "auto":
            weights = getattr(backbone, "pyramid_weights", None)
        else:
            weights = self.pyramid_weights
        if weights is None:
            return [0.0] * (count - 1) + [1.0]
        if len(weights) != count:
            raise ConfigError(
                f"objective.pyramid_weights has {len(weights)} entries but "
                f"{type(backbone).__name__} predicts at {count} resolution"
                f"{'s' if count > 1 else ''}. Give one weight each, or null for the finest only."
            )
        return weights


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"objective.{name} must be one of {', '.join(known)}, but is {value!r}."
            f"{did_you_mean(str(value), known)}"
        )


def _checked_weights(weights: Sequence[float]) -> tuple[float, ...]:
    if isinstance(weights, str):
        raise ConfigError(
            f"objective.pyramid_weights must be auto, null or a list, but is {weights!r}. "
            "Give one weight a resolution, coarse first, e.g. [0.25,1]."
        )
    numbers = tuple(float(weight) for weight in weights)
    if not all(0.0 <= number < float("inf") for number in numbers) or sum(numbers) == 0.0:
        raise ConfigError(
            "objective.pyramid_weights must be finite, not negative and not all 0, but is "
            f"{list(numbers)}. Give e.g. [0.25,1], coarse first."
        )
    return numbers
