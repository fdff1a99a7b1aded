"""Which weights ``weights=`` means: the raw ones of a run, an average, or a reconstructed one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from genscale.errors import CheckpointError
from genscale.io.weights import below, check_choice, read_checkpoint
from genscale.runs import RunFolder

MAIN, RAW = "ema", "raw"
_FURTHER = "further_averages."  # where checkpoints keep the averages beside the main one


@dataclass(frozen=True, slots=True)
class Origin:
    """Where weights came from.

    Attributes:
        run: the run's folder, or the exported one.
        weights: their name as protocols print it: ``raw``, ``ema_0.9999``, ``posthoc_0.08``;
            ``ema`` where the average's length is not known.
        step: the optimizer step they are of, where it is known.
        file: what they were read from.
        checkpoint: the checkpoint that other weights of this moment are in; None where there may
            be none.
    """

    run: Path
    weights: str
    step: int | None
    file: Path
    checkpoint: str | None = None

    def __str__(self) -> str:
        """Name run, step and weights, independent of where the run's folder lies."""
        step = "" if self.step is None else f" step {self.step}"
        return f"{self.run.parent.name}/{self.run.name}{step} {self.weights}"


def is_exported(run: object) -> bool:
    """Return whether ``run`` is an exported folder rather than a run."""
    return (Path(str(run)).expanduser() / "genscale.json").is_file()


def key_of(name: str) -> str:
    """Return an average's name as a key of modules, which has no dots: ``ema_0_9999``."""
    return name.replace(".", "_")


def further_averages(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the averages of a state dict beside the main one: the prefix of each by its name."""
    keys = {name.split(".")[1] for name in state if name.startswith(_FURTHER)}
    # the length is a number, in which only its dot can have become an underscore
    names = {f"ema_{key.removeprefix('ema_').replace('_', '.')}": key for key in keys}
    return {name: f"{_FURTHER}{names[name]}." for name in sorted(names)}


def main_average(law: Any) -> str:
    """Return the public name of the main average: ``ema_`` and its length.

    Args:
        law: the node ``ema`` of a run's config; ``ema`` alone is returned where there is none.
    """
    law = law if isinstance(law, Mapping) else {}
    several = law.get("decays") or law.get("sigma_rels") or [None]
    lengths = (law[key] for key in ("decay", "half_life", "sigma_rel") if key in law)
    length = next(lengths, several[0])
    return MAIN if length is None else f"{MAIN}_{length}"


def read_weights(
    run: RunFolder, checkpoint: str | int | Path = "latest", weights: str = MAIN
) -> tuple[dict[str, Tensor], Origin]:
    """Read one set of weights of a run.

    Args:
        run: the run folder.
        checkpoint: ``latest``, a step, or a file.
        weights: ``ema`` (the main average), ``raw``, another average's name, or the name of a
            file that ``python -m genscale.cli.posthoc`` wrote; such a file has a step of its
            own, which ``checkpoint`` must not contradict.

    Returns:
        tensors by the backbone's own names, and where they came from.

    Raises:
        CheckpointError: no such checkpoint or weights; a damaged file; or a reconstruction of
            another step.
    """
    reconstructed = run.averages()
    if weights in reconstructed:
        return _read_reconstructed(run, checkpoint, reconstructed[weights])
    path = run.checkpoint(checkpoint)
    content = read_checkpoint(path)
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds no state_dict: a checkpoint of a genscale run was expected."
        )
    main = main_average(run.config().get("ema"))
    prefixes = {MAIN: "ema.", RAW: "model.", **further_averages(state)}
    if weights.startswith("posthoc_") and run.ema_snapshots_dir.is_dir():
        raise CheckpointError(
            f"weights={weights} has not been reconstructed yet. Make it with: "
            f"python -m genscale.cli.posthoc run={run.path} "
            f"sigma_rel=[{weights.removeprefix('posthoc_').partition('_')[0]}]"
        )
    if weights != main:
        check_choice("weights", weights, [*prefixes, *reconstructed])
    public = main if weights == MAIN else weights
    origin = Origin(run.path, public, _step_of(content), path, str(path))
    return below(state, prefixes.get(weights, "ema.")), origin


def _step_of(content: Mapping[str, Any]) -> int | None:
    progress = content.get("genscale")
    return int(progress["step"]) if isinstance(progress, Mapping) and "step" in progress else None


def _read_reconstructed(
    run: RunFolder, checkpoint: str | int | Path, file: Path
) -> tuple[dict[str, Tensor], Origin]:
    from safetensors import safe_open

    state = read_checkpoint(file)
    with safe_open(file, "pt") as opened:
        step = (opened.metadata() or {}).get("step")
    own = int(step) if step is not None else None
    if checkpoint != "latest":
        wanted = _step_of(read_checkpoint(run.checkpoint(checkpoint)))
        if wanted != own:
            raise CheckpointError(
                f"weights={file.stem} was reconstructed at step {own}, but checkpoint={checkpoint} "
                f"is of step {wanted}. Leave checkpoint out, or reconstruct with step={wanted}."
            )
    return state, Origin(run.path, file.stem, own, file)
