"""Folders of diffusers' layout, and hub ids of its AutoencoderKL: found, checked, and loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from genscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.modeling_utils import ModelMixin

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
M = TypeVar("M", bound="ModelMixin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# what diffusers assumes where config.json does not say
_ASSUMED: dict[str, Any] = {"latent_channels": 4, "block_out_channels": [64]}


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights are.

    Args:
        key: config path that names it, for error sentences.
        place: a folder, or a hub id ``owner/name``.
        subfolder: where the autoencoder lies inside it, or None.
    """

    key: str
    place: str
    subfolder: str | None = None

    def __str__(self) -> str:
        inside = f" (subfolder={self.subfolder})" if self.subfolder else ""
        return f"{self.key}={self.place}{inside}"


def locate(source: Source) -> Path:
    """Return the local folder that holds config and weights; a hub id is fetched or found cached.

    Raises:
        CheckpointError: there is no such folder, a file is missing, or the hub does not answer.
    """
    folder = Path(source.place).expanduser()
    if folder.is_dir():
        folder = folder / (source.subfolder or "")
    elif _HUB_ID.fullmatch(source.place):
        folder = _fetch(source)
    else:
        raise CheckpointError(
            f"{source} is no folder and no hub id. Give a folder with config.json and {WEIGHTS[0]} "
            "of a diffusers AutoencoderKL, or an id such as stabilityai/sd-vae-ft-ema."
        )
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    if missing:
        inner = [p.parent.name for p in sorted(folder.glob("*/config.json"))]
        hint = f" There is one below: give the subfolder {inner[0]}." if inner else ""
        raise CheckpointError(
            f"{source} holds no {' and no '.join(missing)}, and the folder of a diffusers "
            f"AutoencoderKL has both.{hint or ' Give another folder.'}"
        )
    return folder


def _fetch(source: Source) -> Path:
    """Return the hub's local copy of the two files."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def file(name: str) -> Path:
        return Path(hf_hub_download(source.place, name, subfolder=source.subfolder))

    try:
        folder = file("config.json").parent
        try:
            file(WEIGHTS[0])
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            file(WEIGHTS[1])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} is no folder here, and the hub does not give it "
            f"({type(error).__name__}). Give the path of a copy, or fetch it first with: "
            f"hf download {source.place}"
        ) from error
    return folder


def read_config(folder: Path, wanted: str = "AutoencoderKL") -> dict[str, Any]:
    """Read ``config.json``.

    Args:
        folder: that holds it.
        wanted: name of the class it must be of.

    Raises:
        CheckpointError: it is no JSON, or of another class.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {error}.") from error
    kind = config.get("_class_name", "AutoencoderKL") if isinstance(config, dict) else "no mapping"
    if kind != wanted:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {kind}, but an {wanted} was expected. "
            "Give the folder of one."
        )
    return dict(config)


def check_config(config: dict[str, Any], settings: dict[str, Any], source: Source) -> None:
    """Hold a folder's config against the settings of the run.

    Args:
        config: of ``config.json``; scale and shift are compared where it states them.
        settings: ``latent_channels``, ``downsample``, ``scale`` and ``shift``.
        source: for the sentence.

    Raises:
        ConfigError: names the first contradiction.
    """
    whole = _ASSUMED | config
    found = {
        "latent_channels": whole["latent_channels"],
        "downsample": 2 ** (len(whole["block_out_channels"]) - 1),
    }
    if config.get("scaling_factor") is not None:
        found["scale"] = config["scaling_factor"]
    if "shift_factor" in config:
        found["shift"] = config["shift_factor"] or 0.0
    for name, value in found.items():
        if abs(value - settings[name]) > 1e-6:
            raise ConfigError(
                f"autoencoder.{name}={settings[name]}, but the config.json of {source} says "
                f"{value}. Give autoencoder.{name}={value}, or another source."
            )
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ConfigError(
            f"The config.json of {source} gives a mean and deviation for each channel, and only "
            "one scale and shift are known here. Give another source."
        )


def load(folder: Path, source: Source) -> AutoencoderKL:
    """Load an AutoencoderKL; see :func:`load_as`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return load_as(AutoencoderKL, folder, source)


def load_as(kind: type[M], folder: Path, source: Source) -> M:
    """Load the weights in float32, all of them and no others; nothing is executed from a file.

    Args:
        kind: class of the model.
        folder: that holds config and weights.
        source: for the sentences.

    Returns:
        the model, frozen and in eval mode.

    Raises:
        CheckpointError: the file is damaged, or does not fit its config.
    """
    import torch  # not needed to read a config

    try:
        # building draws initial weights: the numbers of a run must not depend on when that is
        with torch.random.fork_rng(devices=[]):
            loaded: Any = kind.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=(folder / WEIGHTS[0]).is_file(),
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(
            f"The weights of {source} cannot be loaded: {problem}. Copy the file again."
        ) from error
    model: M
    model, told = loaded
    missing, unexpected = told["missing_keys"], told["unexpected_keys"]
    if missing or unexpected:
        raise CheckpointError(
            f"{len(missing)} missing, {len(unexpected)} unexpected keys in the weights of {source} "
            f"(first: {[*missing, *unexpected][0]}). The file belongs to another config.json; "
            "copy both again."
        )
    model.requires_grad_(False).eval()
    return model
