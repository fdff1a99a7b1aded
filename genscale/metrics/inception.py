"""The FID Inception network: the TensorFlow graph of 2015-12-05, written without torchvision.

Inception-v3 (arXiv:1512.00567) as the graph has it: average pools leave the padding out, the last
block pools by maximum, 1008 classes, no auxiliary head. 23,850,960 parameters, 566 entries.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError
from genscale.io.weights import load_strictly, read_checkpoint
from genscale.metrics.features import FeatureNetwork, as_rgb, fingerprint
from genscale.metrics.resize import RESIZE_MODES, RESIZE_NAMES, ResizeMode, inception_input
from genscale.metrics.weights import INCEPTION_WEIGHTS, find_weights

_SPATIAL_CHANNELS = 7  # of Mixed_6d's 17 x 17 map: 2023 numbers (sFID, arXiv:2103.03841)


class _Unit(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average_pool(x: Tensor) -> Tensor:
    """3x3 average that counts pixels of the picture only, as TensorFlow's SAME padding does."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _MixedA(nn.Module):
    """35x35 block: 1x1, 5x5 and double 3x3 branches."""

    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = _Unit(in_channels, 64, 1)
        self.branch5x5_1 = _Unit(in_channels, 48, 1)
        self.branch5x5_2 = _Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Unit(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Unit(96, 96, 3, padding=1)
        self.branch_pool = _Unit(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch1x1(x), fine, double, self.branch_pool(_average_pool(x))), 1)


class _MixedB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Unit(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Unit(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)), 1)


class _MixedC(nn.Module):
    """17x17 block with 7x7 convolutions factored into 1x7 and 7x1."""

    def __init__(self, in_channels: int, channels_7x7: int) -> None:
        super().__init__()
        c7 = channels_7x7
        self.branch1x1 = _Unit(in_channels, 192, 1)
        self.branch7x7_1 = _Unit(in_channels, c7, 1)
        self.branch7x7_2 = _Unit(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7_3 = _Unit(c7, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = _Unit(in_channels, c7, 1)
        self.branch7x7dbl_2 = _Unit(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = _Unit(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = _Unit(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = _Unit(c7, 192, (1, 7), padding=(0, 3))
        self.branch_pool = _Unit(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(_average_pool(x))
        return torch.cat((self.branch1x1(x), single, double, pooled), 1)


class _MixedD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Unit(in_channels, 192, 1)
        self.branch3x3_2 = _Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Unit(in_channels, 192, 1)
        self.branch7x7x3_2 = _Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        small = self.branch3x3_2(self.branch3x3_1(x))
        wide = self.branch7x7x3_2(self.branch7x7x3_1(x))
        wide = self.branch7x7x3_4(self.branch7x7x3_3(wide))
        return torch.cat((small, wide, F.max_pool2d(x, 3, stride=2)), 1)


class _MixedE(nn.Module):
    """8x8 block whose 3x3 branches end in a 1x3 and a 3x1 side by side."""

    def __init__(self, in_channels: int, *, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = _Unit(in_channels, 320, 1)
        self.branch3x3_1 = _Unit(in_channels, 384, 1)
        self.branch3x3_2a = _Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Unit(in_channels, 448, 1)
        self.branch3x3dbl_2 = _Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Unit(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average_pool(x)
        parts = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )
        return torch.cat(parts, 1)


class InceptionGraph(nn.Module):
    """The network itself: normalised pictures ``(B, 3, 299, 299)`` to all taps.

    The state dict has the keys of ``pt_inception-2015-12-05-6726825d.pth``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        self.Mixed_5b = _MixedA(192, 32)
        self.Mixed_5c = _MixedA(256, 64)
        self.Mixed_5d = _MixedA(288, 64)
        self.Mixed_6a = _MixedB(288)
        self.Mixed_6b = _MixedC(768, 128)
        self.Mixed_6c = _MixedC(768, 160)
        self.Mixed_6d = _MixedC(768, 160)
        self.Mixed_6e = _MixedC(768, 192)
        self.Mixed_7a = _MixedD(768)
        self.Mixed_7b = _MixedE(1280, max_pool=False)
        self.Mixed_7c = _MixedE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return every tap ``(B, length)``; see :attr:`InceptionFID.taps`."""
        taps = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        taps["64"] = x.mean(dim=(2, 3))
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        taps["192"] = x.mean(dim=(2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        # the graph tensor mixed_6/conv:0: a convolution before its batch norm, flattened H, W, C
        spatial = self.Mixed_6d.branch1x1.conv(x)[:, :_SPATIAL_CHANNELS]
        taps["spatial"] = spatial.permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        taps["768"] = x.mean(dim=(2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        taps["2048"] = x.mean(dim=(2, 3))
        taps["logits_unbiased"] = F.linear(taps["2048"], self.fc.weight)
        taps["logits"] = taps["logits_unbiased"] + self.fc.bias
        return taps


class InceptionFID(FeatureNetwork):
    """Features behind FID, sFID, KID, IS and improved precision and recall.

    Args:
        weights: a state dict file with the published keys (``.pth`` read without running any code,
            or ``.safetensors``); None looks in the weights folder.
        mode: resizing, see :func:`genscale.metrics.resize.inception_input`.

    Raises:
        ConfigError: if the mode is unknown.
    """

    name = "inception"
    tap = "2048"
    taps = {
        "64": 64,
        "192": 192,
        "768": 768,
        "2048": 2048,
        "spatial": 17 * 17 * _SPATIAL_CHANNELS,
        "logits": 1008,
        "logits_unbiased": 1008,
    }

    def __init__(self, weights: str | None = None, *, mode: ResizeMode = "tf1") -> None:
        super().__init__()
        if mode not in RESIZE_MODES:
            raise ConfigError(f"mode='{mode}' is unknown. Choose one of {', '.join(RESIZE_MODES)}.")
        self.mode: ResizeMode = mode
        self.resize = RESIZE_NAMES[mode]
        self.weights = weights
        self._sha256: str | None = None
        with torch.device("meta"):  # nothing is allocated before the weights are read
            self.graph = InceptionGraph()
        self.graph.eval().requires_grad_(False)

    @property
    def description(self) -> str:
        """The name in protocols: the 2015-12-05 graph."""
        return "inception_tf"

    @property
    def sha256(self) -> str:
        """Digest of the weights; see :func:`genscale.metrics.features.fingerprint`."""
        self.prepare()
        return str(self._sha256)

    def check(self) -> list[str]:
        """Return a sentence if the weight file is missing."""
        if self._sha256 is None:
            try:
                find_weights(INCEPTION_WEIGHTS, self.weights)
            except CheckpointError as error:
                return [str(error)]
        return []

    def prepare(self) -> None:
        """Read the weight file, once.

        Raises:
            CheckpointError: if the file is missing, damaged, would run code, or holds another
                network.
        """
        if self._sha256 is None:
            path = find_weights(INCEPTION_WEIGHTS, self.weights)
            self.load_weights(read_checkpoint(path), source=path)

    def load_weights(self, state: dict[str, Tensor], *, source: Path | str) -> None:
        """Take the weights of a state dict whose keys and shapes must all match.

        Batch counters (``num_batches_tracked``) may be missing; evaluation never reads them.
        """
        expected = self.graph.state_dict()
        counters = {name for name in expected if name.endswith("num_batches_tracked")}
        state = {name: torch.zeros((), dtype=torch.int64) for name in counters} | state
        device = self.graph.fc.weight.device
        self.graph.to_empty(device="cpu" if device.type == "meta" else device)
        load_strictly(
            self.graph,
            state,
            source=source,
            hint="Give the 2015-12-05 FID network; torchvision's Inception has other weights.",
        )
        # 1.3 times as fast on a CPU; torch's type stub does not know the argument
        self.graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._sha256 = fingerprint({name: state[name] for name in expected if name not in counters})

    def train(self, mode: bool = True) -> InceptionFID:
        """Stay in evaluation mode whatever is asked: batch statistics are never used."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return all taps in float32, TF32 and autocast off."""
        self.prepare()
        images = inception_input(as_rgb(images), self.mode)
        device = images.device.type
        with torch.autocast(device, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
            return self.graph(images.contiguous(memory_format=torch.channels_last))
