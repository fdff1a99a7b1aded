"""Where a training run lives, and what it continues from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genscale import dist
from genscale.errors import ConfigError
from genscale.runs import RunFolder, new_folder, newest_run

# what may differ between a run and its continuation
FREE_ON_RESUME = (
    *("trainer", "logger", "callbacks", "checkpoint_blocks", "evaluation"),
    *("resume", "run_dir", "paths"),
)
# what runs had before there was a choice
_NO_TEXT = {
    "_target_": "genscale.conditioning.text.NoText",
    "num_tokens": 0,
    "token_size": 0,
    "pooled_size": 0,
}
_LOW_RESOLUTION = {
    "_target_": "genscale.conditioning.low_resolution.LowResolution",
    "factor": 4,
    "max_level": 0.5,
    "level": 0.1,
}
_RUN_DIR_VARIABLE = "GENSCALE_RUN_DIR"  # tells processes that Lightning starts where the run is


def locate(cfg: DictConfig) -> tuple[RunFolder, Path | None]:
    """Return the run folder and the checkpoint to continue from, if any."""
    outputs = Path(cfg.paths.outputs).expanduser()
    told = os.environ.get(_RUN_DIR_VARIABLE)
    if told and os.environ.get("LOCAL_RANK", "0") != "0":
        folder = RunFolder(Path(told))
    elif cfg.resume is not None:
        folder = _find_resumed(cfg, outputs)
    else:
        parent = (outputs / cfg.name).absolute()
        job = _batch_job()
        if cfg.run_dir:
            folder = RunFolder(Path(cfg.run_dir).expanduser().absolute())
        elif job:
            folder = RunFolder(parent / f"slurm-{job}")
        else:
            folder = RunFolder(Path(dist.agree("run", lambda: str(new_folder(parent)))))
        if folder.checkpoints() and not job:
            raise ConfigError(
                f"run_dir={folder.path} already holds a run with checkpoints. "
                "Continue it with resume=latest, or give another run_dir."
            )
    os.environ[_RUN_DIR_VARIABLE] = str(folder.path)
    return folder, _checkpoint_to_resume(cfg, folder)


def _batch_job() -> str | None:
    """Return the number of the SLURM job this is, which a requeued job keeps.

    Many runs may be started by hand from one interactive job: they are runs of their own.
    """
    by_hand = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return None if by_hand else os.environ.get("SLURM_JOB_ID")


def _find_resumed(cfg: DictConfig, outputs: Path) -> RunFolder:
    if cfg.resume != "latest":
        path = Path(cfg.resume).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"resume={cfg.resume} is no checkpoint file. Give resume=latest or the path of a "
                "checkpoints/step-*.ckpt file."
            )
        folder = RunFolder(path.resolve().parent.parent)
        if not folder.config_file.is_file():
            raise ConfigError(
                f"resume={cfg.resume} lies in no run folder: {folder.config_file} was expected. "
                "Give the checkpoint where its run left it, in <run>/checkpoints."
            )
        return folder
    if cfg.run_dir:
        return RunFolder.open(cfg.run_dir)
    found = newest_run(outputs / cfg.name)
    if found is None:
        raise ConfigError(
            f"resume=latest found no run named '{cfg.name}' in {outputs}. "
            "Start it without resume, or give its name= or run_dir=."
        )
    return found


def _checkpoint_to_resume(cfg: DictConfig, folder: RunFolder) -> Path | None:
    """Return the checkpoint to continue from after comparing the two configs key by key."""
    continued = cfg.resume is not None or bool(folder.checkpoints())
    if not continued:
        return None
    before = _flatten(
        {"text_encoder": _NO_TEXT, "low_resolution": _LOW_RESOLUTION, **folder.config()}
    )
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    now = _flatten({"text_encoder": _NO_TEXT, "low_resolution": _LOW_RESOLUTION, **given})
    # shortest first: what others refer to is named before what follows from it
    for key in sorted({*before, *now}, key=lambda key: (key.count("."), key)):
        if key.split(".")[0] not in FREE_ON_RESUME and before.get(key) != now.get(key):
            raise ConfigError(
                f"The run in {folder.path} was started with {key}={before.get(key)}, but "
                f"{key}={now.get(key)} was given. Resume with the same value; only trainer, logger "
                "and callbacks may differ."
            )
    if cfg.resume not in (None, "latest"):
        return Path(cfg.resume).expanduser().resolve()
    # a run killed before its first checkpoint starts again in its folder
    return folder.checkpoint("latest") if folder.checkpoints() else None


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        flat: dict[str, Any] = {}
        for name, value in node.items():
            flat |= _flatten(value, f"{prefix}{name}.")
        return flat
    return {prefix[:-1]: node}
