"""Which published recipe fits a network, and what it says of objective, sampler and autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from genscale.errors import ConfigError, did_you_mean

PARTS = ("model", "objective", "sampler", "guidance", "autoencoder")
_OF_TOKENIZER = ("scales", "vocab_size", "latent_channels")
_LATENTS = {4: "sd_vae", 16: "flux_vae"}  # channels -> option of conf/autoencoder


def published(family: str, conf_dir: Path) -> list[str]:
    """Return the options of ``conf/model`` that are sizes of a family."""
    return sorted(path.stem for path in (conf_dir / "model").glob(f"{family}_*.yaml"))


def nearest(family: str, settings: Mapping[str, Any], conf_dir: Path) -> str:
    """Return the size of a family whose written settings are nearest to a network's.

    Numbers differ by the logarithm of their ratio, other settings by one. The small size of the
    family's own name is no candidate: it is trained by a recipe of ours. Networks that read text
    and those that do not are not each other's, where there are any of their own kind.
    """
    from genscale.conditioning.text import reads_text

    folder, text = conf_dir / "model", reads_text(settings)

    def distance(name: str) -> float:
        own = {key: value for key, value in _content(name, folder).items() if not _refers(value)}
        return sum(_apart(settings[key], own[key]) for key in own if key in settings)

    names = published(family, conf_dir)
    alike = [
        name
        for name in names
        if text == any(_refers(x, "text_encoder.") for x in _content(name, folder).values())
    ]
    return min(alike or names, key=distance)


def check_recipe(recipe: str, conf_dir: Path) -> None:
    """Check that ``conf/model`` has an option.

    Raises:
        ConfigError: it has not.
    """
    known = sorted(path.stem for path in (conf_dir / "model").glob("*.yaml"))
    if recipe not in known:
        raise ConfigError(
            f"recipe must be an option of conf/model, but '{recipe}' was given."
            f"{did_you_mean(recipe, known)}"
        )


def compose_recipe(
    recipe: str, *, target: str, settings: Mapping[str, Any], autoencoder: Mapping[str, Any]
) -> dict[str, Any]:
    """Compose a recipe around a network; to be called inside a job of Hydra.

    Args:
        recipe: option of ``conf/model``.
        target: dotted path of the network's class.
        settings: its constructor's arguments.
        autoencoder: settings that are not null replace those of the autoencoder of latents.

    Returns:
        the parts that sampling needs, and ``data_info``, as plain containers.
    """
    from hydra import compose

    from genscale.conditioning.text import reads_text

    channels = settings.get("in_channels")
    # a scale-wise network keeps the tokenizer of its recipe
    words = [] if channels is None else [f"autoencoder={_LATENTS.get(channels, 'identity')}"]
    cfg = compose("train", overrides=[f"model={recipe}", *words])
    with open_dict(cfg):
        cfg.model = {"_target_": target, **settings}
        if channels is None:
            cfg.autoencoder.update({name: settings[name] for name in _OF_TOKENIZER})
        else:
            cfg.data.channels = channels
        given = {name: value for name, value in autoencoder.items() if value is not None}
        cfg.autoencoder = {**cfg.autoencoder, **given}
    _mend_variance(cfg, learned=bool(settings.get("learn_sigma")))
    parts = (*PARTS, "text_encoder") if reads_text(settings) else PARTS
    config = {part: OmegaConf.to_container(cfg[part], resolve=True) for part in parts}
    # what is known of the pictures that a published network has seen
    config["data_info"] = {"num_classes": settings.get("num_classes", 0), "class_names": []}
    return config


def _mend_variance(cfg: DictConfig, *, learned: bool) -> None:
    """Sample a network without learned variance with the posterior's own."""
    if cfg.sampler.get("variance") == "learned" and not learned:
        cfg.sampler.variance = "lower"


def _content(name: str, folder: Path) -> dict[str, Any]:
    """Read the values in a model's YAML and in those it builds on."""
    import yaml

    content = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            settings |= _content(base, folder)
    settings |= content
    return {key: value for key, value in settings.items() if key != "_target_"}


def _refers(value: Any, to: str = "") -> bool:
    """Return whether a value is a reference to another part of the config."""
    return isinstance(value, str) and f"${{{to}" in value


def _apart(one: Any, other: Any) -> float:
    """Return how far two settings are from each other; 0 where they are equal."""
    if isinstance(one, list) or isinstance(other, list):
        size = max(len(x) if isinstance(x, list) else 1 for x in (one, other))
        pairs = [x if isinstance(x, list) else [x] * size for x in (one, other)]
        if len(pairs[0]) != len(pairs[1]):
            return 2.0
        return sum(_apart(a, b) for a, b in zip(*pairs, strict=True)) / size
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (one, other))
    if numbers and min(one, other) > 0:
        return abs(math.log(one / other))
    return 0.0 if one == other else 1.0
