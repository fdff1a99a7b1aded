"""The folder of a run: where its config, checkpoints, samples and numbers lie."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from genscale.errors import CheckpointError, ConfigError

_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt$")


def stamp() -> str:
    """Return the local time as a folder name: yyyy-mm-dd_hh-mm-ss."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run on disk.

    Args:
        path: the folder; :meth:`open` checks that it is one.
    """

    path: Path

    @staticmethod
    def open(path: str | Path) -> RunFolder:
        """Open an existing run; ``outputs/latest`` and links are followed.

        Raises:
            ConfigError: there is no run at ``path``.
        """
        folder = Path(path).expanduser()
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"run={path} is no run folder: a folder with config.yaml and checkpoints/ was "
                "expected. Train one with: python train.py model=dimr"
            )
        return RunFolder(folder.resolve())

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def checkpoints_dir(self) -> Path:
        """Where checkpoints are written."""
        return self.path / "checkpoints"

    @property
    def samples_dir(self) -> Path:
        """Where sample grids and sample sets are written."""
        return self.path / "samples"

    @property
    def evaluations_dir(self) -> Path:
        """Where evaluations are written, a stamped folder each."""
        return self.path / "evaluations"

    @property
    def ema_snapshots_dir(self) -> Path:
        """Where snapshots of averages are written, to make others of (``ema=posthoc``)."""
        return self.path / "ema_snapshots"

    @property
    def averages_dir(self) -> Path:
        """Where averages that were made after training are written."""
        return self.path / "averages"

    def averages(self) -> dict[str, Path]:
        """Return the averages that were made after training, by name."""
        return {path.stem: path for path in sorted(self.averages_dir.glob("[!.]*.safetensors"))}

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: what was logged."""
        return self.path / "metrics.jsonl"

    def config(self) -> dict[str, Any]:
        """Read the resolved config as plain containers (no code is run).

        Raises:
            ConfigError: the file is no YAML mapping.
        """
        import yaml

        try:
            content = yaml.safe_load(self.config_file.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.config_file} is no valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{self.config_file} is empty or no mapping. Restore it or retrain.")
        return content

    def checkpoints(self) -> dict[int, Path]:
        """Return the complete checkpoints by optimizer step, oldest first."""
        found = {}
        for path in self.checkpoints_dir.glob("step-*.ckpt"):
            match = _CHECKPOINT.search(path.name)
            if match:
                found[int(match.group(1))] = path
        return dict(sorted(found.items()))

    def checkpoint(self, which: str | int | Path = "latest") -> Path:
        """Find a checkpoint by ``latest``, step number, or path.

        Raises:
            CheckpointError: there is none such; the steps there are, are listed.
        """
        known = self.checkpoints()
        if which == "latest" and known:
            return known[max(known)]
        if which == "latest":
            raise CheckpointError(
                f"No checkpoint in {self.checkpoints_dir}: the run stopped before its first one. "
                "Train longer, or set callbacks.checkpoint_every lower."
            )
        if str(which).isdigit():
            step = int(str(which))
            if step in known:
                return known[step]
            raise CheckpointError(
                f"No checkpoint of step {which} in {self.checkpoints_dir}; there are steps "
                f"{', '.join(map(str, known)) or 'none'}. Give one of these, or checkpoint=latest."
            )
        path = Path(str(which)).expanduser()
        if not path.is_file():
            raise CheckpointError(
                f"No checkpoint file at {path}. Give checkpoint=latest, a step number or a path."
            )
        return path


def new_folder(parent: Path) -> Path:
    """Make a folder below ``parent`` named after the time; ``_02`` and so on where it is taken.

    The folder is made here, so that two programs that start in the same second get two.
    """
    name = stamp()
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}_{number:02d}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"{parent} already holds 999 folders of {name}. Give another folder.")


def remove_empty(folder: Path, top: Path) -> None:
    """Remove ``folder`` and its parents up to ``top``, as far as they are empty."""
    for path in (folder, *folder.parents):
        try:
            path.rmdir()
        except OSError:  # not empty, or not there
            return
        if path == top:
            return


def newest_run(parent: Path) -> RunFolder | None:
    """Return the newest run below ``parent`` (folders are named by their start time), if any."""
    folders = sorted(p for p in parent.glob("*") if (p / "config.yaml").is_file())
    return RunFolder(folders[-1].resolve()) if folders else None


def point_latest(outputs: Path, run: Path) -> None:
    """Let ``outputs/latest`` point to ``run``, replacing the old link in one rename."""
    outputs.mkdir(parents=True, exist_ok=True)
    link = outputs / "latest"
    if link.exists() and not link.is_symlink():
        return  # a real folder of that name belongs to the user
    temporary = outputs / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(run, outputs), target_is_directory=True)
    os.replace(temporary, link)


def environment() -> dict[str, Any]:
    """Describe what a run was made with: versions, git revision, device, command."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for package in ("genscale", "torch", "lightning", "diffusers", "torchmetrics", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device or platform.machine(),
        "threads": torch.get_num_threads(),
        "git": _git_revision(),
        "command": sys.argv,
    }


def _git_revision() -> str | None:
    """Return the source tree's revision, ``-dirty`` where files differ; None outside git."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a last line torn by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
