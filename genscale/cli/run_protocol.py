"""What ``evaluate.py`` does where it was not told: the run's own evaluation protocol.

A run's config holds ``metrics`` and ``evaluation`` (number of samples, law of their labels). They
are taken wherever ``evaluate.py`` has null, so that a published recipe is evaluated as published
without a word; whatever is given on the command line wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from genscale.cli.app import conf_directory
from genscale.errors import ConfigError
from genscale.pipeline import exported_config
from genscale.run_weights import is_exported
from genscale.runs import RunFolder


def settle(cfg: DictConfig) -> None:
    """Fill in ``num_samples``, ``labels`` and ``metrics`` of an evaluation, in place.

    Files of samples, and runs older than these settings, have the defaults of training.

    Raises:
        ConfigError: ``cfg.run`` is no run, or its metrics name foreign code.
        CheckpointError: it is an exported folder that is damaged.
    """
    own = _own_config(cfg)
    _check_targets(own.get("metrics"))
    evaluation = {**_default("train")["evaluation"], **(own.get("evaluation") or {})}
    metrics = metrics_node(
        OmegaConf.to_container(cfg.metrics, resolve=True),  # type: ignore[arg-type]
        own.get("metrics") or _default("metrics/quick"),
        any_count=cfg.num_samples is not None or cfg.samples is not None,
    )
    if cfg.reference is not None:
        metrics.pop("reference", None)
    with open_dict(cfg):
        cfg.metrics = OmegaConf.create(metrics)
        for name in ("num_samples", "labels"):
            if cfg[name] is None:
                cfg[name] = evaluation[name]


def metrics_node(given: dict[str, Any], own: dict[str, Any], *, any_count: bool) -> dict[str, Any]:
    """Return the metrics to compute: a group that names metrics and features, or the run's own.

    Args:
        given: of ``evaluate.py``; null stands for the run's own setting.
        own: of the run.
        any_count: another number of samples was asked for than the run's protocol demands; the
            number is part of a value's protocol, so that nothing is compared by mistake.
    """
    if given.get("metrics") and given.get("features"):
        return given
    changes = {name: value for name, value in given.items() if value is not None}
    if any_count:
        own = {name: value for name, value in own.items() if name != "num_samples"}
    return {**own, **changes}


def _own_config(cfg: DictConfig) -> dict[str, Any]:
    if cfg.samples is not None:
        return {}
    if is_exported(cfg.run):
        return exported_config(Path(str(cfg.run)).expanduser())
    return RunFolder.open(cfg.run).config()


def _check_targets(node: Any) -> None:
    """Refuse code that is not genscale's: a config beside a checkpoint may not run any."""
    if isinstance(node, dict):
        target = str(node.get("_target_", "genscale."))
        if not target.startswith("genscale."):
            raise ConfigError(
                f"The run's metrics name {target}, but only genscale's own may be built from a "
                "run's config. Give metrics=..."
            )
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_targets(part)


def _default(name: str) -> dict[str, Any]:
    """Read one file of the config tree as it stands."""
    import yaml

    content: dict[str, Any] = yaml.safe_load((conf_directory() / f"{name}.yaml").read_text())
    return content
