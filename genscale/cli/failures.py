"""What the user reads when something goes wrong, and the exit status that goes with it.

A mistake the user can mend is one sentence on standard error and status 1; an interrupt is
status 130; anything else is a bug: a traceback, a request to report it, and status 70 (EX_SOFTWARE
of sysexits.h). ``GENSCALE_DEBUG=1`` shows tracebacks of the first kind too.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from genscale.errors import ConfigError, GenscaleError

STATUS_MISTAKE = 1
STATUS_BUG = 70
STATUS_INTERRUPT = 130

# errors of other libraries that the user can act on: class name -> what to do
_ADVICE = {
    "OutOfMemoryError": (
        "Give a smaller batch_size, or a larger trainer.accumulate_grad_batches where you train."
    ),
    "MisconfigurationException": "Check the trainer settings.",
}


class JobFailed(Exception):
    """A job of a sweep failed and has said so; the other jobs go on.

    Args:
        status: exit status of the job.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def report(error: BaseException) -> int:
    """Tell the user about an error and return the exit status."""
    if isinstance(error, JobFailed):
        return error.status
    if isinstance(error, SystemExit):
        return _status_of(error)
    if isinstance(error, KeyboardInterrupt):
        _print(f"genscale{_process()}: interrupted")
        return STATUS_INTERRUPT
    sentence = explain(error)
    if sentence is None:
        traceback.print_exception(error)
        _print(
            f"genscale{_process()}: {type(error).__name__}: this is a bug. Please report it with "
            "the traceback above and your command."
        )
        return STATUS_BUG
    if os.environ.get("GENSCALE_DEBUG") == "1":
        traceback.print_exception(error)
    kind = type(error).__name__
    for line in sentence.splitlines():
        _print(f"genscale{_process()}: {kind}: {line}")
    return STATUS_MISTAKE


def explain(error: BaseException) -> str | None:
    """Return what to tell the user about a mistake; None where the error is a bug."""
    if isinstance(error, GenscaleError):
        return str(error)
    if isinstance(error, ImportError):
        # ours carry a sentence and no module name; Python's own are a broken installation
        return str(error) if error.name is None else None
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return str(error) if error.errno is None else _system_sentence(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return _system_sentence(error)
    text = " ".join(str(error).split())
    if "torchvision::nms" in text:
        return (
            "The installed torchvision does not fit the installed torch, and breaks the import of "
            "lightning. genscale does not need it: pip uninstall torchvision"
        )
    advice = _ADVICE.get(type(error).__name__)
    return None if advice is None else f"{text.rstrip('.')}. {advice}"


def as_config_error(error: Exception) -> Exception:
    """Put an error of Hydra or OmegaConf into one sentence; other errors come back as they are.

    The advice to append an unknown key is left out: nearly always the key is misspelt.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(error, GenscaleError):
        return error
    if isinstance(error, YAMLError):
        return ConfigError(f"A config file is no valid YAML: {' '.join(str(error).split())}.")
    if not isinstance(error, HydraException | OmegaConfBaseException | ValueError):
        return error
    parts = []
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GenscaleError):
            return cause
        parts += str(cause).splitlines()
        cause = cause.__cause__
    kept = []
    for line in (part.strip() for part in parts):
        if line.startswith("Config search path"):
            break
        unwanted = "append to your config" in line or "HYDRA_FULL_ERROR" in line
        if line and not unwanted and line not in kept:
            kept.append(line)
    text = " ".join(kept) or type(error).__name__
    return ConfigError(text if text.endswith((".", "?")) else f"{text}.")


def _system_sentence(error: OSError) -> str:
    places = [str(n) for n in (error.filename, error.filename2) if n is not None]
    return f"{error.strerror}: {' -> '.join(places)}" if places else f"{error.strerror}."


def _status_of(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    _print(f"genscale{_process()}: {error.code}")
    return STATUS_MISTAKE


def _process() -> str:
    """Name the process where there are several and this is not the first."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return "" if rank == "0" else f" (process {rank})"


def _print(line: str) -> None:
    """Write a line to standard error, red on a terminal."""
    stream: Any = sys.stderr
    if not stream.isatty():
        stream.write(f"{line}\n")
        return
    from rich.console import Console

    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
