"""Any callable as a generator: :func:`wrap_generator`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mlviews.generators.base import MLVGM, Latents, Level, as_levels, place_of


class _Collect(nn.Module):
    """A block that only collects its latent: a wrapped callable needs the latents of all levels at once.

    The last block's input is a latent and the labels, for a generator with classes.
    """

    def forward(
        self, z: Tensor | tuple[Tensor, Tensor], state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        tensors = z if isinstance(z, tuple) else (z,)
        return tensors if state is None else (*state, *tensors)


class WrappedGenerator(MLVGM):
    """A callable as a generator; see :func:`wrap_generator`."""

    def __init__(
        self,
        fn: Callable[..., Tensor],
        levels: Sequence[Any],
        image_shape: tuple[int, int, int],
        **options: Any,
    ) -> None:
        super().__init__([_Collect() for _ in levels], levels, image_shape, **options)
        self.fn = fn
        if isinstance(fn, nn.Module):
            self._place = place_of(fn)

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        if labels is None:
            return latents
        return [*latents[:-1], (latents[-1], labels)]

    def to_image(self, state: tuple[Tensor, ...]) -> Tensor:
        # Copies, as the callable may work in place: the latents of all levels, and one tensor of labels or
        # none.
        tensors = [tensor.clone() for tensor in state]
        count = len(self.levels)
        return self.fn(tensors[:count], *tensors[count:])


def wrap_generator(
    fn: Callable[..., Tensor],
    *,
    levels: Iterable[Level | tuple[str, tuple[int, ...]]],
    image_shape: tuple[int, int, int],
    tied: bool = False,
    truncation: float | None = 2.0,
    num_classes: int = 0,
) -> MLVGM:
    """Make any callable a generator.

    Views share no work, as its blocks are not known; everything else works as for a subclass of
    :class:`MLVGM`.

    Args:
        fn: takes the list of latents (one float tensor ``[B, *shape]`` per level), and int64 labels ``[B]``
            if it has classes; returns float images ``[B, C, H, W]`` in [0, 1]. If it is a module, it is
            frozen, put in eval mode and moved with the generator; latents come to where its weights are, in
            their precision.
        levels: ``Level(name, shape)`` or ``(name, shape)``, coarse to fine.
        image_shape: ``(C, H, W)`` of one image.
        tied: whether levels share one draw, see :class:`MLVGM`.
        truncation: the truncation of anchors, see :class:`MLVGM`.
        num_classes: the number of classes, see :class:`MLVGM`.

    Raises:
        ValueError: if ``fn`` is not callable, or the levels or the image shape are invalid.

    Examples:
        >>> def decode(z):
        ...     return z[0].sigmoid().view(-1, 1, 4, 4)
        >>> g = wrap_generator(decode, levels=[("z", (16,))], image_shape=(1, 4, 4))
        >>> g(g.sample_latents(range(2))).shape
        torch.Size([2, 1, 4, 4])
    """
    if not callable(fn):
        raise ValueError(
            f"Invalid fn={fn!r}: it must be callable with a list of latents "
            "and return images [B, C, H, W] in [0, 1]."
        )
    return WrappedGenerator(
        fn, as_levels(levels), image_shape, tied=tied, truncation=truncation, num_classes=num_classes
    )
