"""Official state-dict keys <-> ours, one module a family; its name is the family's.

A module of this folder is a family when it says which class it fills, ``BACKBONE``, and has four
functions: ``config_from_official(config, parity=False)``, ``config_from_state_dict(state,
num_heads=None, input_size=None)``, ``from_official(state, model)``, ``to_official(state, config)``.

It may also have ``NESTED``, the keys below which training files hold the weights, and ``UNTOLD``,
names of settings that no tensor tells and no default should guess: ``config.json`` beside a weight
file does, and ``config_to_official(config)`` gives what an export writes into it, or None. The
second function of a scale-wise family also takes ``scales=None``. ``CONTAINERS`` tells what a
program calls its weights, and ``DIFFUSERS`` the class of diffusers that holds them, DiT's by
default.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

from genscale.errors import ConfigError, did_you_mean


def families() -> dict[str, ModuleType]:
    """Return the converters by family, in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "BACKBONE")}


def converter(family: str) -> ModuleType:
    """Return the converter of a family.

    Raises:
        ConfigError: there is none such.
    """
    known = families()
    if family not in known:
        raise ConfigError(
            f"family must be one of {', '.join(known)}, but '{family}' was given."
            f"{did_you_mean(str(family), list(known))}"
        )
    return known[family]


def families_of(backbone: type[Any]) -> list[str]:
    """Return the families whose networks are of a class; an empty list where there is none."""
    return [name for name, module in families().items() if module.BACKBONE is backbone]
