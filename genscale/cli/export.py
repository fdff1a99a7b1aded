"""``python -m genscale.cli.export``: the weights of a run as a folder that others can load."""

from __future__ import annotations

import sys
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
    from genscale.io.files import atomic_folder
    from genscale.pipeline import GenerationPipeline
    from genscale.runs import remove_empty

    pipeline = GenerationPipeline.load(
        cfg.run, checkpoint=cfg.checkpoint, weights=str(cfg.weights), device="cpu"
    )
    target = _target(cfg)
    try:
        with atomic_folder(target) as folder:
            use, notes = _write(pipeline, folder, cfg.layout)
            (folder / "README.md").write_text(_card(pipeline, use, notes), encoding="utf-8")
    except BaseException:
        if cfg.out is None:
            remove_empty(target, target.parent)
        raise
    print(f"{type(pipeline.model).__name__}, {pipeline.origin}: {target}")
    if cfg.layout == "genscale":
        print(f"sample:   python sample.py run={target} num_samples=64")


def _target(cfg: DictConfig) -> Path:
    """Return the folder to write: ``out``, or a stamped one inside the run."""
    from genscale.run_weights import is_exported
    from genscale.runs import RunFolder, new_folder

    if cfg.out is not None:
        return Path(str(cfg.out)).expanduser()
    base = Path(str(cfg.run)).expanduser()
    return new_folder((base if is_exported(base) else RunFolder.open(base).path) / "exports")


def _write(pipeline: Any, folder: Path, layout: str) -> tuple[str, tuple[str, ...]]:
    """Write the weights; return how they are loaded, and what must be known besides."""
    from genscale.io.layouts import as_words, converter_of, write_diffusers, write_official

    if layout == "genscale":
        pipeline.save_pretrained(folder, pipeline.config)
        return "python sample.py run=<this folder> num_samples=64", ()
    if layout == "diffusers":
        write_diffusers(pipeline.model, folder)
        return _LOAD_DIFFUSERS, _DIFFERENCES
    untold = as_words(write_official(pipeline.model, folder))
    family, _ = converter_of(pipeline.model)
    use = (
        f"python -m genscale.cli.import_checkpoint family={family} file=model.safetensors "
        f"{untold} out=<new folder>"
    )
    notes = (
        "model.safetensors and model.pth hold the same tensors, by the names of the official "
        "program.",
        "The official layout does not say what the network was trained for: see the objective "
        "below. The command above takes that of the nearest published recipe.",
    )
    return " ".join(use.split()), notes


def _card(pipeline: Any, use: str, notes: tuple[str, ...]) -> str:
    from genscale.io.model_card import model_card
    from genscale.pipeline import EXPORTED

    config = {key: pipeline.config[key] for key in EXPORTED}
    origin = f"Exported from {pipeline.origin}."
    return model_card(pipeline.model, config, origin=origin, use=use, notes=notes)


if __name__ == "__main__":
    from genscale.cli.app import main

    sys.exit(main("export", "genscale.cli.export:run"))
