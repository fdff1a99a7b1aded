"""A run that enlarges samples of another one, on the command line: ``base=<run>``."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from genscale.cascade import BaseSamples, ReducedData
from genscale.cli.combinations import model_setting
from genscale.conditioning.low_resolution import LowResolution
from genscale.errors import ConfigError
from genscale.pipeline import GenerationPipeline
from genscale.run_weights import MAIN


def reference_problems(
    model: DictConfig, low_resolution: LowResolution | None, datamodule: Any
) -> list[str]:
    """Return a sentence for everything of the data that references cannot be made of.

    Args:
        model: the model's node.
        low_resolution: how references are made; None where that is told elsewhere.
        datamodule: built.
    """
    channels = model_setting(model, "reference_channels")
    if not channels or low_resolution is None:
        return []
    side = datamodule.resolution
    return low_resolution.problems(channels, (datamodule.channels, side, side))


def place_references(cfg: DictConfig, pipeline: GenerationPipeline, data: Any) -> None:
    """Tell a model that enlarges where its references come from.

    Args:
        cfg: with ``base``, ``base_weights`` and ``reference_level``.
        pipeline: of the model.
        data: function that returns the data module of the run.

    Raises:
        ConfigError: no base for a model that enlarges, one for a model that does not, or one that
            does not fit.
    """
    base, level = cfg.get("base"), cfg.get("reference_level")
    low = pipeline.low_resolution
    if low is None:
        for name, given in (("base", base), ("reference_level", level)):
            if given is not None:
                raise ConfigError(
                    f"{name}={given} is for models that enlarge (model.reference_channels above "
                    f"0), but that of run={cfg.run} does not. Leave it out."
                )
        return
    if base is None:
        raise ConfigError(
            f"The model of run={cfg.run} enlarges low-resolution samples, but none are given. Give "
            "base=<run of a smaller model>, or base=data to enlarge reduced held-out data."
        )
    if base == "data":
        module = data()
        held_out = module.train if module.heldout is None else module.heldout
        found = ReducedData(held_out, low, level, device=pipeline.device)
        pipeline.references = found if pipeline.size is None else found.at(pipeline.decoded_shape)
        return
    weights = str(cfg.get("base_weights") or MAIN)
    smaller = GenerationPipeline.load(base, weights=weights, device=pipeline.device)
    if smaller.low_resolution is not None:
        raise ConfigError(
            f"base={base} enlarges samples itself, and would need a base of its own. Give the run "
            "of a model that starts from noise alone."
        )
    smaller.set_precision(pipeline.precision)
    if pipeline.size is not None:
        smaller.set_size(low.sides_below(pipeline.size))
    pipeline.references = BaseSamples(
        smaller, pipeline.decoded_shape, low, level, name=str(smaller.origin or base)
    )
