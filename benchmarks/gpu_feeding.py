"""A training step fed by files and by generators on a GPU: the sections ``loaders`` and ``overlap`` of
``gpu.py``.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gpu_run import Clock, Row, Run, step_source, tried
from networks import NETWORKS
from PIL import Image
from real_images import all_to_train_on
from timing import now
from torch import Tensor

from mlviews.mi.critics import ImageCritic
from mlviews.mi.infonce import info_nce
from mlviews.transforms import IMAGENET, simclr

REUSE = (1, 4, 8, 16)
FED = {"fashion, 32 px": (32, 256), "bigbigan, 128 px": (128, 64)}
"""The generators that feed a training step: pixels of their images' side, and the batch."""
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of a crop's area, and of its sides

Views = tuple[Tensor, Tensor]


# -- figure 5 ------------------------------------------------------------------------------------------------


class Learner:
    """A SimCLR step of a ResNet-18's stages, of this project's blocks (the base install has no torchvision).

    Args:
        side: pixels of the images that views are cropped from.
        run: where, and how large.
    """

    def __init__(self, side: int, run: Run) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = ImageCritic((3, side * 7 // 8, side * 7 // 8), width=8 if run.tiny else 64).to(
                run.device
            )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, views: Views) -> None:
        """Take a step."""
        loss = info_nce(*self.model(torch.cat(views)).chunk(2), temperature=0.2)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Files(torch.utils.data.Dataset[Views]):
    """Two crops of each JPEG file, flipped and normalized, as torchvision's pipeline makes them with PIL.

    Args:
        folder: of the files.
        side: pixels of a view.
        count: samples of an epoch, which may be more than there are files.
    """

    def __init__(self, folder: Path, side: int, count: int) -> None:
        self.paths, self.side, self.count = sorted(folder.glob("*.jpg")), side, count
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in IMAGENET)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Views:
        image = Image.open(self.paths[index % len(self.paths)]).convert("RGB")
        return self._view(image), self._view(image)

    def _view(self, image: Image.Image) -> Tensor:
        width, height = image.size
        area = width * height * random.uniform(*SCALE)
        ratio = random.uniform(*RATIO)
        w, h = (min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5)))
        left, top = random.randint(0, width - w), random.randint(0, height - h)
        view = image.resize((self.side, self.side), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255  # [3, H, W]
        return (pixels - self.mean) / self.std


def write_files(run: Run, side: int, count: int) -> Path:
    """Write real images as JPEG files of this side, unless they are there; return their folder."""
    folder = run.work / f"{side}px"
    folder.mkdir(parents=True, exist_ok=True)
    images, _ = all_to_train_on(run.data)
    for index, image in enumerate(images[:count]):
        path = folder / f"{index:05d}.jpg"
        if not path.exists():
            Image.fromarray(image[0].numpy()).resize((side, side)).convert("RGB").save(path, quality=95)
    return folder


class Feed(NamedTuple):
    """Batches in the steady state: more than are timed, so that workers go on to the end."""

    batches: Iterator[Views]
    untimed: int  # batches before those that are timed


def file_feed(run: Run, side: int, batch: int, steps: int) -> Feed:
    """Return batches of torch's DataLoader, with a worker for each processor, sixteen at most."""
    files = write_files(run, side, run.clip(1024, 16))
    workers = run.clip(min(16, os.cpu_count() or 1), 0)
    queue = 2 * workers  # batches that the workers are ahead at most
    is_cuda = run.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        Files(files, side * 7 // 8, batch * (queue + 1 + steps + queue)),
        batch,
        shuffle=True,
        num_workers=workers,
        pin_memory=is_cuda,
    )
    batches = (tuple(view.to(run.device, non_blocking=is_cuda) for view in views) for views in loader)
    return Feed(batches, queue + 1)


def generated_feed(run: Run, network: str, steps: int, reuse: int = 1) -> Feed:
    """Return batches of a generator: two of an epoch that is left early, then a whole epoch of steps."""
    side, size = FED[network]
    batch = run.clip(size)
    source = step_source(
        NETWORKS[network].make(run.device, run.tiny),
        batch,
        run.device,
        transform=simclr(side * 7 // 8, color=False),
        num_samples=batch * steps,
        reuse=reuse,
    )
    return Feed(itertools.chain(itertools.islice(source, 2), source), 2)


def reuses(run: Run) -> Sequence[int]:
    """Return in how many steps a sample is shown, from case to case."""
    return REUSE[:2] if run.tiny else REUSE


def feeds_of(run: Run, network: str, steps: int) -> dict[str, Callable[[], Feed]]:
    """Return what feeds so many training steps, by name."""
    side, size = FED[network]
    feeds: dict[str, Callable[[], Feed]] = {"torch": partial(file_feed, run, side, run.clip(size), steps)}
    for times in reuses(run):
        feeds[f"mlviews, reuse={times}"] = partial(generated_feed, run, network, steps, times)
    return feeds


def loaders(run: Run, clock: Clock) -> list[Row]:
    """Time steps fed by files and by generators; reuse over a whole epoch, first showings included."""
    rows: list[Row] = []
    for network in list(FED)[: 1 if run.tiny else None]:
        side, size = FED[network]
        learner = Learner(side, run)
        steps = 2 * reuses(run)[-1]  # two batches of samples at least, so that none is shown twice in a row
        feeds = feeds_of(run, network, steps)
        for case in clock.within([f"{network}; {name}" for name in feeds]):
            name = case.split("; ")[1]
            facts = {"case": network, "loader": name, "batch_size": run.clip(size), "steps": steps}
            call = partial(time_feed, feeds[name], learner, steps, run)
            rows.append(tried(call, facts))
    return rows


def time_feed(feed: Callable[[], Feed], learner: Learner, steps: int, run: Run) -> Row:
    """Return mean milliseconds of waiting for a batch and of training on it, in the steady state."""
    batches, untimed = feed()
    for views in itertools.islice(batches, untimed):
        learner.step(views)
    waiting = training = 0.0
    begin = now(run.device)
    for views in itertools.islice(batches, steps):
        arrival = now(run.device)
        learner.step(views)
        end = now(run.device)
        waiting, training, begin = waiting + arrival - begin, training + end - arrival, end
    for _ in batches:  # to its end, so that no worker is left behind
        pass
    return {
        "waiting_ms": round(1e3 * waiting / steps, 2),
        "training_ms": round(1e3 * training / steps, 2),
        "samples_per_s": round(len(views[0]) * steps / (waiting + training), 1),
    }


# -- data time behind training -------------------------------------------------------------------------------


def ahead(batches: Iterator[Views], device: torch.device) -> Iterator[Views]:
    """Yield batches that are made in a stream of their own, each while the one before it is trained on."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)

    def make() -> tuple[Views | None, torch.cuda.Event]:
        with torch.cuda.stream(side):
            views = next(batches, None)
            return views, side.record_event()

    views, ready = make()
    while views is not None:
        current.wait_event(ready)
        for view in views:
            view.record_stream(current)
        following, following_ready = make()
        yield views
        views, ready = following, following_ready


def overlap(run: Run, clock: Clock) -> list[Row]:
    """Time generating alone, training alone, both in turn in one stream, and in two streams."""
    rows: list[Row] = []
    for network in clock.within(list(FED)[: 1 if run.tiny else None]):
        side, size = FED[network]
        steps = run.clip(20, 2)
        feed = partial(generated_feed, run, network, steps)
        learner = Learner(side, run)
        views = next(feed().batches)
        row: Row = {"network": network, "batch_size": run.clip(size), "steps": steps}
        row["generating_ms"] = mean_ms(feed(), lambda _: None, run)
        row["training_ms"] = mean_ms(Feed(iter([views] * (steps + 2)), 2), learner.step, run)
        row["one_stream_ms"] = mean_ms(feed(), learner.step, run)
        if run.device.type == "cuda":
            batches, untimed = feed()
            row["two_streams_ms"] = mean_ms(Feed(ahead(batches, run.device), untimed), learner.step, run)
        rows.append(row)
    return rows


def mean_ms(feed: Feed, use: Callable[[Views], None], run: Run) -> float:
    """Return mean milliseconds of a step; the device is waited for at the end only."""
    batches, untimed = feed
    for views in itertools.islice(batches, untimed):
        use(views)
    begin = now(run.device)
    count = 0
    for views in batches:
        use(views)
        count += 1
    return round(1e3 * (now(run.device) - begin) / count, 2)
