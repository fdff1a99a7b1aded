"""I3D features, the ones that FVD is of, from either of the two files that people have."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import CheckpointError
from genscale.io.weights import assign_strictly, read_checkpoint
from genscale.metrics.features import file_sha256, fingerprint
from genscale.metrics.video.clips import ClipNetwork
from genscale.metrics.video.i3d_graph import I3DGraph
from genscale.metrics.weights import weights_folder

SCRIPT, STATE = "i3d_torchscript.pt", "i3d_pretrained_400.pt"
_SIDE = 224
_COUNTER = "num_batches_tracked"  # older files do not have it, and it changes nothing


class I3D(ClipNetwork):
    """Class logits (400, before the softmax) of I3D (arXiv:1705.07750), pretrained on Kinetics.

    Every frame is resized to 224 x 224 by bilinear interpolation without antialiasing and without
    keeping the aspect ratio, and brought to [-1, 1]: part of FVD's definition, for all sizes.

    Two files circulate, and protocols name the one that was used: ``i3d_torchscript.pt``, a port of
    the TensorFlow Hub module as StyleGAN-V uses it, and ``i3d_pretrained_400.pt``, a state dict.
    Their numbers are nearly the same. The state dict is read without running anything. A
    TorchScript file is a program: loading and calling it runs TorchScript's own interpreter, never
    Python, and imports nothing; but its operations can take time and memory and map files, so take
    it from a source you trust, or take the state dict.

    Args:
        weights: either file; None looks for both names in the weights folder.
        frames: frames read of a clip, at least 9; published numbers are of 16.
        stride: one of how many frames is read.
        clips_a_pass: clips seen at once.
        name: word in metric names; ``i3d`` is what ``fvd`` and ``kvd`` mean.
    """

    tap = "logits"
    taps = {"logits": 400}
    resize = "torch_bilinear"

    def __init__(
        self,
        weights: str | None = None,
        *,
        frames: int | None = 16,
        stride: int = 1,
        clips_a_pass: int = 8,
        name: str = "i3d",
    ) -> None:
        super().__init__(name, frames, stride)
        self.weights = weights
        self.clips_a_pass = clips_a_pass
        self._sha256: str | None = None
        self._script = False
        self.graph: Any = nn.Identity()

    @property
    def description(self) -> str:
        """The name in protocols: which file it is."""
        return "i3d_torchscript" if self._script else "i3d_pretrained_400"

    @property
    def sha256(self) -> str:
        """Digest of the weights: of the file, where it is TorchScript."""
        self.prepare()
        return str(self._sha256)

    def check(self) -> list[str]:
        """Return a sentence if there is no file."""
        try:
            self._file()
        except CheckpointError as error:
            return [str(error)]
        return []

    def prepare(self) -> None:
        """Read the file, once.

        Raises:
            CheckpointError: it is missing, damaged, or of another network.
        """
        if self._sha256 is not None:
            return
        path = self._file()
        self._script = is_torchscript(path)
        if self._script:
            self.graph = _read_torchscript(path)
            self._sha256 = file_sha256(str(path))
            return
        state = {
            name: value
            for name, value in read_checkpoint(path).items()
            if not name.endswith(_COUNTER)
        }
        with torch.device("meta"):  # nothing is allocated before the weights are read
            graph = I3DGraph()
        counters = {name for name in graph.state_dict() if name.endswith(_COUNTER)}
        whole = state | dict.fromkeys(counters, torch.zeros((), dtype=torch.int64))
        hint = f"Give {STATE} or {SCRIPT}."
        assign_strictly(graph, whole, device=torch.device("cpu"), source=path, hint=hint)
        self.graph = graph.eval().requires_grad_(False)
        self._sha256 = fingerprint(state)

    def _file(self) -> Path:
        if self.weights is not None:
            path = Path(self.weights).expanduser()
            if path.is_file():
                return path
            raise CheckpointError(
                f"No weights for 'i3d' at {path}. Give the path of {SCRIPT} or {STATE}."
            )
        for name in (SCRIPT, STATE):
            if (weights_folder() / name).is_file():
                return weights_folder() / name
        raise CheckpointError(
            f"No weights for 'i3d' in {weights_folder()} (expected {SCRIPT}, as StyleGAN-V uses "
            f"it, or {STATE}). Put one there, or give metrics.features.0.weights=<its path>; "
            "metrics=video needs none."
        )

    def train(self, mode: bool = True) -> I3D:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``logits`` ``(B, 400)`` in float32 of clips ``(B, 1 or 3, T, H, W)``."""
        self.prepare()
        parts = self.window(images).split(self.clips_a_pass)
        with torch.autocast(images.device.type, enabled=False):
            return {"logits": torch.cat([self._logits(part) for part in parts])}

    def _logits(self, clips: Tensor) -> Tensor:
        values = clips.float()
        if self._script:
            # the file brings its own resizing; profiling executors fuse, and fail on a second call
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found: Tensor = self.graph(values, rescale=True, resize=True, return_features=True)
            return found
        found = self.graph(i3d_input(values))
        return found


def i3d_input(clips: Tensor) -> Tensor:
    """Resize clips ``(B, C, T, H, W)`` in 0 .. 255 to 224 x 224 and bring them to [-1, 1]."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    size = (_SIDE, _SIDE)
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=False)
    resized = frames.unflatten(0, (len(clips), clips.shape[2])).transpose(1, 2)
    return 2.0 * resized / 255.0 - 1.0


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive; it is not loaded."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_torchscript(path: Path) -> Any:
    """Load the program, which TorchScript's own interpreter runs.

    Raises:
        CheckpointError: it is damaged, or does not take what I3D's file takes.
    """
    try:
        script = torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, OSError, ValueError) as error:
        first = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} is damaged or no TorchScript file: {first} Copy it again."
        ) from error
    taken = {argument.name for argument in script.forward.schema.arguments}
    missing = sorted({"rescale", "resize", "return_features"} - taken)
    if missing:
        raise CheckpointError(
            f"{path} is a TorchScript program that takes no '{missing[0]}', as {SCRIPT} does. "
            f"Give {SCRIPT} or {STATE}."
        )
    return script
