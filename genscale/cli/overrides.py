"""The words of a command line, checked against the config before Hydra sees them.

Hydra answers a misspelt key with the advice to *append* it. Here every ``key=value`` is looked up
first: a key that stands in the composed config passes, a key that is a parameter of the node's
``_target_`` passes too (defaults live in constructors, not in YAML, so it is turned into Hydra's
``++key=value``), and anything else is refused with the closest name there is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genscale.cli.signatures import Signature, read_signature
from genscale.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_WRITE = "Write settings as key=value, for example model=dimr or trainer.max_steps=1000"


def prepare_overrides(
    overrides: Sequence[str],
    *,
    conf_dir: Path,
    config_name: str,
    multirun: bool = False,
    search_path: Sequence[str] = (),
) -> list[str]:
    """Check overrides and return them as Hydra needs them.

    Args:
        overrides: as typed, without flags.
        conf_dir: absolute folder of the config tree.
        config_name: primary config, without ``.yaml``.
        multirun: values may be sweeps; every combination of swept groups is checked.
        search_path: further config folders (``--config-dir``).

    Raises:
        ConfigError: bad syntax, an unknown key, or an unknown group option.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    placed = _placed_groups(conf_dir / f"{config_name}.yaml")
    parsed = [_parse(_as_placed(text, placed), multirun=multirun) for text in overrides]
    lines = [override.input_line or "" for override in parsed]
    with initialize_config_dir(str(conf_dir), version_base="1.3", job_name=config_name):
        groups = _Groups([*search_path, *_given_search_path(parsed)], config_name)
        for override in parsed:
            groups.check(override)
        selections = [o for o in parsed if groups.selects(o)]
        values = [
            index
            for index, override in enumerate(parsed)
            if not override.is_hydra_override() and not groups.selects(override)
        ]
        for choice in _combinations(selections, groups):
            cfg = compose(config_name, overrides=[*groups.search_override, *choice])
            tree = _Tree(
                OmegaConf.to_container(cfg, resolve=False),
                config_name=config_name,
                groups=groups.names,
            )
            for index in values:
                if tree.adds(parsed[index]):
                    lines[index] = f"++{parsed[index].input_line}"
    return lines


def _placed_groups(primary: Path) -> dict[str, str]:
    """Return the groups that a config puts under another name, by that name.

    A defaults list with ``reward@held_out: none`` lets ``held_out=scenes`` choose a reward.
    """
    import yaml

    if not primary.is_file():  # of a search path
        return {}
    defaults = yaml.safe_load(primary.read_text()).get("defaults") or []
    entries = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    return {
        entry.partition("@")[2]: entry
        for entry in entries
        if "@" in entry and not entry.startswith("override ")
    }


def _as_placed(text: str, placed: dict[str, str]) -> str:
    key, equals, value = text.partition("=")
    return f"{placed[key]}{equals}{value}" if key in placed else text


def _parse(text: str, *, multirun: bool) -> Override:
    """Parse one override; a plain value that Hydra's grammar cannot read is taken literally."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    key, equals, value = text.partition("=")
    try:
        override = parser.parse_override(text)
    except HydraException as error:
        if not equals:
            raise ConfigError(f"'{text}' is no setting. {_WRITE}.") from error
        if not key or not value or value[0] in "[{'\"" or set(value) & set(",'\""):
            raise ConfigError(
                f"'{text}' cannot be read. {_WRITE}; a list is key=[a,b], and a value with "
                "commas, brackets or quotes in it needs quotes of its own: key='\"a, b\"'."
            ) from error
        # paths with ~, =, brackets or letters beyond ASCII
        escaped = value.replace("\\", "\\\\") if value.endswith("\\") else value
        try:
            override = parser.parse_override(f"{key}='{escaped}'")
        except HydraException:
            raise ConfigError(f"'{text}' cannot be read. {_WRITE}.") from error
    if not override.key_or_group:
        raise ConfigError(f"'{text}' has no key before '='. {_WRITE}.")
    if override.is_sweep_override() and not multirun:
        raise ConfigError(
            f"'{text}' gives several values to '{override.key_or_group}'. "
            f"Add -m to run one job for each, or write {override.key_or_group}=[...] for a list."
        )
    return override


def _given_search_path(parsed: Sequence[Override]) -> list[str]:
    for override in parsed:
        value = override.value()
        if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
            return [str(item) for item in value]
    return []


class _Groups:
    """The config groups and their options, as Hydra finds them on its search path."""

    def __init__(self, search_path: Sequence[str], config_name: str) -> None:
        from hydra.core.global_hydra import GlobalHydra

        self._loader = GlobalHydra.instance().config_loader()
        self._config_name = config_name
        listed = ",".join(f"'{path}'" for path in search_path)
        self.search_override = [f"hydra.searchpath=[{listed}]"] if search_path else []
        self._options: dict[str, list[str]] = {}
        self.names = [name for name in self._loader.list_groups("") if name != "hydra"]

    def options(self, group: str) -> list[str]:
        """Return the options of a group; an empty list where there is no such group."""
        if group not in self._options:
            self._options[group] = self._loader.get_group_options(
                group, config_name=self._config_name, overrides=self.search_override
            )
        return self._options[group]

    def selects(self, override: Override) -> bool:
        """Return whether an override chooses a group's option rather than sets a value."""
        is_value = isinstance(override.value(), dict) or "." in override.key_or_group
        group = override.key_or_group
        return not is_value and (group in self.names or bool(self.options(group)))

    def chosen(self, override: Override) -> list[str]:
        """Return the options that an override names, sweeps written out."""
        from hydra.core.override_parser.types import Glob

        if override.is_delete():
            return []
        value = override.value()
        if isinstance(value, Glob):
            return value.filter(self.options(override.key_or_group))
        if override.is_sweep_override():
            return [str(item).strip("'\"") for item in override.sweep_string_iterator()]
        items = value if isinstance(value, list) else [value]
        return [str(item) for item in items if item is not None]

    def check(self, override: Override) -> None:
        """Refuse options that do not exist."""
        if not self.selects(override):
            return
        group, options = override.key_or_group, self.options(override.key_or_group)
        if not override.is_delete() and override.value() is None:
            raise ConfigError(
                f"'{override.input_line}' chooses nothing: {group} takes one of "
                f"{', '.join(options)}. Leave it out for its default."
            )
        for option in self.chosen(override):
            known = option in options or option.removesuffix(".yaml") in options or "/" in option
            if not known:
                raise ConfigError(
                    f"'{option}' is not an option of {group}, which has: "
                    f"{', '.join(options) or 'none'}."
                    f"{did_you_mean(option, options)}"
                )


def _combinations(selections: Sequence[Override], groups: _Groups) -> Iterator[list[str]]:
    """Yield one list of plain group choices for every job that a sweep over groups makes."""
    choices = []
    for override in selections:
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={option}" for option in groups.chosen(override)])
        else:
            choices.append([override.input_line or ""])
    for combination in itertools.product(*choices):
        yield list(combination)


@dataclass
class _Tree:
    """A composed config as plain containers, and what may be set in it."""

    root: Any
    config_name: str
    groups: list[str]
    added: set[str] = field(default_factory=set)  # keys that earlier overrides brought in

    def adds(self, override: Override) -> bool:
        """Return whether a setting must be added, being a constructor's parameter not in the YAML.

        Raises:
            ConfigError: it is neither in the config nor a parameter.
        """
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or override.is_delete():
            self.added.add(key)
            return False
        if any(key == known or key.startswith(f"{known}.") for known in self.added):
            return False
        if isinstance(override.value(), dict):
            self.added.add(key)  # a whole mapping: its own keys are its own affair
        node, path = self.root, ""
        for part in key.split("."):
            if isinstance(node, list) or (isinstance(node, str) and "${" in node):
                return False  # list indices and references are Hydra's to follow
            if not isinstance(node, dict):
                raise ConfigError(
                    f"'{path}' holds a single value ({'null' if node is None else node}), so "
                    f"'{key}' cannot be set. Give {path}=... instead."
                )
            if part not in node:
                signature = self._signature(node, path)
                if signature is not None and part in signature and not part.startswith("_"):
                    return True
                raise ConfigError(self._unknown(key, path, part, node, signature))
            node, path = node[part], f"{path}.{part}" if path else part
        return False

    def _signature(self, node: dict[str, Any], path: str) -> Signature | None:
        target = node.get("_target_")
        if not isinstance(target, str) or not path:
            return None
        return read_signature(target) or _import_signature(target, path)

    def _unknown(
        self, key: str, path: str, part: str, node: dict[str, Any], signature: Signature | None
    ) -> str:
        """Say what is unknown and name the closest thing there is."""
        known = [str(name) for name in node if not str(name).startswith("_")]
        known += [n for n in (signature.parameters if signature else ()) if n not in known]
        if not path:
            known += [name for name in self.groups if name not in known]
            what = f"'{key}' is not a known option of {self.config_name}."
        elif signature is not None:
            what = f"'{key}' is not a parameter of {signature.target}."
        else:
            what = f"'{key}' is not a known option of {path}."
        prefix = f"{path}." if path else ""
        namesakes = list(_keys_ending_in(self.root, part))
        close = did_you_mean(part, known)
        if close:
            return what + close.replace("'", f"'{prefix}", 1)
        if namesakes:
            return f"{what} Did you mean {' or '.join(repr(name) for name in namesakes[:3])}?"
        return f"{what} It takes: {', '.join(sorted(known)) or 'nothing'}."


def _keys_ending_in(node: Any, name: str, prefix: str = "") -> Iterator[str]:
    """Yield the full keys of all places in a config that are called ``name``."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == name:
            yield f"{prefix}{key}"
        yield from _keys_ending_in(value, name, f"{prefix}{key}.")


def _import_signature(target: str, path: str) -> Signature | None:
    """Ask the imported object, for targets without Python source; None where it does not say."""
    import inspect

    from hydra.utils import get_object

    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except ImportError as error:
        raise ConfigError(
            f"'{path}._target_' names {target}, which cannot be imported. "
            f"Mend {path} in the config."
        ) from error
    except (TypeError, ValueError):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return Signature(
        target,
        {
            p.name: None if p.default is p.empty else repr(p.default)
            for p in parameters
            if p.kind in named
        },
        accepts_any=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )
