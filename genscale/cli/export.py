"""``python -m genscale.cli.export``: the weights of a run as a folder that others can load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from genscale.errors import ConfigError, did_you_mean

LAYOUTS = ("genscale", "official", "diffusers")

_DIFFERENCES = (
    "diffusers computes two things otherwise than the paper's program, which no weight can mend: "
    "its time sinusoid divides by 127 in place of 128, and the second norm of a block has eps 1e-5 "
    "in place of 1e-6. Outputs are equal once both are set, as above.",
)
_LOAD_DIFFUSERS = """\
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel.from_pretrained("<this folder>").eval()
for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
    block.norm3.eps = 1e-6"""


def run(cfg: DictConfig) -> None:
    """Load a run's weights and write them in the layout asked for."""
    if cfg.layout not in LAYOUTS:
        raise ConfigError(
            f"layout must be one of {', '.join(LAYOUTS)}, but '{cfg.layout}' was given."
            f"{did_you_mean(str(cfg.layout), LAYOUTS)}"
        )
    from genscale.pipeline import GenerationPipeline

    if (tokenizer := _tokenizer(cfg)) is not None:
        network, origin = tokenizer
        target = _into_folder(cfg, partial(_write_tokenizer, network, origin, cfg.layout))
        print(f"{type(network).__name__}, {origin}: {target}")
        return
    pipeline = GenerationPipeline.load(
        cfg.run, checkpoint=cfg.checkpoint, weights=str(cfg.weights), device="cpu"
    )

    def write(folder: Path) -> None:
        use, notes = _write(pipeline, folder, cfg.layout)
        (folder / "README.md").write_text(_card(pipeline, use, notes), encoding="utf-8")

    target = _into_folder(cfg, write)
    print(f"{type(pipeline.model).__name__}, {pipeline.origin}: {target}")
    if cfg.layout == "genscale":
        print(f"sample:   python sample.py run={target} num_samples=64")


def _into_folder(cfg: DictConfig, write: Callable[[Path], None]) -> Path:
    """Write a new folder, whole or not at all, and return it."""
    from genscale.io.files import atomic_folder
    from genscale.runs import remove_empty

    target = _target(cfg)
    try:
        with atomic_folder(target) as folder:
            write(folder)
    except BaseException:
        if cfg.out is None:
            remove_empty(target, target.parent)
        raise
    return target


def _tokenizer(cfg: DictConfig) -> tuple[Any, str] | None:
    """Return the tokenizer that a run or folder is of and where it came from, or None.

    Raises:
        ConfigError: weights are chosen of a folder that holds one set; or the run is one of a KL
            autoencoder or of an upscaler.
    """
    from genscale.autoencoders.msvq import load_msvq
    from genscale.autoencoders.msvq_folder import holds_tokenizer
    from genscale.runs import RunFolder
    from genscale.training.autoencoder_run import load_autoencoder

    base = Path(str(cfg.run)).expanduser()
    if (base / "config.yaml").is_file():
        model = RunFolder.open(base).config().get("model")
        if str((model or {}).get("_target_")).endswith(".KLNetwork"):
            raise ConfigError(
                f"run={cfg.run} trained a KL autoencoder, whose folder in diffusers' layout is "
                f"{cfg.run}/export already, with scale and shift in its config. Copy that one."
            )
        if str((model or {}).get("_target_")).startswith("genscale.upscaling."):
            raise ConfigError(
                f"run={cfg.run} trained an upscaler, whose folder is {cfg.run}/export already, "
                "with what is known of its latents in upscaler.json. Copy that one, or give it as "
                "upscaling.run=..."
            )
        if not str((model or {}).get("_target_")).endswith(".MSVQ"):
            return None
        network, origin = load_autoencoder(
            base, checkpoint=cfg.checkpoint, weights=str(cfg.weights), device="cpu"
        )
        return network, str(origin)
    if not holds_tokenizer(str(base)):
        return None
    if (cfg.checkpoint, str(cfg.weights)) != ("latest", "ema"):
        raise ConfigError(
            f"run={cfg.run} is the folder of a tokenizer, which holds one set of weights, but "
            f"checkpoint={cfg.checkpoint} and weights={cfg.weights} were given. Leave them out."
        )
    return load_msvq(str(base)), base.name


def _write_tokenizer(network: Any, origin: str, layout: str, folder: Path) -> None:
    """Write a tokenizer and its card."""
    from genscale.io.layouts import write_diffusers
    from genscale.io.model_card import model_card

    use = "autoencoder.run=<this folder>"
    notes: tuple[str, ...] = ()
    if layout == "official":
        use, notes = _write_official(network, folder)
    elif layout == "diffusers":
        write_diffusers(network, folder)  # says that there is no such layout
    else:
        network.save_pretrained(folder)
    settings = {name: value for name, value in network.config.items() if name[0] != "_"}
    config = {"data_info": {}, "model": settings}
    card = model_card(network, config, origin=f"Exported from {origin}.", use=use, notes=notes)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _target(cfg: DictConfig) -> Path:
    """Return the folder to write: ``out``, or a stamped one inside the run."""
    from genscale.runs import RunFolder, new_folder

    if cfg.out is not None:
        return Path(str(cfg.out)).expanduser()
    base = Path(str(cfg.run)).expanduser()
    is_run = (base / "config.yaml").is_file()  # else an exported folder, or a tokenizer's
    return new_folder((RunFolder.open(base).path if is_run else base) / "exports")


def _write(pipeline: Any, folder: Path, layout: str) -> tuple[str, tuple[str, ...]]:
    """Write the weights; return how they are loaded, and what must be known besides."""
    from genscale.io.layouts import write_diffusers

    if layout == "genscale":
        pipeline.save_pretrained(folder, pipeline.config)
        return "python sample.py run=<this folder> num_samples=64", ()
    if layout == "diffusers":
        write_diffusers(pipeline.model, folder)
        return _LOAD_DIFFUSERS, _DIFFERENCES
    use, notes = _write_official(pipeline.model, folder)
    return use, (
        *notes,
        "The official layout does not say what the network was trained for: see the objective "
        "below. The command above takes that of the nearest published recipe.",
    )


def _write_official(model: Any, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Write the keys of the official program; return how they are read back, and a note."""
    from genscale.io.layouts import as_words, converter_of, write_official

    untold = as_words(write_official(model, folder))
    family, _ = converter_of(model)
    use = (
        f"python -m genscale.cli.import_checkpoint family={family} file=model.safetensors "
        f"{untold} out=<new folder>"
    )
    note = (
        "model.safetensors and model.pth hold the same tensors, by the names of the official "
        "program."
    )
    return " ".join(use.split()), (note,)


def _card(pipeline: Any, use: str, notes: tuple[str, ...]) -> str:
    from genscale.io.model_card import model_card
    from genscale.pipeline import EXPORTED

    config = {key: pipeline.config[key] for key in EXPORTED}
    origin = f"Exported from {pipeline.origin}."
    return model_card(pipeline.model, config, origin=origin, use=use, notes=notes)


if __name__ == "__main__":
    from genscale.cli.app import main

    sys.exit(main("export", "genscale.cli.export:run"))
