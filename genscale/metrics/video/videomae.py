"""VideoMAE features: distances that see motion better than I3D's, which mostly see frames.

Content-debiased FVD (arXiv:2404.12391) takes VideoMAE-v2 giant, tuned on Something-Something-v2.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.conditioning.transformers_folder import Folder, load_model
from genscale.errors import CheckpointError, ConfigError, DataError, require
from genscale.metrics.video.clips import ClipNetwork

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class VideoMAE(ClipNetwork):
    """The pooled output of a VideoMAE of the transformers library (arXiv:2203.12602).

    The mean over all tokens of the last layer, normalised where the classifier does so. Frames are
    resized to the network's side by bilinear interpolation without antialiasing.

    Args:
        folder: config.json and model.safetensors of e.g. MCG-NJU/videomae-base-finetuned-ssv2
            (mind its licence); nothing is fetched.
        frames: frames read of a clip; None: as many as the network was trained with.
        stride: one of how many frames is read.
        normalise: what follows the division by 255: ``imagenet`` for MCG-NJU's models, ``none`` as
            content-debiased FVD does with its own.
        clips_a_pass: clips seen at once.
        name: word in metric names.

    Raises:
        ConfigError: ``normalise`` is unknown.
    """

    tap = "pool"
    resize = "torch_bilinear"

    def __init__(
        self,
        folder: str | None = None,
        *,
        frames: int | None = 16,
        stride: int = 1,
        normalise: Literal["imagenet", "none"] = "imagenet",
        clips_a_pass: int = 4,
        name: str = "videomae",
    ) -> None:
        super().__init__(name, frames, stride)
        if normalise not in ("imagenet", "none"):
            raise ConfigError(f"normalise='{normalise}' is unknown. Choose one of imagenet, none.")
        self.folder = Folder("metrics.features.folder", folder, "a VideoMAE model", ("weights",))
        self.normalise = normalise
        self.clips_a_pass = clips_a_pass
        self.taps = {"pool": 0}  # told by the config
        self.model: Any = nn.Identity()
        self._sha256: str | None = None

    @property
    def description(self) -> str:
        """The name in protocols, with what is done to colours."""
        return f"videomae_{self.normalise}"

    @property
    def sha256(self) -> str:
        """Digest of the folder's files."""
        self.prepare()
        return str(self._sha256)

    def check(self) -> list[str]:
        """Return a sentence for a folder or package that is missing."""
        try:
            self.folder.path()
            require("transformers", what="The feature network 'videomae'", extra="transformers")
        except (CheckpointError, ConfigError, ImportError) as error:
            return [str(error)]
        return []

    def prepare(self) -> None:
        """Read the model, once.

        Raises:
            CheckpointError: files are missing, damaged, or of another model.
            ConfigError: no folder was given.
            ImportError: transformers is missing.
        """
        if self._sha256 is not None:
            return
        require("transformers", what="The feature network 'videomae'", extra="transformers")
        config = self.folder.config()
        tuned = "VideoMAEForVideoClassification" in config.get("architectures", ())
        kind = "VideoMAEForVideoClassification" if tuned else "VideoMAEModel"
        self.model = load_model(self.folder, kind, "float32")
        self.taps = {"pool": self.model.config.hidden_size}
        self._sha256 = self.folder.digest()

    def train(self, mode: bool = True) -> VideoMAE:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``pool`` ``(B, width)`` in float32 of clips ``(B, 1 or 3, T, H, W)``.

        Raises:
            DataError: another number of frames is read than the model knows.
        """
        self.prepare()
        clips = self.window(images)
        known = self.model.config.num_frames
        if clips.shape[2] != known:
            raise DataError(
                f"The VideoMAE in {self.folder.place} reads {known} frames, but {clips.shape[2]} "
                f"of each clip are taken. Give frames={known} and a fitting stride."
            )
        parts = clips.split(self.clips_a_pass)
        with torch.autocast(images.device.type, enabled=False):
            return {"pool": torch.cat([self._pooled(part) for part in parts])}

    def _pooled(self, clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1).float() / 255.0
        side = self.model.config.image_size
        frames = F.interpolate(frames, (side, side), mode="bilinear", align_corners=False)
        if self.normalise == "imagenet":
            mean, std = (frames.new_tensor(each)[:, None, None] for each in (_MEAN, _STD))
            frames = (frames - mean) / std
        values = frames.unflatten(0, (len(clips), clips.shape[2]))
        body = getattr(self.model, "videomae", self.model)
        pooled: Tensor = body(pixel_values=values).last_hidden_state.mean(dim=1)
        norm = getattr(self.model, "fc_norm", None)
        return pooled if norm is None else norm(pooled)
