"""A function of the user's own as a reward."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.rewards.base import Need, Request, Reward, RewardOutput

Judgement = Callable[..., Tensor]
"""``(images (B, C, H, W) in [0, 1], requests, **settings) -> (B,)``; a request a picture.

Clips are ``(B, C, T, H, W)``."""


class FunctionReward(Reward):
    """What a function says of pictures and requests, higher being better.

    Args:
        function: the function itself, ``"package.module:name"``, or ``"path/to/file.py:name"``.
            It is called with pictures ``(B, C, H, W)`` float32 in [0, 1] and a list of B
            :class:`~genscale.rewards.base.Request`, and returns ``(B,)`` numbers; what it says of
            a picture must not depend on the others.
        settings: further keyword arguments of the function.
        needs: what it reads of a request: ``caption``, ``label``.
        differentiable: whether gradients reach the pictures through it.
        clips: whether it is called with clips ``(B, C, T, H, W)`` in the place of pictures.

    Raises:
        ConfigError: ``needs`` names something else.
    """

    def __init__(
        self,
        function: Judgement | str | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        needs: Sequence[Need] = (),
        differentiable: bool = False,
        clips: bool = False,
    ) -> None:
        for each in needs:
            if each not in get_args(Need):
                raise ConfigError(
                    f"reward.needs names '{each}', but requests have {', '.join(get_args(Need))}. "
                    "Name what the function reads."
                )
        self.function = function
        self.settings = dict(settings or {})
        self.needs = frozenset(needs)
        self.differentiable = differentiable
        self.clips = clips
        self._found: Judgement | None = None

    @property
    def label(self) -> str:
        """The function's name and its settings."""
        name = self.function
        if callable(name):
            name = f"{name.__module__}:{getattr(name, '__qualname__', type(name).__name__)}"
        told = [f"{key}={value}" for key, value in self.settings.items()]
        return f"Function({', '.join([str(name), *told])})"

    def check(self) -> list[str]:
        """Return a sentence where there is no such function."""
        try:
            self.found()
        except ConfigError as error:
            return [str(error)]
        return []

    def found(self) -> Judgement:
        """Return the function.

        Raises:
            ConfigError: it is not where its name says.
        """
        if self._found is None:
            self._found = self.function if callable(self.function) else find(self.function)
        return self._found

    def score(self, images: Tensor, handle: tuple[Request, ...], index: Tensor) -> RewardOutput:
        """Call the function.

        Raises:
            DataError: it returned something else than a number a picture.
        """
        value = self.found()(images, [handle[row] for row in index.tolist()], **self.settings)
        if not isinstance(value, Tensor) or value.shape != (len(images),):
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"reward {self.label} must return a tensor with one number a picture, of shape "
                f"({len(images)},), but returned {what}. Mend the function."
            )
        return RewardOutput(value.to(images.device, torch.float32))


def find(name: str | None) -> Judgement:
    """Return the function that ``module:name`` or ``file.py:name`` names.

    Raises:
        ConfigError: no name, no such file or module, or nothing callable of that name in it.
    """
    place, separator, attribute = (name or "").rpartition(":")
    if not separator or not place or not attribute:
        raise ConfigError(
            f"reward.function={name} names no function. Give package.module:name or "
            "path/to/file.py:name."
        )
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else None
        module = module or importlib.import_module(place)
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(
            f"reward.function={name} cannot be imported: {str(error).rstrip('.')}. Give a module "
            "that Python finds, or the path of a file."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(
            f"reward.function={name}: '{place}' has no function '{attribute}'. Name one that it "
            "defines."
        )
    found: Judgement = function
    return found


def _from_file(path: Path) -> Any:
    file = path.expanduser()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
