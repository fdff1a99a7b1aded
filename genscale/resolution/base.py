"""Operators that let a trained model work at another size, and putting them on for a while."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from genscale.backbones.base import Backbone
from genscale.backbones.dimr import DiMR
from genscale.errors import ConfigError
from genscale.resolution.pipelines import PipelineCallback, pipeline_callback

Sides = tuple[int, int]
"""Height and width."""

ModelCall = Callable[..., Any]
"""A model, or what stands in its place: (x, t, ...) -> prediction."""


class ResolutionOp:
    """One training-free change of how a model samples at a size it was not trained on.

    Every method but :meth:`prepare` has a neutral default. An operator holds for one model at a
    time: :meth:`prepare` puts it on, :meth:`restore` takes it off.
    """

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Put the operator on a model.

        What was put on before an error is taken off by :meth:`restore`, which is called then too.

        Args:
            model: the network itself.
            native: height and width it was trained on.
            target: height and width wanted, in the same unit.
            schedule: whatever the caller's sampler knows of its noise levels, or None.

        Raises:
            ConfigError: the model has nothing that the operator applies to.
        """

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Return the noisy sample that step ``i`` starts from; ``t`` is 1 at noise, 0 at data."""
        return x

    def wrap_model(self, fn: ModelCall) -> ModelCall:
        """Return what is to be called in place of the model."""
        return fn

    def post_x0(self, x0: Tensor, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Return the estimate of the clean sample that step ``i`` goes on with."""
        return x0

    def restore(self, model: nn.Module) -> None:
        """Leave the model as it was before :meth:`prepare`, however far that came."""


class Patches:
    """What was changed on modules, to be undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def hook(self, handle: Any) -> None:
        """Keep the handle of a hook."""
        self._undo.append(handle.remove)

    def call(self, undo: Callable[[], None]) -> None:
        """Keep what undoes a change of any kind."""
        self._undo.append(undo)

    def method(self, owner: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        """Shadow a method of one object; the class stays as it is."""
        before = vars(owner).get(name)  # somebody else's replacement comes back afterwards

        def undo() -> None:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, replacement)
        self._undo.append(undo)

    def undo(self) -> None:
        """Undo everything; doing so twice changes nothing."""
        while self._undo:
            self._undo.pop()()


class apply_resolution:  # a context manager that is called as a function
    """Let a model work at another size within a ``with`` block; it is always restored.

        with apply_resolution(model, "entropy", native=(32, 32), target=(64, 64)):
            y = model(x, t, cond)

    The value of the block has the four calls of :class:`ResolutionOp`, those of all operators one
    after another, for samplers that call them. Pipelines of diffusers, which run their own loop,
    tell operators that follow the step of it by a callback::

        with apply_resolution(pipe, "scalecrafter", native=(128, 128), target=(256, 256)) as scaled:
            pipe(words, height=2048, width=2048, callback_on_step_end=scaled.pipeline_callback())

    Args:
        model_or_pipe: a backbone, a diffusers model, or a pipeline that holds one as
            ``backbone``, ``transformer`` or ``unet``.
        preset: name of a preset of one run with its defaults, or the operators themselves.
        native: height and width the model was trained on; default that of a backbone's
            ``sample_shape``.
        target: height and width wanted, in the same unit.
        schedule: handed to :meth:`ResolutionOp.prepare`.

    Raises:
        ConfigError: an unknown preset, sizes that are none, a model already within such a block,
            or one that an operator does not apply to. Presets that sample small first belong to
            :func:`~genscale.resolution.sampling.sample_scaled`.
    """

    def __init__(
        self,
        model_or_pipe: Any,
        preset: str | Sequence[ResolutionOp] = "entropy",
        *,
        target: Sequence[int],
        native: Sequence[int] | None = None,
        schedule: Any = None,
    ) -> None:
        self.model = network_of(model_or_pipe)
        if native is None:
            if not isinstance(self.model, Backbone):
                raise ConfigError(
                    f"The trained size of {type(self.model).__name__} is not known and no native "
                    "size was given. Give native=(height, width)."
                )
            native = self.model.sample_shape[-2:]
        self.native, self.target = _sides("native", native), _sides("target", target)
        if isinstance(preset, str):
            from genscale.resolution.presets import operators_of, preset_named  # they import this

            self.ops = operators_of(preset_named(preset), self.model, self.native, self.target)
        else:
            self.ops = list(preset)
        self.schedule = schedule

    def __enter__(self) -> apply_resolution:
        if self.model in _ADAPTED:
            raise ConfigError(
                f"This {type(self.model).__name__} is already within apply_resolution, whose "
                "factors would count twice. Leave that block first, or give all operators at once."
            )
        _ADAPTED.add(self.model)
        try:
            for op in self.ops:
                op.prepare(self.model, self.native, self.target, self.schedule)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """See :meth:`ResolutionOp.pre_step`."""
        for op in self.ops:
            x = op.pre_step(x, t, i)
        return x

    def wrap_model(self, fn: ModelCall) -> ModelCall:
        """See :meth:`ResolutionOp.wrap_model`; the first operator is the innermost."""
        for op in self.ops:
            fn = op.wrap_model(fn)
        return fn

    def post_x0(self, x0: Tensor, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """See :meth:`ResolutionOp.post_x0`."""
        for op in self.ops:
            x0 = op.post_x0(x0, x, t, i)
        return x0

    def pipeline_callback(self) -> PipelineCallback:
        """Return the ``callback_on_step_end`` of one run of a pipeline of diffusers."""
        return pipeline_callback(self)

    def _restore(self) -> None:
        try:
            for op in reversed(self.ops):
                op.restore(self.model)
        finally:
            _ADAPTED.discard(self.model)


_ADAPTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def network_of(model_or_pipe: Any) -> nn.Module:
    """Return the network of a pipeline, or the network itself.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(model_or_pipe, nn.Module):
        return model_or_pipe
    for name in ("backbone", "transformer", "unet"):
        part = getattr(model_or_pipe, name, None)
        if isinstance(part, nn.Module):
            return part
    raise ConfigError(
        "Resolution scaling needs a network or a pipeline that holds one as backbone, transformer "
        f"or unet, but was given a {type(model_or_pipe).__name__}. Give the network."
    )


def extra_tokens(model: nn.Module) -> int:
    """Return how many tokens stand before those of the picture in a backbone of this package.

    A U-ViT has class, time and words there, a DiMR its class.
    """
    if isinstance(model, DiMR):
        return 1 if model.num_classes else 0
    table = getattr(model, "extra_positions", None)
    return len(table) if isinstance(table, Tensor) else 0


def linear_factor(native: Sides, target: Sides) -> float:
    """Return s = sqrt(target area / native area), above 1 for larger pictures."""
    return math.sqrt(math.prod(target) / math.prod(native))


def _sides(name: str, sides: Sequence[int]) -> Sides:
    sides = tuple(sides)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(
            f"{name} must be a height and a width of at least 1, but is {sides}. "
            "Give for example (64, 64)."
        )
    return sides[0], sides[1]
