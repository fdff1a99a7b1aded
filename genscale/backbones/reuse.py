"""Outputs of a backbone's inner modules, recorded in one call and put in place in another.

A backbone names in ``cached_modules`` the modules whose outputs change little from one step of
sampling to the next, as ``"BlockClass.attribute"``: all children of that name in blocks of that
class. Here they are found, listened to, replaced by outputs from elsewhere, and left out of the
count of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from genscale.backbones.base import Backbone
from genscale.errors import ConfigError
from genscale.flops import count_flops_by_module

_SHARES: WeakKeyDictionary[Backbone, dict[tuple[int, ...], float]] = WeakKeyDictionary()


def reusable_modules(backbone: Backbone) -> dict[str, nn.Module]:
    """Return the modules that ``backbone.cached_modules`` names, by their qualified names.

    Raises:
        ConfigError: the backbone names none, or names what it does not have, or was compiled as
            a whole or block by block into new modules, into which nobody can look.
    """
    kind = type(backbone).__name__
    if any(hasattr(module, "_orig_mod") for module in backbone.modules()):
        raise ConfigError(
            f"Step caching looks into {kind}, but torch.compile has wrapped modules of it. Give "
            "the model uncompiled, or compiled in place by module.compile(), or use "
            "step_cache=none."
        )
    named = getattr(backbone, "cached_modules", ())
    found = {
        f"{prefix}.{attribute}": child
        for prefix, module in backbone.named_modules()
        for name in named
        for owner, _, attribute in (name.partition("."),)
        if type(module).__name__ == owner and (child := getattr(module, attribute)) is not None
    }
    if not found:
        raise ConfigError(
            f"Step caching reuses the modules that a backbone names in cached_modules, but {kind} "
            f"{'names none' if not named else 'has none of ' + ', '.join(named)}. Use "
            "step_cache=none, or name them in the class."
        )
    return found


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record what modules put out, by name, while the context is open.

    The dict is filled as the backbone runs. Every module must run once.
    """
    outputs: dict[str, Tensor] = {}

    def listening(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def listen(*args: Any, **kwargs: Any) -> Tensor:
            if name in outputs:
                raise ValueError(
                    f"{name} ran twice in one call of the backbone, but step caching keeps one "
                    "output of each module. Leave it out of cached_modules."
                )
            outputs[name] = forward(*args, **kwargs)
            return outputs[name]

        return listen

    with _swapped(modules, {name: listening(name, m.forward) for name, m in modules.items()}):
        yield outputs


@contextmanager
def replaced(modules: Mapping[str, nn.Module], outputs: Callable[[str], Tensor]) -> Iterator[None]:
    """Let modules put out ``outputs(name)`` without running, while the context is open."""

    def answering(name: str) -> Callable[..., Tensor]:
        def answer(*args: Any, **kwargs: Any) -> Tensor:
            return outputs(name)

        return answer

    with _swapped(modules, {name: answering(name) for name in modules}):
        yield


@contextmanager
def _swapped(
    modules: Mapping[str, nn.Module], forwards: Mapping[str, Callable[..., Tensor]]
) -> Iterator[None]:
    """Swap the ``forward`` of modules; whatever happens, they are as before afterwards.

    A module object is changed for the time of the context: one thread at a time.
    """
    with ExitStack() as undo:
        for name, module in modules.items():
            undo.enter_context(_attribute(module, "forward", forwards[name]))
        yield


@contextmanager
def eager(backbone: Backbone) -> Iterator[None]:
    """Run modules that were compiled in place as they were written, while the context is open.

    A compiled block has its children inlined, whose ``forward`` is then not called.
    """
    with ExitStack() as undo:
        for module in backbone.modules():
            if module._compiled_call_impl is not None:
                undo.enter_context(_attribute(module, "_compiled_call_impl", None))
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Give a module an attribute of its own, and afterwards the one it had, or none."""
    own = module.__dict__
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


def remaining_share(backbone: Backbone, shape: tuple[int, ...]) -> float:
    """Return the share of a forward's operations that is left when cached modules do not run.

    As :func:`~genscale.flops.count_flops_by_module` counts them; 1 where it counts none.

    Args:
        backbone: it is not run; the count is made once a shape.
        shape: ``(C, H, W)`` of the input.
    """
    shares = _SHARES.setdefault(backbone, {})
    if shape not in shares:
        with torch.inference_mode(False):
            counts = count_flops_by_module(backbone, shape)
        total, cached = counts[""], sum(counts.get(name, 0) for name in reusable_modules(backbone))
        shares[shape] = 1.0 - cached / total if total else 1.0
    return shares[shape]
