"""The layers of BigGAN, BigBiGAN and BigGAN-deep, computed channels-last; how, is in :class:`Conv`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators import winograd
from mlviews.generators.cpu import fast

_SCORES = 1 << 19  # scores of an attention that a CPU works on at a time: more would not stay in its cache
_CACHED = 1 << 22  # values of the activations that a CPU works on at a time


def to_last(x: Tensor) -> Tensor:
    """Return ``[B, C, H, W]`` in channels-last layout as contiguous ``[B, H, W, C]``."""
    return x.permute(0, 2, 3, 1)


def to_first(x: Tensor) -> Tensor:
    """Return ``[B, H, W, C]`` as ``[B, C, H, W]``, whose layout is then channels-last."""
    return x.permute(0, 3, 1, 2)


def random_weight(*shape: int) -> nn.Parameter:
    """Return random weights that keep the variance of what they are applied to; kernels channels-last.

    On the meta device, where a draw has no result but costs seconds of imports, nothing is drawn.
    """
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    weights = torch.empty(shape, memory_format=layout)
    if not weights.is_meta:
        weights.normal_(std=weights[0].numel() ** -0.5)
    return nn.Parameter(weights)


class Linear(nn.Linear):
    """A linear map, ``[..., I] -> [..., O]``, with the initial values of :func:`random_weight`."""

    def reset_parameters(self) -> None:
        self.weight = random_weight(*self.weight.shape)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.zeros(self.out_features))


class Conv(nn.Module):
    """A 3x3 convolution ``[B, C, H, W] -> [B, C', H, W]``.

    With ``up``, it comes after upsampling to nearest neighbors: ``-> [B, C', 2H, 2W]``.

    In float32 on a CPU, where products of matrices are what costs, it takes as few as it can (minimal
    filtering, Winograd 1980), unless there are so few channels that the sums around them cost more.
    Everywhere else it is the library's convolution, with the upsampling merged into it: a transposed
    convolution of 4x4 taps and stride 2.

    Args:
        channels: C.
        out_channels: C'.
        size: H and W of the input.
        up: whether to upsample first.
    """

    def __init__(self, channels: int, out_channels: int, size: int, *, up: bool = False) -> None:
        super().__init__()
        self.kernel = random_weight(out_channels, channels, 3, 3)
        self.up = up
        self.filtered = channels >= 256 if up else channels >= 64 and size % winograd.TILE == 0
        # The kernel as either way takes it, made when it is first needed.
        self._forms: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        if self.filtered and fast(x):
            return self._filter(x)
        if self.up:
            return F.conv_transpose2d(x, self._form("merged", self._merged), stride=2, padding=1)
        return F.conv2d(x, self.kernel, padding=1)

    def _filter(self, x: Tensor) -> Tensor:
        """Take linear forms of all tiles, a product of matrices for each form, and forms of the results."""
        if self.up:
            weight, gather, combine = self._weight_up, _gather_up, _combine_up
            step = 1
        else:
            weight, gather, combine = self._weight, winograd.input_forms, winograd.output_forms
            step = winograd.TILE
        padded = F.pad(to_last(x), (0, 0, 1, 1, 1, 1))  # [B, H + 2, W + 2, C]
        filtered = winograd.convolve_last(
            padded,
            self._form("weight", weight),
            self._form("gather", gather),
            self._form("combine", combine),
            step,
        )
        return to_first(filtered)

    # What follows from the kernel.

    def _merged(self) -> Tensor:
        """Return the kernel with the upsampling before it, ``[C, C', 4, 4]``."""
        # An output before or after a pixel's middle sees it and one neighbor: (a, b + c) or (a + b, c) of
        # the taps (a, b, c).
        axis = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
        return _on_both_axes(axis, self.kernel.transpose(0, 1))

    def _weight(self) -> Tensor:
        """Return the weights of the products of minimal filtering, ``[36, C, C']``."""
        return winograd.weight_forms(self.kernel).transpose(1, 2).contiguous()

    def _weight_up(self) -> Tensor:
        """Return the weights of the products after upsampling, ``[9, C, C']``.

        Along an axis, the outputs before and after the middle of x[i] are ``S x[i] - a (x[i] - x[i-1])`` and
        ``S x[i] + c (x[i+1] - x[i])`` with ``S = a + b + c``: three products for two outputs, where the
        merged kernel takes four.
        """
        axis = ((1, 0, 0), (1, 1, 1), (0, 0, 1))
        return _on_both_axes(axis, self.kernel).permute(2, 3, 1, 0).flatten(0, 1).contiguous()

    def _form(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make`` makes, which is kept from the first time on."""
        if name not in self._forms:
            kind = self.kernel.device.type
            autocast = torch.autocast("cpu" if kind == "meta" else kind, enabled=False)
            # Whole and plain, whatever mode it happens to be made in.
            with torch.inference_mode(False), torch.no_grad(), autocast:
                self._forms[name] = make()
        return self._forms[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Conv:
        self._forms = {}  # from now on elsewhere, or in another precision
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _forget(conv: Conv, _: Any) -> None:
    """Forget what followed from the weights, after others were loaded."""
    conv._forms = {}


def _gather_up() -> Tensor:
    """Return the forms of a pixel and its neighbors: itself, and differences, on both axes: ``[9, 9]``."""
    differences = torch.tensor(((1, -1, 0), (0, 1, 0), (0, -1, 1)), dtype=torch.float32, device="cpu")
    return torch.kron(differences, differences)


def _combine_up() -> Tensor:
    """Return what makes the 2x2 pixels from the products, ``[4, 9]``."""
    sums = torch.tensor(((1, 1, 0), (0, 1, 1)), dtype=torch.float32, device="cpu")
    return torch.kron(sums, sums)


def _on_both_axes(matrix: tuple[tuple[int, ...], ...], kernel: Tensor) -> Tensor:
    """Apply the matrix ``[p, 3]`` to columns and rows of the kernel: ``[.., .., 3, 3] -> [.., .., p, p]``."""
    axis = torch.tensor(matrix, dtype=kernel.dtype, device=kernel.device)
    return (axis @ kernel @ axis.T).contiguous(memory_format=torch.channels_last)


class Attention(nn.Module):
    """Self-attention on an image, ``[B, C, H, W] -> [B, C, H, W]`` (Zhang et al. 2019).

    Every pixel has a query; every 2x2 pixels have a key and a value.

    Args:
        channels: C.
        queries: channels of a query and of a key, Q.
        values: channels of a value, V.
    """

    def __init__(self, channels: int, queries: int, values: int) -> None:
        super().__init__()
        self.query = random_weight(queries, channels)
        self.answer = random_weight(queries + values, channels)  # keys, then values
        self.outer = random_weight(channels, values)

    def forward(self, x: Tensor) -> Tensor:
        last = to_last(x)
        queries, values = len(self.query), self.outer.shape[1]
        query = F.linear(last, self.query).flatten(1, 2)  # [B, H W, Q]
        answer = F.max_pool2d(to_first(F.linear(last, self.answer)), 2)  # [B, Q + V, H / 2, W / 2]
        key, value = (
            to_last(answer).flatten(1, 2).split([queries, values], dim=2)
        )  # [B, H W / 4, Q], [B, H W / 4, V]
        if fast(x):
            attended = _attend(query, key, value)
        else:
            # The fused kernels want queries as long as values.
            query, key = (F.pad(part, (0, values - queries)) for part in (query, key))
            heads = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)
            attended = heads[:, 0]  # [B, H W, V]
        return x + to_first(F.linear(attended, self.outer).view(last.shape))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the softmax of ``[B, N, Q]`` times ``[B, M, Q]`` over M, times ``[B, M, V]``: ``[B, N, V]``.

    It takes as many rows at a time as the cache holds scores for.
    """
    attended = query.new_empty(*query.shape[:2], value.shape[2])
    rows = max(_SCORES // key.shape[1], 1)
    buffer = query.new_empty(rows, key.shape[1])
    samples = zip(query, key.transpose(1, 2).contiguous(), value.contiguous(), attended, strict=True)
    for sample_query, sample_key, sample_value, out in samples:
        for part, part_out in zip(sample_query.split(rows), out.split(rows), strict=True):
            scores = torch.mm(part, sample_key, out=buffer[: len(part)])
            torch.mm(torch.softmax(scores, dim=1, out=scores), sample_value, out=part_out)
    return attended


class First(nn.Module):
    """Level 0: ``z [B, d] -> [B, C, s, s]``, a linear map, with outputs in channels-last order.

    Args:
        chunk: d.
        channels: C.
        size: s.
    """

    def __init__(self, chunk: int, channels: int, size: int) -> None:
        super().__init__()
        self.shape = (size, size, channels)
        self.weight = random_weight(size * size * channels, chunk)
        self.bias = nn.Parameter(torch.zeros(size * size * channels))

    def forward(self, z: Tensor, state: None) -> Tensor:
        return to_first(F.linear(z, self.weight, self.bias).view(-1, *self.shape))


class Styled(nn.Module, ABC):
    """A residual block whose norms a latent sets: ``z [B, d], state [B, C, H, W] -> [B, C', H', W']``.

    All that a norm does is folded into the linear map from z to its scale and shift. A subclass computes the
    rest in :meth:`transformed`.

    Args:
        dim: d, values of what sets the norms.
        widths: channels of each norm.
        up: whether rows and columns are doubled.
    """

    def __init__(self, dim: int, widths: Sequence[int], *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.splits = [width for width in widths for _ in range(2)]  # scale and shift of each norm
        self.style = Linear(dim, sum(self.splits))
        if not self.style.bias.is_meta:
            for scale in self.style.bias.detach().split(self.splits)[::2]:
                scale.fill_(1)

    def forward(self, z: Tensor, state: Tensor) -> Tensor:
        style = self.style(z)  # [B, sum of splits]
        if not fast(state):
            return self.transformed(style, state)
        # Some images at a time: their activations stay in the cache, and a batch takes no more memory than
        # they do.
        pixels = state.shape[2] * state.shape[3] * (4 if self.up else 1)
        count = max(_CACHED // (pixels * max(self.splits)), 1)
        parts = [self.transformed(*part) for part in zip(style.split(count), state.split(count), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @abstractmethod
    def transformed(self, style: Tensor, x: Tensor) -> Tensor:
        """Return the next state, from scales and shifts ``[B, sum of splits]`` and the state before."""

    def norms(self, style: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield each norm with the ReLU after it, as a function of ``[B, C, h, w]``."""
        factors = style[:, :, None, None].split(self.splits, dim=1)
        for scale, shift in zip(factors[::2], factors[1::2], strict=True):
            yield partial(_normed, scale, shift)


def _normed(scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    """Return ``relu(x * scale + shift)``."""
    return torch.addcmul(shift, x, scale).relu_()


def add_upsampled(h: Tensor, low: Tensor) -> Tensor:
    """Add each pixel of ``low [B, H, W, C]`` to the 2x2 pixels of h that upsampling would make of it.

    Args:
        h: ``[B, C, 2H, 2W]``, changed in place if its channels come last in memory.
        low: channels last.

    Returns:
        The sum, ``[B, C, 2H, 2W]``.
    """
    h = h.contiguous(memory_format=torch.channels_last)  # as it is, unless the library chose otherwise
    rows, columns = low.shape[1:3]
    to_last(h).view(len(h), rows, 2, columns, 2, -1).add_(low[:, :, None, :, None])
    return h


class Block(Styled):
    """Every other level, a residual block: ``z [B, d], state [B, C, H, W] -> [B, C', 2H, 2W]``.

    Twice norm, ReLU and 3x3 convolution, beside a 1x1 convolution, which commutes with the upsampling and
    comes before it. The first convolution upsamples. Neither has a bias: the first one's is part of the
    second norm's shift, the second one's of the shortcut's.

    Args:
        dim: d, values of a latent, after the class's embedding if it has one.
        channels: C.
        out_channels: C'.
        size: H and W.
        attention: self-attention on the output, or None.
        head: what makes images of the last block's output; None for all others.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        out_channels: int,
        size: int,
        attention: Attention | None,
        head: Head | None,
    ) -> None:
        super().__init__(dim, (channels, out_channels), up=True)
        self.conv1 = Conv(channels, out_channels, size, up=True)
        self.conv2 = Conv(out_channels, out_channels, 2 * size)
        self.shortcut = Linear(channels, out_channels)
        self.attention = attention
        self.head = head

    def transformed(self, style: Tensor, x: Tensor) -> Tensor:
        norm1, norm2 = self.norms(style)
        h: Tensor = self.conv1(norm1(x))  # [B, C', 2H, 2W]
        h = self.conv2(norm2(h))
        h = add_upsampled(h, self.shortcut(to_last(x)))
        if self.attention is not None:
            h = self.attention(h)
        if self.head is not None:
            h = self.head(h)
        return h


class Head(nn.Module):
    """After the last block: norm, ReLU, 3x3 convolution and tanh, ``[B, C, H, W] -> [B, 3, H, W]`` in [0, 1].

    As ``(tanh(x) + 1) / 2 = sigmoid(2 x)``, kernel and bias are twice those of the convolution.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.kernel = random_weight(3, channels, 3, 3)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(self.shift, x, self.scale).relu_()
        if fast(x):
            # The library is slow with so few outputs: a product for each tap, then shifted sums.
            taps = self.kernel.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [27, C]
            products = taps @ to_last(x).flatten(1, 2).transpose(1, 2)  # [B, 27, H W]
            image = F.fold(products, x.shape[2:], 3, padding=1) + self.bias[:, None, None]
        else:
            image = F.conv2d(x, self.kernel, self.bias, padding=1)
        return image.float().sigmoid()
