"""Reading a pickle of numpy arrays and plain containers without running anything from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from genscale.errors import DataError

# What a pickled numpy array is rebuilt with, under the module names of numpy 1 and 2.
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in (
            "_reconstruct",
            "scalar",
        )
    ),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("collections", "OrderedDict"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"refused {module}.{name}")
        return super().find_class(module, name)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Rebuild bytes as protocols 0 to 2 store them; no other codec is reachable."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused the codec {encoding}")
    return text.encode("latin1")


def read_array_pickle(path: Path | str) -> Any:
    """Read a pickle that holds numpy arrays, numbers, strings and plain containers alone.

    Raises:
        DataError: if the file is missing or damaged, or names any other class or function, which
            unpickling would import and could run.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"No statistics file at {path}. Give the path of an existing file.")
    try:
        with path.open("rb") as stream:
            value = _ArrayUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        if str(error).startswith("refused "):
            raise DataError(
                f"{path} would run code when loaded ({str(error)[8:]}); only numpy arrays and "
                "plain containers are read. Convert the statistics to npz."
            ) from error
        raise _damaged(path) from error
    except (EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    _refuse_objects(value, path)
    return value


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path} is damaged or no pickle: {path.stat().st_size} bytes were found. Copy it again."
    )


def _refuse_objects(value: Any, path: Path) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _refuse_objects(item, path)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_objects(item, path)
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        raise DataError(
            f"{path} holds arrays of Python objects, but arrays of numbers were expected. "
            "Convert the statistics to npz."
        )
