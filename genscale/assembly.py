"""Building objects from the config a run wrote, without Hydra and without running foreign code."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from genscale.errors import ConfigError


def build(node: Any, *, path: str, **extra: Any) -> Any:
    """Build the object that ``node["_target_"]`` names with the node's other keys.

    A key that holds such a node itself is built first.

    Only classes and functions of genscale itself are built: a config that lies beside
    a checkpoint cannot make us call anything else.

    Args:
        node: plain containers as read from ``config.yaml``.
        path: config path, for error sentences.
        extra: further keyword arguments.

    Raises:
        ConfigError: no target, a target outside genscale, or arguments it does not take.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"'{path}' names no _target_ to build. Restore the run's config.yaml.")
    target = str(node["_target_"])
    if not target.startswith("genscale."):
        raise ConfigError(
            f"'{path}._target_' must lie in genscale, but {target} was given. "
            "Configs of runs may not name other code; build such objects from Python."
        )
    module, _, name = target.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"'{path}._target_' names {target}, which does not exist.") from error
    arguments = {
        key: build(value, path=f"{path}.{key}")
        if isinstance(value, dict) and "_target_" in value
        else value
        for key, value in node.items()
        if key != "_target_"
    }
    try:
        return function(**arguments, **extra)
    except TypeError as error:
        raise ConfigError(f"'{path}' does not fit {target}: {error}.") from error
