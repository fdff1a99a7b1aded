"""Text encoders of the transformers library, read from local folders; nothing is fetched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from genscale.errors import CheckpointError, ConfigError, require

_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Folder:
    """Where an encoder is.

    Args:
        key: config path that names it, for error sentences.
        place: folder with config.json, weights and the tokenizer's files; None where not given.
        what: which model belongs there, for error sentences.
        holds: which parts of a model must lie there.
    """

    key: str
    place: str | None
    what: str
    holds: tuple[Literal["weights", "tokenizer"], ...] = ("weights", "tokenizer")

    def path(self) -> Path:
        """Return the folder.

        Raises:
            ConfigError: none was given.
            CheckpointError: it is not there, or files are missing.
        """
        if self.place is None:
            parts = {"weights": "config.json, model.safetensors", "tokenizer": "the tokenizer"}
            raise ConfigError(
                f"{self.key} is not set, and the {self.holds[0]} of {self.what} are needed. Give "
                f"{self.key}=<folder with {' and '.join(parts[each] for each in self.holds)}>."
            )
        folder = Path(self.place).expanduser()
        missing = []
        if "weights" in self.holds:
            missing = [] if (folder / "config.json").is_file() else ["config.json"]
            if not list(folder.glob("*.safetensors")):
                missing.append("model.safetensors")
        if "tokenizer" in self.holds and not any((folder / name).is_file() for name in _TOKENIZERS):
            missing.append("tokenizer.json")
        if missing:
            raise CheckpointError(
                f"{self.key}={self.place} has no {' and no '.join(missing)}, and the folder of "
                f"{self.what} was expected. Give its path."
            )
        return folder

    def config(self) -> dict[str, Any]:
        """Read ``config.json``; of a model with a text part, that part.

        Raises:
            ConfigError: no folder was given.
            CheckpointError: there is none, or it is damaged.
        """
        file = self.path() / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}. Copy it again.") from error
        return dict(config.get("text_config") or {}) | {
            name: value for name, value in config.items() if name != "text_config"
        }

    def digest(self) -> str:
        """Return the SHA-256 over the content of config, weights and tokenizer."""
        folder, digest = self.path(), hashlib.sha256()
        kinds = {".json", ".model", ".txt"} | (
            {".safetensors"} if "weights" in self.holds else set()
        )
        for file in sorted(folder.iterdir()):
            if file.suffix in kinds:
                digest.update(file.name.encode())
                with open(file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def check_transformers(name: str) -> None:
    """Raise an ``ImportError`` with an install hint unless transformers is there."""
    require("transformers", what=f"text_encoder={name}", extra="transformers")


def check_precision(precision: str) -> None:
    """Raise a ``ConfigError`` unless the precision is known."""
    if precision not in DTYPES:
        raise ConfigError(
            f"text_encoder.precision must be one of {', '.join(DTYPES)}, but '{precision}' was "
            "given. Choose one."
        )


def load_model(folder: Folder, class_name: str, precision: str) -> nn.Module:
    """Load all weights of a model class of transformers, and no others that it has.

    Raises:
        CheckpointError: the files are damaged, or weights are missing.
    """
    import transformers
    from safetensors import SafetensorError

    path = folder.path()
    kind = getattr(transformers, class_name)
    try:
        with torch.random.fork_rng(devices=[]):  # building may draw initial weights
            model, told = kind.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        problem = " ".join(str(error).split()).rstrip(".")[:300]
        raise CheckpointError(
            f"The weights of {folder.key}={folder.place} cannot be loaded: {problem}. Copy the "
            "folder again."
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{len(missing)} keys are missing in {folder.key}={folder.place} (first: "
            f"{missing[0]}). The folder of {folder.what} was expected."
        )
    loaded: nn.Module = model.to(DTYPES[precision]).requires_grad_(False).eval()
    return loaded


def load_tokenizer(folder: Folder) -> Callable[..., Any]:
    """Load a folder's tokenizer.

    Raises:
        CheckpointError: its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained(
            folder.path(), local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        problem = " ".join(str(error).split()).rstrip(".")[:300]
        raise CheckpointError(
            f"The tokenizer of {folder.key}={folder.place} cannot be loaded: {problem}. Copy "
            "the folder again."
        ) from error
    return tokenizer
