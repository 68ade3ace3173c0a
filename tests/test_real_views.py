"""Views of real images alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlviews.evaluation.real_views import RealViews

IMAGES = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, -1, 28, 28) * 20


def content(images: Tensor, rows: Tensor, *, seed: int, epoch: int, view: int) -> Tensor:
    """What a transform is told, in place of T_x."""
    facts = torch.tensor([seed, epoch, view]).expand(len(rows), -1)
    return torch.cat([images.mean((2, 3)), rows[:, None], facts], 1)


def real_views(images: Tensor, seed: int = 3) -> RealViews:
    return RealViews(images.__getitem__, len(images), content, 4, seed)  # type: ignore[arg-type]


def epochs(images: Tensor, seed: int = 3) -> list[list[tuple[Tensor, ...]]]:
    views = real_views(images, seed)
    return [list(views) for _ in range(2)]


def test_real_views_are_those_of_their_images() -> None:
    for epoch, batches in enumerate(epochs(IMAGES)):
        first, second = (torch.cat(views) for views in zip(*batches, strict=True))
        rows = first[:, 1]
        assert len(rows) == 8, "an incomplete batch is left out"
        assert len(rows.unique()) == 8, "no image twice"
        torch.testing.assert_close(first[:, 0], rows * 20 / 255)
        assert torch.equal(first[:, :4], second[:, :4]), "two views of the same image"
        assert first[:, 2:].unique(dim=0).tolist() == [[3, epoch, 0]]
        assert second[:, 2:].unique(dim=0).tolist() == [[3, epoch, 1]]


def test_every_epoch_has_an_order_of_its_own_that_the_seed_decides() -> None:
    def orders(seed: int) -> list[list[float]]:
        return [torch.cat([first[:, 1] for first, _ in batches]).tolist() for batches in epochs(IMAGES, seed)]

    first, second = orders(3)
    assert first != second
    assert orders(3) == [first, second]
    assert orders(4)[0] != first


def test_a_pass_that_is_left_early_is_an_epoch_too() -> None:
    views = real_views(IMAGES)
    next(iter(views))
    (anchor, _), _ = views
    assert anchor[0, 3] == 1


def test_fewer_images_than_a_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match="Invalid batch_size=4: there are 3 images; give more"):
        real_views(IMAGES[:3])


def test_images_are_integers_or_floats() -> None:
    for batches, others in zip(epochs(IMAGES), epochs(IMAGES.float() / 255), strict=True):
        for views, same in zip(batches, others, strict=True):
            assert all(torch.equal(view, other) for view, other in zip(views, same, strict=True))
