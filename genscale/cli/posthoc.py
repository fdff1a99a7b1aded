"""``python -m genscale.cli.posthoc``: averages of other lengths from a run's snapshots."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genscale.errors import ConfigError

COARSE = 0.1  # residual from which an average is said to be a rough one


def run(cfg: DictConfig) -> None:
    """Write ``<run>/averages/posthoc_<sigma_rel>.safetensors`` for every width asked for."""
    from genscale.runs import RunFolder
    from genscale.training.posthoc import choose_snapshots, combine, reconstruct, save_average

    widths, step = _widths(cfg), _step(cfg)
    folder = RunFolder.open(cfg.run)
    snapshots, wanted = choose_snapshots(folder.ema_snapshots_dir, widths, step)
    combinations = [combine(list(snapshots), profile) for profile in wanted]
    states = reconstruct(snapshots, combinations)
    for profile, combination, state in zip(wanted, combinations, states, strict=True):
        name = f"posthoc_{profile.sigma_rel}" + (f"_step-{step}" if step is not None else "")
        path = folder.averages_dir / f"{name}.safetensors"
        save_average(state, path, profile=profile, combination=combination)
        rough = ", a rough one: more snapshots are needed" if combination.residual > COARSE else ""
        print(
            f"{path}: step {profile.step}, from {len(snapshots)} snapshots, "
            f"residual {combination.residual:.2%}{rough}"
        )
    print(f"evaluate: python evaluate.py run={cfg.run} weights={name}")


def _widths(cfg: DictConfig) -> list[float]:
    value = cfg.sigma_rel
    given: Any = OmegaConf.to_container(value) if OmegaConf.is_config(value) else [value]
    numbers = isinstance(given, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in given
    )
    if not numbers or not given or len(set(given)) < len(given):
        raise ConfigError(
            f"sigma_rel must be a number or a list of different numbers, but {given} was given. "
            "Give e.g. sigma_rel=[0.03,0.08]."
        )
    return [float(x) for x in given]


def _step(cfg: DictConfig) -> int | None:
    if cfg.step is not None and (not isinstance(cfg.step, int) or isinstance(cfg.step, bool)):
        raise ConfigError(
            f"step must be a whole number, but {cfg.step!r} was given. Leave it out for the last."
        )
    return cfg.step


if __name__ == "__main__":
    from genscale.cli.app import main

    sys.exit(main("posthoc", "genscale.cli.posthoc:run"))
