"""The values of a composed config: nothing missing, every reference answered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from genscale.errors import ConfigError, GenscaleError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MEANINGS = {  # of references without an answer that say what does not go together
    "data.num_frames": "The model makes clips, but data={name} holds pictures, which have no "
    "frames. Give data=moving_sprites, say, or another model=..."
}
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def check_values(cfg: DictConfig) -> None:
    """Refuse a config with mandatory values (``???``) not given or references not answered.

    Raises:
        ConfigError: all such keys at once, one sentence a line.
    """
    problems = list(_problems(cfg, cfg, ""))
    # a reference to a value that has a problem of its own is not told twice
    first_hand = [sentence for sentence, caused in problems if not caused]
    if problems:
        told = first_hand or [sentence for sentence, _ in problems]
        raise ConfigError("\n".join(dict.fromkeys(told)))


def _problems(node: Any, root: DictConfig, prefix: str) -> Iterator[tuple[str, bool]]:
    """Yield sentences, and whether each follows from a problem elsewhere in the config."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    keys = range(len(node)) if isinstance(node, ListConfig) else list(node.keys())
    for key in keys:
        name = f"{prefix}{key}"
        if OmegaConf.is_missing(node, key):
            yield f"'{name}' has no default and was not given. Give {name}=...", False
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            yield _unanswered(name, node, key, root, error)
            continue
        is_own = not OmegaConf.is_interpolation(node, key)  # else it is checked where it stands
        if is_own and isinstance(value, DictConfig | ListConfig):
            yield from _problems(value, root, f"{name}.")


def _unanswered(
    name: str, node: Any, key: Any, root: DictConfig, error: Exception
) -> tuple[str, bool]:
    """Say why a reference has no answer, and whether what it refers to is the trouble."""
    from omegaconf import OmegaConf

    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, GenscaleError):
        inner = inner.__cause__ or inner.__context__
    if inner is not None:  # a resolver of ours
        return f"'{name}' cannot be computed: {inner}", False
    text = str(OmegaConf.to_container(node, resolve=False)[key])  # type: ignore[index]
    known = list(_all_keys(OmegaConf.to_container(root, resolve=False)))
    for reference in _REFERENCE.findall(text):
        if reference in _MEANINGS and reference not in known:
            return _MEANINGS[reference].format(name=OmegaConf.select(root, "data.name")), False
        if reference not in known:
            close = did_you_mean(reference, known)
            return f"'{name}' is {text}, but there is no '{reference}' in the config.{close}", False
        if OmegaConf.is_missing(root, reference):
            return f"'{name}' is {text}, but '{reference}' was not given.", True
    first = str(error).splitlines()[0].rstrip(".")
    return f"'{name}' is {text}, which cannot be computed: {first}.", bool(_REFERENCE.search(text))


def _all_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _all_keys(value, f"{prefix}{key}.")
