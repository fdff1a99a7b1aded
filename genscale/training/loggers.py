"""Optional loggers beside metrics.jsonl, built into the run folder."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger

from genscale.errors import require


def tensorboard(*, save_dir: str, name: str) -> Logger:
    """TensorBoard event files in ``<run>/tensorboard``."""
    require("tensorboard", what="logger=tensorboard", extra="tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=save_dir, name="tensorboard", version="")


def wandb(
    *,
    save_dir: str,
    name: str,
    project: str = "genscale",
    entity: str | None = None,
    offline: bool = True,
) -> Logger:
    """Weights and Biases; a resumed run continues the record named after its folder."""
    require("wandb", what="logger=wandb", extra="wandb")
    from lightning.pytorch.loggers import WandbLogger

    options: dict[str, Any] = {"entity": entity} if entity else {}
    return WandbLogger(
        save_dir=save_dir,
        name=name,
        id=name.replace("/", "-"),
        project=project,
        offline=offline,
        resume="allow",
        **options,
    )
