"""Objects from config nodes, with errors that name the place in the config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from genscale.errors import ConfigError, GenscaleError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SPECIAL = ("_target_", "_args_", "_recursive_", "_convert_", "_partial_")
# raised with sentences of their own: a file that is not there, a package to install
_TOLD = (GenscaleError, FileNotFoundError, PermissionError, ImportError)


def instantiate(node: DictConfig, path: str, **extra: Any) -> Any:
    """Build the object that ``node._target_`` names from the node's other keys.

    Lists and mappings arrive as plain ``list`` and ``dict``. ``extra`` never passes through
    OmegaConf, which would copy the objects in it.

    Args:
        node: part of the config; interpolations are resolved against the whole of it.
        path: where the node stands in the config, for error sentences.
        extra: keyword arguments that come from code.

    Returns:
        the object, or a ``functools.partial`` where the node says ``_partial_: true``.

    Raises:
        ConfigError: no target, a target that does not exist, keys it does not take, keys it
            lacks, or a value its constructor refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build
    from omegaconf.errors import OmegaConfBaseException

    target = node.get("_target_") if isinstance(node, Mapping) or hasattr(node, "get") else None
    if not target:
        raise ConfigError(
            f"'{path}' names no _target_ to build. Choose one of its options with {path}=..."
        )
    function = _locate(str(target), path)
    _check_arguments(function, node, path, extra)
    try:
        prepared = build(node, _partial_=True, _convert_=node.get("_convert_", "all"))
    except InstantiationException as error:
        raise _nested_error(error, path) from error
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"'{path}' has a value that cannot be computed: {first}.") from error
    if node.get("_partial_", False):
        prepared.keywords.update(extra)
        return prepared
    try:
        return prepared(**extra)
    except _TOLD:
        raise
    except TypeError as error:
        raise ConfigError(
            f"{path} could not be built: {_sentence(error)} Its constructor is "
            f"{_shown(function, str(target))}."
        ) from error
    except Exception as error:
        raise ConfigError(f"{path} ({target}) could not be built: {_sentence(error)}") from error


def _locate(target: str, path: str) -> Any:
    """Import what ``_target_`` names; an optional package missing on the way is told as such."""
    from hydra.utils import get_object

    try:
        return get_object(target)
    except ImportError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        missing = getattr(cause, "name", None)
        if isinstance(cause, ImportError) and missing is None and cause is not error:
            raise cause from None  # an install hint of ours
        if isinstance(cause, ModuleNotFoundError) and not target.startswith(str(missing)):
            raise ConfigError(
                f"{path}._target_ = {target} needs the package '{missing}'. Install it with: "
                f"pip install {str(missing).partition('.')[0]}"
            ) from error
        detail = "" if missing else f" ({type(cause).__name__}: {_sentence(cause)})"
        raise ConfigError(
            f"{path}._target_ names {target}, which does not exist{detail}. "
            f"Write the dotted path of a class or function, or choose another {path}=..."
        ) from error


def _check_arguments(function: Any, node: DictConfig, path: str, extra: dict[str, Any]) -> None:
    """Hold the node's keys against the signature before anything is built."""
    given = [str(key) for key in node if key not in _SPECIAL]
    twice = [name for name in given if name in extra]
    if twice:
        raise ConfigError(
            f"'{path}.{twice[0]}' is set by genscale itself. Remove it from the config."
        )
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled, and silent about what it takes
        return
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in given:
            if name not in parameters:
                close = did_you_mean(name, list(parameters)).replace("'", f"'{path}.", 1)
                raise ConfigError(
                    f"'{path}.{name}' is not a parameter of {node['_target_']}."
                    f"{close or f' It takes: {_names(parameters)}.'}"
                )
    if "_args_" in node:
        return
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    lacking = [name for name in needed if name not in given and name not in extra]
    if lacking and not node.get("_partial_", False):
        raise ConfigError(
            f"'{path}.{lacking[0]}' is missing: {node['_target_']} needs it. Give "
            f"{path}.{lacking[0]}=... or write it in the config of {path}."
        )


def _nested_error(error: Exception, path: str) -> BaseException:
    """Return what went wrong inside a nested node, in our words where it was told in them."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, _TOLD) and cause is not error:
        return cause
    where = path
    for line in str(error).splitlines():
        if line.startswith("full_key: "):
            where = line.removeprefix("full_key: ")
    return ConfigError(f"{where} could not be built: {_sentence(cause)}")


def _sentence(error: BaseException) -> str:
    """Return an error's text on one line, ending in a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _names(parameters: Mapping[str, inspect.Parameter]) -> str:
    return ", ".join(parameters) or "nothing"


def _shown(function: Any, target: str) -> str:
    """Write a signature as names and defaults, without annotations."""
    words = [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(function).parameters.items()
    ]
    return f"{target}({', '.join(words)})"
