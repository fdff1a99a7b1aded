"""``python -m genscale.cli.import_checkpoint``: published weights as a folder of ours."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.app import conf_directory
from genscale.cli.app import main as front_door
from genscale.cli.failures import report
from genscale.cli.recipes import check_recipe, compose_recipe, nearest
from genscale.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("official", "diffusers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; parameters of the network may be given without a prefix.

    Returns:
        exit status, see :func:`genscale.cli.app.main`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        words = with_settings(arguments)
    except Exception as error:
        return report(error)
    return front_door("import_checkpoint", "genscale.cli.import_checkpoint:run", argv=words)


def with_settings(arguments: Sequence[str]) -> list[str]:
    """Write words that are parameters of the network as entries of ``settings``.

    Raises:
        ConfigError: a word is neither a parameter nor a setting of the command.
    """
    own = list(OmegaConf.load(conf_directory() / "import_checkpoint.yaml"))
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    unknown = [key for key in given if key.isidentifier() and key not in own]
    if not unknown:
        return list(arguments)
    from genscale.io.converters import converter, families  # torch, so not for --help

    if "family" not in given:
        close = did_you_mean(unknown[0], list(map(str, own)))
        raise ConfigError(
            f"family was not given, but '{unknown[0]}' was.{close} Give family= one of "
            f"{', '.join(families())}."
        )
    backbone = converter(given["family"]).BACKBONE
    parameters = list(inspect.signature(backbone).parameters)
    for key in unknown:
        if key not in parameters:
            close = did_you_mean(key, [*map(str, own), *parameters])
            raise ConfigError(
                f"'{key}' is neither a setting of this command nor a parameter of "
                f"{backbone.__name__}.{close or ' See --help.'}"
            )
    prefixed = {word: f"++settings.{word}" for word in arguments if word.split("=")[0] in unknown}
    return [prefixed.get(word, word) for word in arguments]


def run(cfg: DictConfig) -> None:
    """Read the file, recognise the network, and write the folder."""
    from genscale.autoencoders.base import Autoencoder
    from genscale.io.converters import converter
    from genscale.io.files import atomic_folder
    from genscale.io.model_card import model_card
    from genscale.pipeline import EXPORTED, GenerationPipeline

    family = converter(cfg.family)
    if cfg.recipe is not None:
        check_recipe(str(cfg.recipe), conf_directory())
    model = _network(cfg, family)
    if isinstance(model, Autoencoder):
        _write_autoencoder(cfg, model)
        return
    settings = {name: value for name, value in model.config.items() if name[0] != "_"}
    recipe = cfg.recipe or nearest(cfg.family, settings, conf_directory())
    backbone = family.BACKBONE
    config = compose_recipe(
        recipe,
        target=f"{backbone.__module__}.{backbone.__qualname__}",
        settings=settings,
        autoencoder=OmegaConf.to_container(cfg.autoencoder, resolve=True),  # type: ignore[arg-type]
    )
    pipeline = GenerationPipeline.from_config(config, model=model)
    target = Path(str(cfg.out)).expanduser()
    with atomic_folder(target) as folder:
        pipeline.save_pretrained(folder, config)
        card = model_card(
            model,
            {key: config[key] for key in EXPORTED},
            origin=f"{_origin(cfg)}, recipe {recipe}.",
            use="python sample.py run=<this folder> num_samples=16",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    _tell(cfg, config, model, recipe, target)


def _write_autoencoder(cfg: DictConfig, model: Any) -> None:
    """Write an autoencoder, which has no objective and no sampler, as a folder of weights.

    Raises:
        ConfigError: a setting that belongs to a network of latents.
    """
    from genscale.backbones.base import parameter_count
    from genscale.io.files import atomic_folder
    from genscale.io.model_card import model_card

    given = {"recipe": cfg.recipe, **{f"autoencoder.{k}": v for k, v in cfg.autoencoder.items()}}
    for key, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{key}={value} belongs to a generative network, but family={cfg.family} is an "
                "autoencoder. Leave it out."
            )
    target = Path(str(cfg.out)).expanduser()
    settings = {name: value for name, value in model.config.items() if name[0] != "_"}
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        card = model_card(
            model,
            {"data_info": {}, "model": settings},
            origin=f"{_origin(cfg)}.",
            use="python train.py model=var autoencoder=var_vqvae autoencoder.run=<this folder>",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    if "scales" not in cfg.settings:
        scales = str(settings["scales"]).replace(" ", "")
        print(f"scales={scales} is assumed: no shape tells them")
    print(f"{type(model).__name__} of {parameter_count(model):,} parameters: {target}")
    print(f"use:      autoencoder.run={target}")


def _origin(cfg: DictConfig) -> str:
    """Say what file was converted."""
    from genscale.metrics.features import file_sha256

    file = Path(str(cfg.file)).expanduser()
    digest = f", SHA-256 {file_sha256(str(file))}" if file.is_file() else ""
    return f"Converted from {file.name}{digest}"


def _network(cfg: DictConfig, family: ModuleType) -> Any:
    """Read the file and return the network with its weights.

    Raises:
        ConfigError: settings that do not fit together.
        CheckpointError: the file cannot be read, or is of another network.
    """
    import torch

    from genscale.io.keys import on_meta
    from genscale.io.weights import assign_strictly

    _check_layout(cfg, family)
    given: dict[str, Any] = OmegaConf.to_container(cfg.settings, resolve=True)  # type: ignore[assignment]
    file = Path(str(cfg.file)).expanduser()
    state, settings = _read(cfg, family, file, given)
    model = on_meta(family.BACKBONE, {**settings, **given})
    convert = family.from_diffusers if cfg.layout == "diffusers" else family.from_official
    ours = convert(state, model)
    assign_strictly(model, ours, device=torch.device("cpu"), source=file)
    return model


def _check_layout(cfg: DictConfig, family: ModuleType) -> None:
    if cfg.layout not in LAYOUTS:
        raise ConfigError(
            f"layout must be one of {', '.join(LAYOUTS)}, but '{cfg.layout}' was given."
            f"{did_you_mean(str(cfg.layout), LAYOUTS)}"
        )
    if cfg.layout == "diffusers":
        if not hasattr(family, "from_diffusers"):
            raise ConfigError(
                "layout=diffusers is known of family=dit, sit and causal_wan, but "
                f"family={cfg.family} was given. Give layout=official."
            )
        if cfg.weights is not None:
            raise ConfigError(
                f"weights={cfg.weights} chooses among those of a training file, but folders of "
                "diffusers hold one set. Leave it out."
            )


def _read(
    cfg: DictConfig, family: ModuleType, file: Path, given: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict, and the settings that can be read off it."""
    from genscale.io.published import read_diffusers, read_state_dict

    if cfg.layout == "diffusers":
        classes = getattr(family, "DIFFUSERS", None)
        state, config = read_diffusers(file, (classes,)) if classes else read_diffusers(file)
        return state, family.config_from_diffusers(config)
    state = read_state_dict(file, cfg.weights, **_where_weights_lie(family))
    heads, size = given.get("num_heads"), given.get("input_size")
    hints: dict[str, Any] = {
        "num_heads": heads if isinstance(heads, int) else None,
        "input_size": size if isinstance(size, int) else None,
    }
    beside = _told_beside(family, file, given) if hasattr(family, "UNTOLD") else {}
    if "scales" in inspect.signature(family.config_from_state_dict).parameters:
        hints["scales"] = given.get("scales", beside.get("scales"))
    found = {**beside, **family.config_from_state_dict(state, **hints)}
    if heads is None and "num_heads" in found and _depends_on_heads(family, state, found, hints):
        print(f"num_heads={found['num_heads']} is assumed, as published: no shape tells it")
    return state, found


def _where_weights_lie(family: ModuleType) -> dict[str, Any]:
    return {
        "nested": getattr(family, "NESTED", ()),
        "containers": getattr(family, "CONTAINERS", {}),
    }


def _told_beside(family: ModuleType, file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in ``config.json`` beside a weight file.

    Raises:
        ConfigError: it is not there, and what it alone would tell is not given either.
    """
    from genscale.io.published import read_settings_beside

    stated = read_settings_beside(file)
    if stated is not None:
        settings: dict[str, Any] = family.config_from_official(stated)
        return settings
    for name in family.UNTOLD:
        if name not in given:
            raise ConfigError(
                f"No tensor tells {name}, and there is no config.json beside {file}, which would. "
                f"Give {name}=true or {name}=false."
            )
    return {}


def _depends_on_heads(
    family: ModuleType, state: dict[str, Tensor], found: dict[str, Any], hints: dict[str, Any]
) -> bool:
    """Return whether the number of heads is a guess, which another hint would change."""
    known = {**hints, "num_heads": 1, "input_size": found.get("input_size")}
    other = family.config_from_state_dict(state, **known)["num_heads"]
    pair = (found["num_heads"], other)
    one, two = (value if isinstance(value, list) else [value] for value in pair)
    return all(a != b for a, b in zip(one, two, strict=True))


def _tell(cfg: DictConfig, config: dict[str, Any], model: Any, recipe: str, target: Path) -> None:
    """Say what was recognised, and how to go on."""
    from genscale.backbones.base import parameter_count

    objective, sampler = (
        config[part]["_target_"].rpartition(".")[2] for part in ("objective", "sampler")
    )
    print(
        f"{type(model).__name__} of {parameter_count(model):,} parameters; recipe {recipe}: "
        f"{objective}, {sampler}"
    )
    needs_source = config["autoencoder"].get("source", "") is None
    needs_run = config["autoencoder"].get("run", "") is None
    if needs_run:
        print("its tokens are those of a tokenizer, a folder of its own: name it to sample")
    if needs_source:
        print("its pictures are latents, whose autoencoder is a file of its own: name it to sample")
    source = " autoencoder.source=<folder or hub id>" if needs_source else ""
    source += " autoencoder.run=<its folder>" if needs_run else ""
    print(f"sample:   python sample.py run={target} num_samples=16{source}")


if __name__ == "__main__":
    sys.exit(main())
