"""Invertible layers of image rescaling, and a chain of them that keeps one activation.

Xiao et al., "Invertible Image Rescaling", arXiv:2005.05650. Every layer maps both ways and tells
its log-determinant. Because a layer's input can be had from its output, the backward pass of a
:class:`InvertibleChain` rebuilds activations on its way: memory does not grow with depth
(Gomez et al., "The Reversible Residual Network", arXiv:1707.04585).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genscale.layers.norm import no_autocast


class Rebuilt(NamedTuple):
    """What one layer hands on in the backward pass: its input, and the gradients of it.

    Args:
        value: the layer's input, computed from its output.
        grad: the gradient of the input.
        parameters: the gradients of :meth:`Invertible.trained`, in that order.
    """

    value: Tensor
    grad: Tensor
    parameters: tuple[Tensor | None, ...]


class Invertible(nn.Module):
    """A layer that maps both ways: ``layer(x) -> (y, log_det)``, ``layer(y, inverse=True)``.

    ``log_det`` is that of the direction asked for, of one sample, averaged over the batch.
    """

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return the image of ``x`` and the log-determinant, of the direction asked for."""
        raise NotImplementedError

    def trained(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters that need a gradient."""
        return tuple(parameter for parameter in self.parameters() if parameter.requires_grad)

    def rebuild(self, out: Tensor, grad: Tensor, grad_log_det: Tensor, inverse: bool) -> Rebuilt:
        """Return the input that gave ``out``, and the gradients of it and of the parameters.

        Args:
            out: what ``forward(x, inverse)`` returned.
            grad: the gradient of ``out``.
            grad_log_det: the gradient of the log-determinant, a number.
            inverse: the direction that was taken.
        """
        with torch.no_grad():
            value = self(out, not inverse)[0]
        with torch.enable_grad():
            value = value.detach().requires_grad_()
            again, log_det = self(value, inverse)
            outputs, grads = [again], [grad]
            if log_det.requires_grad:
                outputs, grads = [again, log_det], [grad, grad_log_det]
            own = torch.autograd.grad(outputs, (value, *self.trained()), grads, allow_unused=True)
        assert own[0] is not None  # the output of a bijection depends on its input
        return Rebuilt(value.detach(), own[0], own[1:])


class HaarDownsampling(Invertible):
    """The mean and three differences of every 2x2 square: ``(B, C, H, W) -> (B, 4C, H/2, W/2)``.

    The result is ordered by band: C means, C differences of columns, of rows, and of diagonals.

    Args:
        channels: C.
    """

    haar_weights: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        # a buffer: official files keep these signs under the same key
        self.register_buffer("haar_weights", torch.empty(4 * channels, 1, 2, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the signs of the four bands."""
        signs = torch.tensor(
            [[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]],
            dtype=self.haar_weights.dtype,
        )
        self.haar_weights.copy_(signs[:, None].repeat(self.channels, 1, 1, 1))

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Take squares apart, or put them together."""
        # every square's matrix has the determinant 16 / 4^4
        log_det = x.new_full((), x[0].numel() / 4 * math.log(16.0) * (1 if inverse else -1))
        if inverse:
            channel_major = x.unflatten(1, (4, self.channels)).transpose(1, 2).flatten(1, 2)
            out = F.conv_transpose2d(
                channel_major, self.haar_weights, stride=2, groups=self.channels
            )
            return out, log_det
        bands = F.conv2d(x, self.haar_weights, stride=2, groups=self.channels) / 4.0
        return bands.unflatten(1, (self.channels, 4)).transpose(1, 2).flatten(1, 2), log_det


class ConvDownsampling(Invertible):
    """A learnt invertible mixing of the pixels of every s x s square, the same for all channels.

    The result ``(B, s^2 C, H/s, W/s)`` is ordered by band. It starts as Haar's bands for s = 2; for
    other s the first band is the mean and band i > 0 is pixel i.

    Args:
        scale: side s of the squares.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv_weights = nn.Parameter(torch.empty(scale**2, scale**2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the starting matrix."""
        if self.scale == 2:
            signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
            self.conv_weights.copy_(torch.tensor(signs) / 4.0)
        else:
            nn.init.eye_(self.conv_weights)
            self.conv_weights[0].fill_(1.0 / self.scale**2)

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Take squares apart, or put them together."""
        s = self.scale
        log_det = torch.linalg.slogdet(self.conv_weights)[1] * (x[0].numel() / s**2)
        if inverse:
            matrix = torch.linalg.inv(self.conv_weights)
            bands = torch.einsum("pq,bqchw->bpchw", matrix, x.unflatten(1, (s * s, -1)))
            return F.pixel_shuffle(bands.transpose(1, 2).flatten(1, 2), s), -log_det
        pixels = F.pixel_unshuffle(x, s).unflatten(1, (-1, s * s))  # (B, C, s^2, h, w)
        bands = torch.einsum("pq,bcqhw->bpchw", self.conv_weights, pixels)
        return bands.flatten(1, 2), log_det


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of all features so far; the last, linear one starts at zero.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        growth: channels that each of the first four convolutions adds.
    """

    def __init__(self, in_channels: int, out_channels: int, growth: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels + growth, growth, 3, padding=1)
        self.conv3 = nn.Conv2d(in_channels + 2 * growth, growth, 3, padding=1)
        self.conv4 = nn.Conv2d(in_channels + 3 * growth, growth, 3, padding=1)
        self.conv5 = nn.Conv2d(in_channels + 4 * growth, out_channels, 3, padding=1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a tenth of Xavier's normal law; the last convolution is zero, and all biases."""
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            nn.init.xavier_normal_(conv.weight, gain=0.1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.conv5.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``."""
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = torch.cat((x, F.leaky_relu(conv(x), 0.2)), dim=1)
        out: Tensor = self.conv5(x)
        return out


class InvBlock(Invertible):
    """An affine coupling of the image's channels x1 with all others x2.

    y1 = x1 + F(x2), s = clamp (2 sigmoid(H(y1)) - 1), y2 = x2 exp(s) + G(y1).

    Args:
        channels: channels that are coupled.
        split: channels of x1.
        growth: growth of the three dense blocks.
        clamp: bound of s.
        given: channels behind these that all three dense blocks read besides, and that leave the
            layer as they are.
    """

    def __init__(
        self, channels: int, split: int, growth: int = 32, clamp: float = 1.0, given: int = 0
    ) -> None:
        super().__init__()
        self.split, self.clamp, self.channels, self.given = split, clamp, channels, given
        self.F = DenseBlock(channels - split + given, split, growth)
        self.G = DenseBlock(split + given, channels - split, growth)
        self.H = DenseBlock(split + given, channels - split, growth)

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Couple both parts, or undo it."""
        first, second, given = self._parts(x)
        if not inverse:
            first = first + self.F(self._beside(second, given))
        s, shift = self._affine(self._beside(first, given))
        if inverse:
            second = (second - shift) * torch.exp(-s)
            first = first - self.F(self._beside(second, given))
        else:
            second = second * torch.exp(s) + shift
        log_det = s.sum() / (-len(x) if inverse else len(x))
        return torch.cat((first, second, given), dim=1), log_det

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x1, x2, and what is given."""
        return x[:, : self.split], x[:, self.split : self.channels], x[:, self.channels :]

    def _beside(self, part: Tensor, given: Tensor) -> Tensor:
        return torch.cat((part, given), dim=1) if self.given else part

    def _affine(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the factor on x2, and the shift; ``first`` has what is given."""
        return self.clamp * (2.0 * torch.sigmoid(self.H(first)) - 1.0), self.G(first)

    def rebuild(self, out: Tensor, grad: Tensor, grad_log_det: Tensor, inverse: bool) -> Rebuilt:
        """Do as the base class says, with one evaluation of each dense block in place of two."""
        first, second, given = self._parts(out)
        grad_first, grad_second, grad_given = self._parts(grad)
        share = grad_log_det / len(out)
        found: dict[nn.Parameter, Tensor] = {}
        if inverse:  # from x1, x2 to y1 = x1 + F(x2), then y2
            f = _Pulled(self._beside(second, given), (self.F,), lambda x2: (self.F(x2),))
            first = first + f.values[0]
            of_second = f.pull(found, -grad_first)
            grad_second = grad_second + of_second[:, : second.shape[1]]
            affine = _Pulled(self._beside(first, given), (self.H, self.G), self._affine)
            s, shift = affine.values
            grad_s, grad_shift = -share - grad_second * second, -grad_second * torch.exp(-s)
            second, grad_second = second * torch.exp(s) + shift, -grad_shift
            of_first = affine.pull(found, grad_s, grad_shift)
            grad_first = grad_first + of_first[:, : self.split]
        else:  # from y1, y2 to x2 = (y2 - G(y1)) exp(-s), then x1
            affine = _Pulled(self._beside(first, given), (self.H, self.G), self._affine)
            s, shift = affine.values
            second = (second - shift) * torch.exp(-s)
            through = grad_second * torch.exp(s)
            of_first = affine.pull(found, share + through * second, grad_second)
            grad_first = grad_first + of_first[:, : self.split]
            f = _Pulled(self._beside(second, given), (self.F,), lambda x2: (self.F(x2),))
            first = first - f.values[0]
            of_second = f.pull(found, grad_first)
            grad_second = through + of_second[:, : second.shape[1]]
        if self.given:
            grad_given = grad_given + of_first[:, self.split :] + of_second[:, second.shape[1] :]
        return Rebuilt(
            torch.cat((first, second, given), dim=1),
            torch.cat((grad_first, grad_second, grad_given), dim=1),
            tuple(found[parameter] for parameter in self.trained()),
        )


class _Pulled:
    """Values of modules at one input, whose gradients are asked for later.

    Args:
        x: the input.
        modules: whose parameters get gradients.
        function: of the input.
    """

    def __init__(
        self,
        x: Tensor,
        modules: Sequence[nn.Module],
        function: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> None:
        parameters = (parameter for module in modules for parameter in module.parameters())
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        with torch.enable_grad():
            self.leaf = x.detach().requires_grad_()
            self.outputs = function(self.leaf)
        self.values = tuple(output.detach() for output in self.outputs)

    def pull(self, found: dict[nn.Parameter, Tensor], *grads: Tensor) -> Tensor:
        """Return the input's gradient, and put those of the parameters into ``found``."""
        own = torch.autograd.grad(self.outputs, (self.leaf, *self.parameters), grads)
        found.update(zip(self.parameters, own[1:], strict=True))
        return own[0]


class _Reversible(torch.autograd.Function):
    """The whole chain as one operation that keeps its output alone."""

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[Invertible], inverse: bool, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, log_det = run_chain(layers, x, inverse)
        ctx.layers, ctx.inverse = layers, inverse
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.save_for_backward(out)
        return out, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
        (out,) = ctx.saved_tensors
        trained = [layer.trained() for layer in ctx.layers]
        if ctx.versions != [p._version for own in trained for p in own]:
            raise RuntimeError(
                "The weights of an invertible chain changed between its forward and its backward "
                "pass, which rebuilds activations from them; call backward before the optimizer "
                "steps, or build the model with reversible=False."
            )
        grads: dict[int, tuple[Tensor | None, ...]] = {}
        order = range(len(ctx.layers))
        with no_autocast(out.device):
            for index in order if ctx.inverse else reversed(order):
                out, grad, grads[index] = ctx.layers[index].rebuild(
                    out, grad, grad_log_det, ctx.inverse
                )
        return None, None, grad, *(found for index in order for found in grads[index])


def run_chain(
    layers: Sequence[Invertible], x: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Send ``x`` through all layers, backwards for the inverse, and add their log-determinants."""
    log_det = x.new_zeros(())
    for layer in reversed(layers) if inverse else layers:
        x, own = layer(x, inverse)
        log_det = log_det + own
    return x, log_det


class InvertibleChain(nn.ModuleList):
    """Invertible layers one behind the other.

    Args:
        layers: at least one.
        reversible: rebuild activations in the backward pass in place of keeping them. Gradients
            then differ by the rounding of the inverse, about 1e-6 of their size in float32.
    """

    def __init__(self, layers: Sequence[Invertible], reversible: bool = True) -> None:
        super().__init__(layers)
        self.reversible = reversible

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return the image of ``x`` and its log-determinant, autocast or not in x's type."""
        layers = [layer for layer in self if isinstance(layer, Invertible)]
        with no_autocast(x.device):
            if not (self.reversible and torch.is_grad_enabled()):
                return run_chain(layers, x, inverse)
            parameters = [parameter for layer in layers for parameter in layer.trained()]
            out: tuple[Tensor, Tensor] = _Reversible.apply(layers, inverse, x, *parameters)
            return out
