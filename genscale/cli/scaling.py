"""``python -m genscale.cli.scaling``: every search at every budget, resumable, with a report."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.app import conf_directory, instantiate, main
from genscale.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from genscale.pipeline import GenerationPipeline
    from genscale.search.base import Search
    from genscale.search.setup import SearchSetup

PLAIN = "none"
_PARTS: tuple[str, ...] = (
    "run",
    "checkpoint",
    "weights",
    "reward",
    "held_out",
    "num_prompts",
    "prompts",
    "labels",
)
_PARTS += ("precision", "micro_batch", "batch_size")


def run(cfg: DictConfig) -> None:
    """Fill in the cells of the study that are missing, then tell all of it."""
    from genscale.cli.loading import load_pipeline
    from genscale.cli.scaling_results import write_study

    _check(cfg)
    pipeline, sampler, guidance = load_pipeline(cfg)
    setup, prompts = _setup(cfg, pipeline)
    searches = {name: _search(name) for name in cfg.methods}
    problems = [
        problem
        for search in searches.values()
        for problem in search.problems(pipeline.sampler, setup.reward)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    settings = _settings(cfg, sampler, guidance)
    folder = _folder(cfg, settings)
    cells = list(_cells(cfg, searches))
    for number, (name, budget, seed) in enumerate(cells, start=1):
        file = folder / "cells" / f"{name}-{budget:g}x-seed{seed}.json"
        if file.is_file():
            _verify(file)
            continue
        print(f"{number} of {len(cells)}: {name} at {budget:g} times, seed {seed}")
        search = searches.get(name)
        _fill(cfg, file, pipeline, setup, prompts, search=search, budget=budget, seed=seed)
    print(write_study(folder, settings))


def _check(cfg: DictConfig) -> None:
    """Raise one error for everything that is wrong in the settings."""
    from genscale.cli.numbers import number_problems

    problems = number_problems(cfg, {"num_prompts": 1, "batch_size": 1, "micro_batch": 1})
    known = sorted(path.stem for path in (conf_directory() / "search").glob("*.yaml"))
    known.remove(PLAIN)
    for name in cfg.methods:
        if name not in known:
            problems.append(
                f"methods names '{name}', which is no search. Known are {', '.join(known)}."
                f"{did_you_mean(str(name), known)}"
            )
    for key, least in (("budgets", 1), ("seeds", None), ("methods", None)):
        values = cfg[key]
        if not OmegaConf.is_list(values) or not values:
            problems.append(f"{key} must be a list with an entry, but {values!r} was given.")
        elif least is not None and not all(isinstance(v, int | float) and v >= 1 for v in values):
            problems.append(
                f"budgets must be numbers of at least 1, one plain sample, but "
                f"{OmegaConf.to_container(values)} was given."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _setup(cfg: DictConfig, pipeline: GenerationPipeline) -> tuple[SearchSetup, list[str] | None]:
    """Return rewards and limits that all cells share, and the prompts."""
    from genscale.cli.loading import datasets_of
    from genscale.cli.searching import build_setup, check_requests, sample_requests
    from genscale.evaluation import heldout_captions
    from genscale.prompts import read_prompts
    from genscale.search.plain import PlainSampling

    setup = build_setup(cfg, PlainSampling(), pipeline)
    prompts = read_prompts(cfg.prompts)
    if prompts is None and pipeline.text is not None:
        prompts = heldout_captions(datasets_of(cfg.run), cfg.num_prompts)
    labels = _labels(cfg)
    asked = sample_requests(pipeline, labels, prompts, cfg.num_prompts, 0)
    check_requests(setup, asked)
    return setup, prompts


def _labels(cfg: DictConfig) -> Any:
    from genscale.cli.sample import label_law

    return label_law(cfg)


def _search(name: str) -> Search:
    """Build a search whose size follows the budget.

    Raises:
        ConfigError: it has no such setting.
    """
    node = _search_node(name)
    search: Search = instantiate(OmegaConf.create(node), f"search {name}")
    if search.grows is None:
        raise ConfigError(
            f"search {name} has no setting that follows a budget, so that its cost cannot be "
            "scaled. Leave it out of methods."
        )
    grown: Search = instantiate(OmegaConf.create({**node, search.grows: None}), f"search {name}")
    return grown


def _search_node(name: str) -> dict[str, Any]:
    """Read a search of the config tree together with the one it varies."""
    import yaml

    node: dict[str, Any] = yaml.safe_load(
        (conf_directory() / "search" / f"{name}.yaml").read_text()
    )
    merged: dict[str, Any] = {}
    for base in node.pop("defaults", []):
        if base != "_self_":
            merged |= _search_node(base)
    return merged | node


def _settings(cfg: DictConfig, sampler: dict[str, Any], guidance: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal for two cells to stand in one study."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    known = {name: plain[name] for name in _PARTS} | {"sampler": sampler, "guidance": guidance}
    # only where it is asked for: studies that were begun before there was a choice go on
    if plain["size"] is not None:
        known["size"] = plain["size"]
    if not plain["resolution"]["_target_"].endswith(".NoScaling"):
        known["resolution"] = plain["resolution"]
    if not plain["upscaling"]["_target_"].endswith(".NoUpscaling"):
        known["upscaling"] = plain["upscaling"]
    return known


def _folder(cfg: DictConfig, settings: dict[str, Any]) -> Path:
    """Return the study's folder; one of other settings is refused.

    Raises:
        DataError: the folder holds a study of other settings.
    """
    from genscale.io.files import write_json
    from genscale.run_weights import is_exported
    from genscale.runs import RunFolder

    text = json.dumps(settings, sort_keys=True)
    if cfg.out_dir:
        folder = Path(cfg.out_dir).expanduser()
    else:
        base = Path(cfg.run) if is_exported(cfg.run) else RunFolder.open(cfg.run).path
        folder = base / "scaling" / hashlib.sha256(text.encode()).hexdigest()[:8]
    file = folder / "settings.json"
    if file.is_file():
        known = json.loads(file.read_text())
        asked = json.loads(text)
        other = sorted(key for key in asked | known if known.get(key) != asked.get(key))
        if other:
            raise DataError(
                f"{folder} holds a study with other {', '.join(other)}. Give another out_dir, or "
                "the settings of that study to go on with it."
            )
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
    return folder


def _cells(cfg: DictConfig, searches: dict[str, Search]) -> Iterator[tuple[str, float, int]]:
    """Yield (search, budget, seed), cheap ones first: an early look shows all methods."""
    for seed in cfg.seeds:
        yield PLAIN, 1.0, int(seed)
    for budget in sorted(set(cfg.budgets)):
        for seed in cfg.seeds:
            for name in searches:
                yield name, float(budget), int(seed)


def _verify(file: Path) -> None:
    try:
        json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}. Delete it; it will be made again.") from error


def _fill(
    cfg: DictConfig,
    file: Path,
    pipeline: GenerationPipeline,
    setup: SearchSetup,
    prompts: list[str] | None,
    *,
    search: Search | None,
    budget: float,
    seed: int,
) -> None:
    """Make one cell: all prompts, one search, one budget, one seed."""
    import torch

    from genscale.cli.searching import plain_cost, searched
    from genscale.io.files import write_json
    from genscale.io.video import save_overview
    from genscale.search.budget import Budget

    if search is not None:
        limit = budget * plain_cost(pipeline, prompts)
        setup = replace(setup, search=search, budget=Budget(nfe=limit))
    stream = {
        "num_samples": cfg.num_prompts,
        "labels": _labels(cfg),
        "prompts": prompts,
        "seed": seed,
        "batch_size": cfg.batch_size,
    }
    records: list[dict[str, Any]] = []
    images, seconds = [], 0.0
    for batch, found in searched(pipeline, setup, stream, total=cfg.num_prompts, show=True):
        images.append(batch.images)
        for each in found:
            records.append({k: v for k, v in each.items() if k != "tree"})
        assert batch.search is not None
        seconds += batch.search.seconds
    grid = file.with_suffix(".png")
    save_overview(torch.cat(images)[:32], grid, frame_rate=pipeline.frame_rate, columns=8)
    write_json(
        file,
        {
            "method": file.stem.rpartition("-seed")[0].rpartition("-")[0],
            "search": setup.label,
            "budget": budget,
            "seed": seed,
            "seconds": round(seconds, 3),
            "samples": records,
        },
    )


if __name__ == "__main__":
    sys.exit(main("scaling", "genscale.cli.scaling:run"))
