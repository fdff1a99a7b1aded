"""Reading weight files safely: nothing in a file is ever executed, and damage is reported."""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import CheckpointError, did_you_mean
from genscale.io.keys import check_keys, check_shapes, depth_sentence, shapes_of


def read_checkpoint(
    path: Path | str,
    *,
    harmless: Sequence[type] = (),
    advice: str = "Re-save it as a state dict, best as .safetensors.",
) -> dict[str, Any]:
    """Read a ``.safetensors`` or torch file of tensors and plain containers, onto the CPU.

    Torch files are memory-mapped and read with ``weights_only=True``.

    Args:
        path: the file.
        harmless: further classes to take, whose objects run nothing when they are made.
        advice: what to do with a file of other objects.

    Raises:
        CheckpointError: the file is missing, truncated, or holds objects other than tensors and
            plain containers (loading those would run code from the file).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No weight file at {path}. Give the path of an existing file.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path) from error
    try:
        content = _load_torch(path, harmless)
    except pickle.UnpicklingError as error:
        # the file names a class or function to import
        if "GLOBAL" in str(error) or (not _is_zip(path) and _imports(path)):
            raise CheckpointError(
                f"{path} holds Python objects that would run code when loaded; only tensors and "
                f"plain containers are read. {advice}"
            ) from error
        raise _damaged(path) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise _damaged(path) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, but a dict of tensors was expected. "
            "Save a state dict."
        )
    return content


def _load_torch(path: Path, harmless: Sequence[type]) -> Any:
    """Read a torch file, of today's zip format or the older one, without running code."""
    with warnings.catch_warnings(), torch.serialization.safe_globals(list(harmless)):
        # of other pickle protocols; whether the file can be read is told by the error, if any
        warnings.filterwarnings("ignore", ".*pickle protocol.*")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))


def _is_zip(path: Path) -> bool:
    return zipfile.is_zipfile(path)


def _imports(path: Path) -> bool:
    """Return whether a bare pickle imports anything; its opcodes are read, not carried out."""
    try:
        with path.open("rb") as file:
            names = {opcode.name for opcode, _, _ in pickletools.genops(file)}
    except (ValueError, IndexError, OverflowError):
        return False  # no pickle, or a torn one
    return bool(names & {"GLOBAL", "STACK_GLOBAL", "INST"})


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or no weight file: a complete torch or safetensors file was expected, "
        f"{path.stat().st_size} bytes were found. Copy it again, or use an earlier checkpoint."
    )


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], *, source: Path | str, hint: str = ""
) -> None:
    """Load a state dict whose keys and shapes must all match; nothing is loaded otherwise.

    Raises:
        CheckpointError: names the counts and the first differing key.
    """
    _check_fit(module, state, source=source, hint=hint)
    module.load_state_dict(state, strict=True)


def assign_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    device: torch.device,
    source: Path | str,
    hint: str = "",
) -> None:
    """Make tensors of a state dict the weights of a module that was built on the meta device.

    So a model is in memory once. Every tensor is copied to the device, away from the file, which
    another process may delete; it gets the type that the module was built with.

    Raises:
        CheckpointError: names the counts and the first differing key; nothing is loaded then.
    """
    _check_fit(module, state, source=source, hint=hint)
    own = module.state_dict()
    values = {name: tensor.to(device, own[name].dtype, copy=True) for name, tensor in state.items()}
    module.load_state_dict(values, strict=True, assign=True)


def complete_from(module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Give a module from the meta device the tensors that its state dict does not hold.

    Those are buffers that are not saved, and tensors kept as plain attributes.

    Args:
        module: with weights, see :func:`assign_strictly`.
        build: builds the same module with all it computes in its constructor; called only where
            something is lacking.
    """
    lacking = [
        (path, name)
        for path, part in module.named_modules()
        for name, value in (*part.named_buffers(recurse=False), *vars(part).items())
        if isinstance(value, Tensor) and value.is_meta
    ]
    if lacking:
        whole = build()
        for path, name in lacking:
            setattr(module.get_submodule(path), name, getattr(whole.get_submodule(path), name))


def _check_fit(
    module: nn.Module, state: Mapping[str, Tensor], *, source: Path | str, hint: str
) -> None:
    own, owner = shapes_of(module.state_dict()), type(module).__name__

    def advice() -> str:
        depth = depth_sentence(state, own)
        return f"{depth or 'The file belongs to a model of other settings.'} {hint}"

    check_keys(state, own, owner=owner, advice=advice, source=str(source))
    check_shapes(state, own, owner=owner, advice=hint, source=str(source))


def below(state: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose key starts with ``prefix``, the prefix removed."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def check_choice(what: str, given: str, known: Iterable[str]) -> None:
    """Raise a :class:`CheckpointError` unless ``given`` is one of ``known``."""
    options = list(known)
    if given not in options:
        raise CheckpointError(
            f"{what} must be one of {', '.join(options)}, but '{given}' was given."
            f"{did_you_mean(given, options)}"
        )
