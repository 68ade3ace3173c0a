"""Any callable as a generator: :func:`wrap_generator`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mlviews.generators.base import MLVGM, Latents, Level, as_levels


class _Collect(nn.Module):
    """A block that only hands its latent on: a wrapped callable needs all of them at once, and the labels
    with the last.
    """

    def forward(
        self, z: Tensor | tuple[Tensor, Tensor], state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        return (*(state or ()), *(z if isinstance(z, tuple) else (z,)))


class WrappedGenerator(MLVGM):
    """See :func:`wrap_generator`."""

    def __init__(
        self,
        fn: Callable[..., Tensor],
        levels: Sequence[Any],
        image_shape: tuple[int, int, int],
        **options: Any,
    ) -> None:
        super().__init__([_Collect() for _ in levels], levels, image_shape, **options)
        self.fn = fn

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        return latents if labels is None else [*latents[:-1], (latents[-1], labels)]

    def to_image(self, state: tuple[Tensor, ...]) -> Tensor:
        count = len(self.levels)
        return self.fn(list(state[:count]), *state[count:])


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

    Its blocks are not known, so views share no work; everything else works as for a subclass of
    :class:`MLVGM`.

    Args:
        fn: the callable. It takes the list of latents (one float tensor ``[B, *shape]`` per level), and int64
            labels ``[B]`` if it has classes; it returns float images ``[B, C, H, W]`` in [0, 1]. If it is a
            module, it is frozen, put in eval mode and moved with the generator.
        levels: ``Level(name, shape)`` or ``(name, shape)``, coarse to fine.
        image_shape: ``(C, H, W)`` of one image.
        tied: whether levels share one draw, see :class:`MLVGM`.
        truncation: the truncation of anchors, see :class:`MLVGM`.
        num_classes: the number of classes, see :class:`MLVGM`.

    Raises:
        ValueError: if ``fn`` is not callable, or the levels or the image shape are invalid.

    Examples:
        >>> g = wrap_generator(lambda z: z[0].sigmoid().view(-1, 1, 4, 4), levels=[("z", (16,))],
        image_shape=(1, 4, 4))
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
