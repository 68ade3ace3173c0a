"""Reuse: a generated sample serves several steps, far apart, and is newly augmented in each.

An epoch of N places with ``reuse=k`` has N / k samples, and shows each k times. It is cut into windows of as
many samples as the memory holds. A window shows all of its samples once, then all of them again, k times
over. The first showing generates them. Which sample is in which place, and in which augmentation, is a
function of (seed, epoch, place) alone. What is kept on the device is a cache: a run that resumes in the
middle of a window generates what it lacks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlviews import sampling
from mlviews.anchors import Places, Prior, placed
from mlviews.step import Batch, Content, Origin, Step

MOST = 1 << 12
"""The most showings of a sample: the counter word has no room for more."""

_SEGMENTS = 4  # of a window: samples change places within one, so showings are 2/3 of a window apart, or more
_COLUMNS = 16  # at least so many samples of a window share a lane
_LANES = 1 << 13  # at most


class Showing(NamedTuple):
    """Places that show samples of one window for the n-th time."""

    window: int
    number: int  # 0 for the first time
    start: int  # the first place, counted from the start of this showing of the window
    stop: int


class Schedule:
    """Which sample is shown in which place of an epoch.

    Samples change their places between showings within *lanes*: place p of a showing belongs to lane
    p mod L, L a power of two. So where the samples of a step over all ranks are a power of two up to L, a
    sample comes to the same rank each time, and no rank generates what another one has.

    Args:
        num_samples: places of an epoch.
        times: how often a sample is shown, at least 2.
        most: the most samples of a window.
    """

    def __init__(self, num_samples: int, times: int, most: int) -> None:
        self.num_samples, self.times = num_samples, times
        self.samples = -(-num_samples // times)  # of an epoch
        count = -(-self.samples // most)
        # Windows of equal size, up to 1.
        self.bounds = [number * self.samples // count for number in range(count + 1)]

    @property
    def windows(self) -> int:
        """The number of windows of an epoch."""
        return len(self.bounds) - 1

    def size(self, window: int) -> int:
        """Return the samples of a window."""
        return self.bounds[window + 1] - self.bounds[window]

    @property
    def distance(self) -> int:
        """Places between two showings of a sample, at least."""
        size = min(map(self.size, range(self.windows)))
        return size - -(-size // _SEGMENTS) - self.lanes(size)

    @property
    def largest(self) -> int:
        """Samples of the largest window."""
        return max(map(self.size, range(self.windows)))

    def showings(self, start: int, stop: int) -> Iterator[Showing]:
        """Cut places of an epoch where a window or a showing ends."""
        while start < stop:
            window = bisect_right(self.bounds, start // self.times) - 1
            size = self.size(window)
            number, offset = divmod(start - self.bounds[window] * self.times, size)
            count = min(stop - start, size - offset)
            yield Showing(window, number, offset, offset + count)
            start += count

    @staticmethod
    def lanes(size: int) -> int:
        """Return the number of lanes of a window: a power of two."""
        lanes = 1
        while lanes < _LANES and 2 * lanes * _COLUMNS <= size:
            lanes *= 2
        return lanes

    def order(self, window: int, number: int, epoch: int, seed: int, device: torch.device) -> Tensor:
        """Return which sample of a window is in which place of its n-th showing, int64 ``[size]``."""
        size = self.size(window)
        places = torch.arange(size, device=device)
        lanes = self.lanes(size)
        columns = -(-size // lanes)
        segment = places // lanes * _SEGMENTS // columns
        group = segment * lanes + places % lanes
        stream = sampling.REUSE << 28 | number << 16
        keys = sampling.random_keys(size, seed, epoch, device, stream, window)
        by_key = keys.argsort()
        shuffled = by_key[group[by_key].argsort(stable=True)]  # the samples of each group in a random order
        in_place = group.argsort(stable=True)  # its places in theirs
        return torch.empty_like(places).scatter_(0, in_place, shuffled)


class Window:
    """The samples of one window of an epoch that are on the device, as uint8.

    Args:
        key: the epoch, the window's number, and the device.
        size: the samples of the window.
        shape: ``(V, C, H, W)`` of the views of one sample.
    """

    def __init__(
        self, key: tuple[int, int, torch.device], size: int, shape: tuple[int, int, int, int]
    ) -> None:
        self.key = key
        device = key[-1]
        self.present = np.zeros(size, bool)  # on the host, so that nothing has to ask the device
        self.images = torch.empty((size, *shape), dtype=torch.uint8, device=device)
        self.indices = torch.empty(size, dtype=torch.int64, device=device)
        self.targets = torch.empty(size, dtype=torch.int64, device=device)
        self.origins: list[Origin] = []

    def store(self, numbers: np.ndarray, content: Content) -> None:
        """Keep samples, given by their numbers in the window."""
        device = self.images.device
        rows = placed(_places(numbers), device)
        self.present[numbers] = True
        pixels = torch.stack(content.images, dim=1)  # [B, V, C, H, W]
        self.images[rows] = (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)
        self.indices[rows] = content.indices
        self.targets[rows] = content.targets
        if not self.origins:
            self.origins = [
                origin.new_empty(len(self.present)) if isinstance(origin, Tensor) else origin
                for origin in content.origins
            ]
        for origins, origin in zip(self.origins, content.origins, strict=True):
            if isinstance(origins, Tensor):
                origins[rows] = origin

    def content(self, rows: Tensor) -> Content:
        """Return samples by their numbers, int64 ``[B]`` on the device."""
        pixels = self.images[rows].float() / 255  # [B, V, C, H, W]
        origins = [origin[rows] if isinstance(origin, Tensor) else origin for origin in self.origins]
        return Content(list(pixels.unbind(1)), origins, self.indices[rows], self.targets[rows], [])


class Reuse:
    """A step that shows each of its samples several times; in the place of a :class:`~mlviews.step.Step`.

    Images are kept as uint8, and rounded to it in their first showing too. The samples are those that the
    step makes in its epoch ``epoch // times``: reuse changes when they are shown, and nothing else.

    Args:
        step: what generates and augments the samples.
        num_samples: places of an epoch.
        times: how often a sample is shown, from 2 to 4,096.
        memory: the bytes that the images kept on the device may take.

    Raises:
        ValueError: if the memory does not hold a single sample.
    """

    def __init__(self, step: Step, num_samples: int, times: int, memory: int) -> None:
        self.step = step
        self.shape = (step.num_views, *step.generator.image_shape)
        self.sample_bytes = math.prod(self.shape)
        if memory < self.sample_bytes:
            raise ValueError(
                f"Invalid reuse_memory={memory}: the views of one sample take {self.sample_bytes:,} bytes."
            )
        self.schedule = Schedule(num_samples, times, memory // self.sample_bytes)
        self._window: Window | None = None
        # Of one showing, as long as it lasts: on the device, and where samples are missing on the CPU too.
        self._orders: tuple[tuple[int, int, int], dict[torch.device, Tensor]] | None = None

    @property
    def anchors(self) -> Prior:
        """Where the samples come from."""
        return self.step.anchors

    @property
    def memory(self) -> int:
        """The bytes that the images kept on the device take."""
        return self.schedule.largest * self.sample_bytes

    def check(self, step_samples: int) -> None:
        """Raise a ValueError if one step over all ranks could show a sample twice."""
        if step_samples > self.schedule.distance:
            raise ValueError(
                f"Invalid reuse={self.schedule.times} for num_samples={self.schedule.num_samples}: a sample "
                f"would be shown again after {self.schedule.distance} samples, and a step has "
                f"{step_samples}. Raise num_samples or reuse_memory, or lower reuse or batch_size."
            )

    def prepare(self) -> torch.device:
        """Prepare the step; return its device."""
        return self.step.prepare()

    @torch.no_grad()
    def __call__(self, start: int, stop: int, epoch: int, stride: int = 0) -> Batch:
        """Return the samples in places ``start`` to ``stop`` (exclusive) of an epoch, without latents.

        ``stride`` is that of a step. Files are read ahead within a first showing, as later ones read nothing.
        """
        device = self.prepare()
        with torch.autocast(device.type, enabled=False):
            showings = list(self.schedule.showings(start, stop))
            if len(showings) > 1:  # the next step is in another showing, or its parts have other sizes
                stride = 0
            parts = [self.shown(showing, epoch, device, stride) for showing in showings]
            content = parts[0] if len(parts) == 1 else _joined(parts)
            places = torch.arange(start, stop, device=device)  # by place, T_x is new in every showing
            views = self.step.views(content.images, content.origins, places, epoch)
        return Batch(views, content.indices, content.targets, content.latents, None)

    def shown(self, showing: Showing, epoch: int, device: torch.device, stride: int = 0) -> Content:
        """Return the samples of a showing; those that are not on the device are generated first."""
        window = self.window(showing.window, epoch, device)
        if showing.number == 0:
            numbers = np.arange(showing.start, showing.stop)
            self.generate(numbers[~window.present[numbers]], window, epoch, stride)
            return window.content(placed(range(showing.start, showing.stop), device))
        if not window.present.all():
            order = self.order(showing, epoch, torch.device("cpu")).numpy()
            numbers = order[showing.start : showing.stop]
            self.generate(numbers[~window.present[numbers]], window, epoch)
        return window.content(self.order(showing, epoch, device)[showing.start : showing.stop])

    def window(self, number: int, epoch: int, device: torch.device) -> Window:
        """Return what is kept of a window; that of another one is given up."""
        key = (epoch, number, device)
        if self._window is None or self._window.key != key:
            self._window = None  # its memory goes before the next one's is taken
            with torch.inference_mode(False):  # it is kept, and may be needed outside
                self._window = Window(key, self.schedule.size(number), self.shape)
        return self._window

    def generate(self, numbers: np.ndarray, window: Window, epoch: int, stride: int = 0) -> None:
        """Make samples of a window, given by their numbers in it, and keep them."""
        if not len(numbers):
            return
        schedule = self.schedule
        step_epoch, part = divmod(epoch, schedule.times)
        first = part * schedule.samples + schedule.bounds[window.key[1]]
        places = _places((first + numbers) % schedule.num_samples)
        with torch.inference_mode(False):
            window.store(numbers, self.step.content(places, step_epoch, window.key[-1], stride))

    def order(self, showing: Showing, epoch: int, device: torch.device) -> Tensor:
        """Return which sample of the window is in which place of a showing, int64 ``[size]``."""
        key = (showing.window, showing.number, epoch)
        if self._orders is None or self._orders[0] != key:
            self._orders = key, {}
        orders = self._orders[1]
        if device not in orders:
            with torch.inference_mode(False):
                orders[device] = self.schedule.order(*key, self.step.seed, device)
        return orders[device]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy makes anew: the samples on the device, and their order."""
        return {**self.__dict__, "_window": None, "_orders": None}


def _places(numbers: np.ndarray) -> Places:
    """Return places as a range, if they are consecutive."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == len(numbers) and (np.diff(numbers) == 1).all():
        return range(first, last + 1)
    return torch.from_numpy(numbers)


def _joined(parts: Sequence[Content]) -> Content:
    """Return the samples of several showings as one."""
    images = [torch.cat(views) for views in zip(*(part.images for part in parts), strict=True)]
    origins: list[Origin] = []
    for view in zip(*(part.origins for part in parts), strict=True):
        masks = [origin for origin in view if isinstance(origin, Tensor)]
        origins.append(torch.cat(masks) if masks else view[0])
    indices = torch.cat([part.indices for part in parts])
    return Content(images, origins, indices, torch.cat([part.targets for part in parts]), [])
