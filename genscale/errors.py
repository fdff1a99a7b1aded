"""The five error classes of genscale.

Every message says, in one sentence: what is wrong, what was expected, what was given, what to do.
The command line prints exactly that sentence and exits with status 1, without a traceback.
"""

from __future__ import annotations


class GenscaleError(Exception):
    """Base of the five: a mistake the user can mend, told in one sentence."""


class ConfigError(GenscaleError, ValueError):
    """A config key, value or combination is wrong."""


class CheckpointError(GenscaleError, RuntimeError):
    """A weight file is missing, damaged, unsafe, or belongs to another model."""


class DataError(GenscaleError, RuntimeError):
    """A data set, image or npz file is missing, damaged, or has the wrong layout."""


class ParallelError(GenscaleError, RuntimeError):
    """Processes disagree, or a batch does not divide over them."""


class ProtocolError(GenscaleError, RuntimeError):
    """Two evaluation numbers or statistics were made under different protocols."""


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def require(package: str, *, what: str, extra: str) -> object:
    """Import an optional package, or raise an ``ImportError`` that names the extra to install."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package '{package.replace('_', '-')}'. "
            f'Install it with: pip install "genscale[{extra}]"'
        ) from error
