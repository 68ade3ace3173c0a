"""BigGAN (Brock et al. 2019) and BigBiGAN's generator (Donahue & Simonyan 2019): one latent per level, "hierarchical z".

The first chunk of z makes a 4x4 image of features through a linear layer. Every later chunk, after the embedding of the class,
sets scale and shift of the two batch norms of one residual block, which doubles the resolution; one or more blocks end
in self-attention (Zhang et al. 2019).

What does not depend on the latents is folded once, when the weights are read: spectral norms into the weights; the norms'
statistics, the biases before them and (where there is one class) the class into the linear map from a latent to scales and
shifts; the attention's gain into its output. What remains is computed channels-last; how, is in :class:`Conv`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators import winograd
from mlviews.generators.base import MLVGM, Latents, Level

_STRIP = 1 << 20  # values of a strip of tiles: more would not stay in the processor's cache
_MIN_TILES = 96  # in a strip: fewer would read the weights too often
_CACHED = 1 << 22  # values of the activations that a CPU works on at a time


# -- layers --------------------------------------------------------------------------------------------------------


def fast(x: Tensor) -> bool:
    """Is this computed on a CPU in float32, as written here, and with no gradient to keep anything for?"""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def to_last(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` in channels-last layout as contiguous ``[B, H, W, C]``."""
    return x.permute(0, 2, 3, 1)


def to_first(x: Tensor) -> Tensor:
    """``[B, H, W, C] -> [B, C, H, W]``, whose layout is then channels-last."""
    return x.permute(0, 3, 1, 2)


class Conv(nn.Module):
    """A 3x3 convolution ``[B, C, H, W] -> [B, C', H, W]``; with ``up``, after upsampling to nearest neighbours, ``-> [B, C', 2H, 2W]``.

    In float32 on a CPU, where products of matrices are what costs, it takes as few as it can (minimal filtering, Winograd 1980),
    unless there are so few channels that the sums around them cost more. Everywhere else it is the library's convolution, with
    the upsampling merged into it: a transposed convolution of 4x4 taps and stride 2.

    Args:
        kernel: float32 ``[C', C, 3, 3]``.
        size: H and W of the input.
        up: upsample first.
    """

    def __init__(self, kernel: Tensor, size: int, *, up: bool = False) -> None:
        super().__init__()
        self.kernel = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
        self.up = up
        self.tiled = kernel.shape[1] >= 256 if up else kernel.shape[1] >= 64 and size % winograd.TILE == 0
        self._made: dict[str, Tensor] = {}  # the kernel as either way takes it, made when it is first needed
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        if self.tiled and fast(x):
            return self._filter(x)
        if not self.up:
            return F.conv2d(x, self.kernel, padding=1)
        # An output before or after a pixel's middle sees it and one neighbour: (a, b + c) or (a + b, c) of the taps (a, b, c).
        axis = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
        merged = self._keep("merged", lambda: _on_both_axes(axis, self.kernel.transpose(0, 1)))
        return F.conv_transpose2d(x, merged, stride=2, padding=1)

    def _filter(self, x: Tensor) -> Tensor:
        """Linear forms of every tile of inputs, a product of matrices for each form, and linear forms of the results."""
        weight, gather, combine = (self._keep(name, make) for name, make in self._forms().items())
        (forms, channels, out_channels), pixels = weight.shape, len(combine)
        side, made, step = int(gather.shape[1] ** 0.5), int(pixels**0.5), 1 if self.up else winograd.TILE
        padded = F.pad(to_last(x), (0, 0, 1, 1, 1, 1))
        images, down, across = len(x), x.shape[2] // step, x.shape[3] // step
        row, column = padded.stride()[1:3]
        shape = (side, side, images, down, across, channels)
        tiles = padded.as_strided(shape, (row, column, padded.stride(0), row * step, column * step, 1))
        whole = x.new_empty(images, down, made, across, made, out_channels)
        pixel_of = whole.permute(2, 4, 0, 1, 3, 5)

        most = max(
            _STRIP // (forms * max(channels, out_channels)), _MIN_TILES
        )  # tiles in a strip: of some images, or of one's rows
        together, rows = max(most // (down * across), 1), max(min(most // across, down), 1)
        sizes = (side**2 * channels, forms * channels, forms * out_channels, pixels * out_channels)
        room = [x.new_empty(size * min(together, images) * rows * across) for size in sizes]
        for first in range(0, images, together):
            for top in range(0, down, rows):
                part = (slice(None), slice(None), slice(first, first + together), slice(top, top + rows))
                strip = tiles[part]
                n = strip[0, 0, ..., 0].numel()
                gathered, formed, mixed, combined = (
                    buffer[: size * n] for buffer, size in zip(room, sizes, strict=True)
                )
                gathered.view(strip.shape).copy_(strip)
                torch.mm(gather, gathered.view(side**2, -1), out=formed.view(forms, -1))
                torch.bmm(formed.view(forms, n, -1), weight, out=mixed.view(forms, n, -1))
                torch.mm(combine, mixed.view(forms, -1), out=combined.view(pixels, -1))
                pixel_of[part].copy_(combined.view(pixel_of[part].shape))
        return to_first(whole.view(images, down * made, across * made, out_channels))

    def _forms(self) -> dict[str, Callable[[], Tensor]]:
        """The weights of the products ``[forms, C, C']``, and of the forms of a tile and of the results."""
        if not self.up:
            return {
                "weight": lambda: winograd.weight_forms(self.kernel).transpose(1, 2).contiguous(),
                "gather": winograd.input_forms,
                "combine": winograd.output_forms,
            }
        # Along an axis, the outputs before and after the middle of x[i] are S x[i] - a (x[i] - x[i-1]) and S x[i] + c (x[i+1] - x[i])
        # with S = a + b + c: three products for two outputs, where the merged kernel takes four.
        axis = ((1, 0, 0), (1, 1, 1), (0, 0, 1))
        differences, sums = (
            torch.tensor(matrix, dtype=torch.float32, device="cpu")
            for matrix in (((1, -1, 0), (0, 1, 0), (0, -1, 1)), ((1, 1, 0), (0, 1, 1)))
        )
        return {
            "weight": lambda: _on_both_axes(axis, self.kernel).permute(2, 3, 1, 0).flatten(0, 1).contiguous(),
            "gather": lambda: torch.kron(differences, differences),
            "combine": lambda: torch.kron(sums, sums),
        }

    def _keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._made:  # whole and plain, whatever mode it happens to be made in
            where = self.kernel.device.type
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(where if where != "meta" else "cpu", enabled=False),
            ):
                self._made[name] = make()
        return self._made[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Conv:
        self._made = {}  # from now on elsewhere, or in another precision
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _forget(conv: Conv, _: Any) -> None:
    """After other weights were loaded."""
    conv._made = {}


def _on_both_axes(matrix: tuple[tuple[int, ...], ...], kernel: Tensor) -> Tensor:
    """``[.., .., 3, 3] -> [.., .., p, p]``: the matrix ``[p, 3]`` applied to the kernel's columns and rows."""
    axis = torch.tensor(matrix, dtype=kernel.dtype, device=kernel.device)
    return (axis @ kernel @ axis.T).contiguous(memory_format=torch.channels_last)


class Attention(nn.Module):
    """Self-attention on an image, ``[B, C, H, W] -> [B, C, H, W]``: every pixel asks, every 2x2 pixels answer (Zhang et al. 2019).

    Args:
        query: weight of the queries ``[Q, C]``.
        answer: weights of keys and values ``[Q + V, C]``.
        outer: weight of the output ``[C, V]``.
    """

    def __init__(self, query: Tensor, answer: Tensor, outer: Tensor) -> None:
        super().__init__()
        self.query, self.answer, self.outer = nn.Parameter(query), nn.Parameter(answer), nn.Parameter(outer)

    def forward(self, x: Tensor) -> Tensor:
        last = to_last(x)
        queries, values = len(self.query), self.outer.shape[1]
        query = F.linear(last, self.query).flatten(1, 2)  # [B, H W, Q]
        answer = to_last(F.max_pool2d(to_first(F.linear(last, self.answer)), 2)).flatten(1, 2)
        key, value = answer.split([queries, values], dim=2)  # [B, H W / 4, Q], [B, H W / 4, V]
        if fast(x):
            seen = _attend(query, key, value)
        else:  # the fused kernels want queries as long as values
            query, key = (F.pad(part, (0, values - queries)) for part in (query, key))
            seen = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)[
                :, 0
            ]
        return x + to_first(F.linear(seen, self.outer).view(last.shape))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax of ``[B, N, Q]`` times ``[B, M, Q]`` over M, times ``[B, M, V]``, as many rows at a time as the cache holds scores for."""
    seen = query.new_empty(*query.shape[:2], value.shape[2])
    rows = max((_STRIP // 2) // key.shape[1], 1)
    room = query.new_empty(rows, key.shape[1])
    for q, k, v, out in zip(query, key.transpose(1, 2).contiguous(), value.contiguous(), seen, strict=True):
        for part, into in zip(q.split(rows), out.split(rows), strict=True):
            scores = torch.mm(part, k, out=room[: len(part)])
            torch.mm(torch.softmax(scores, dim=1, out=scores), v, out=into)
    return seen


class First(nn.Module):
    """Level 0: ``z [B, d] -> [B, C, s, s]``, a linear map."""

    def __init__(self, weight: Tensor, bias: Tensor, channels: int) -> None:
        super().__init__()
        size = int((len(bias) // channels) ** 0.5)
        self.shape = (size, size, channels)
        # Rows in the order of the channels-last output.
        self.weight = nn.Parameter(
            weight.view(channels, size * size, -1).transpose(0, 1).reshape(weight.shape)
        )
        self.bias = nn.Parameter(bias.view(channels, -1).T.reshape(-1))

    def forward(self, z: Tensor, state: None) -> Tensor:
        return to_first(F.linear(z, self.weight, self.bias).view(-1, *self.shape))


class Block(nn.Module):
    """Every other level: ``z [B, d], state [B, C, H, W] -> [B, C', 2H, 2W]``, a residual block, and the attention after it.

    Twice norm, ReLU and 3x3 convolution, beside a 1x1 convolution, which commutes with the upsampling and comes before it.

    Args:
        style: weight and bias of the linear map from a latent (after the class's embedding, if it has one) to scale and shift
            of the first norm (C each) and of the second (C' each), with all else that a norm does folded in.
        conv1: upsamples.
        conv2: without bias.
        shortcut: weight ``[C', C]`` and bias of the 1x1 convolution; the bias is also conv2's.
        attention: or None.
        head: what follows the block, if it is the last one.
    """

    def __init__(
        self,
        style: tuple[Tensor, Tensor],
        conv1: Conv,
        conv2: Conv,
        shortcut: tuple[Tensor, Tensor],
        attention: Attention | None,
        head: Head | None,
    ) -> None:
        super().__init__()
        self.style = _linear(*style)
        self.conv1, self.conv2 = conv1, conv2
        self.shortcut = _linear(*shortcut)
        self.after = nn.ModuleList(module for module in (attention, head) if module is not None)
        out_channels, channels = shortcut[0].shape
        self.splits = [channels, channels, out_channels, out_channels]

    def forward(self, z: Tensor, state: Tensor) -> Tensor:
        style = self.style(z)
        if not fast(state):
            return self._forward(style, state)
        # Some images at a time: their activations stay in the cache, and a batch takes no more memory than they do.
        count = max(_CACHED // (4 * state.shape[2] * state.shape[3] * max(self.splits)), 1)
        made = [self._forward(*part) for part in zip(style.split(count), state.split(count), strict=True)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _forward(self, style: Tensor, x: Tensor) -> Tensor:
        scale1, shift1, scale2, shift2 = style[:, :, None, None].split(self.splits, dim=1)
        h: Tensor = self.conv1(torch.addcmul(shift1, x, scale1).relu_())
        h = self.conv2(torch.addcmul(shift2, h, scale2).relu_())
        low = self.shortcut(to_last(x))
        rows, columns = low.shape[1:3]
        h = h.contiguous(memory_format=torch.channels_last)  # as it is, unless the library chose otherwise
        to_last(h).view(len(x), rows, 2, columns, 2, -1).add_(low[:, :, None, :, None])
        for module in self.after:
            h = module(h)
        return h


class Head(nn.Module):
    """After the last block: norm, ReLU, 3x3 convolution and tanh, ``[B, C, H, W] -> [B, 3, H, W]`` in [0, 1]."""

    def __init__(self, scale: Tensor, shift: Tensor, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale[:, None, None]), nn.Parameter(shift[:, None, None])
        # (tanh(x) + 1) / 2 = sigmoid(2 x)
        self.kernel = nn.Parameter((2 * kernel).contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(2 * bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(self.shift, x, self.scale).relu_()
        if fast(x):  # the library is slow with so few outputs: a product for each tap, then shifted sums
            taps = self.kernel.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            products = taps @ to_last(x).flatten(1, 2).transpose(1, 2)  # [B, 27, H W]
            made = F.fold(products, x.shape[2:], 3, padding=1) + self.bias[:, None, None]
        else:
            made = F.conv2d(x, self.kernel, self.bias, padding=1)
        return made.float().sigmoid()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], len(weight), device="meta")
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made


# -- the generator -------------------------------------------------------------------------------------------------


class BigGAN(MLVGM):
    """BigGAN's or BigBiGAN's generator; made by :meth:`from_checkpoint`.

    Levels: ``4x4`` (the linear layer), then one for each block, by the resolution it ends with.
    """

    def __init__(self, blocks: list[nn.Module], chunk: int, classes: Tensor | None) -> None:
        first = blocks[0]
        assert isinstance(first, First)
        sizes = [first.shape[0] << index for index in range(len(blocks))]
        levels = [Level(f"{size}x{size}", (chunk,)) for size in sizes]
        super().__init__(
            blocks, levels, (3, sizes[-1], sizes[-1]), num_classes=0 if classes is None else len(classes)
        )
        self.classes = None if classes is None else nn.Parameter(classes)  # [N, embedding]

    def condition(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """The chunks of z; all but the first after the embedding of the class, where there are classes."""
        if self.classes is None or labels is None:
            return list(latents)
        embedding = self.classes[labels]
        return [latents[0], *(torch.cat([embedding, z], dim=1) for z in latents[1:])]
