"""Rounds of ``loaders.py``: training steps in the steady state of a loader, their time, memory and energy."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from feeds import FEEDS, Case, Views
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from timing import now
from torch import nn


class Learner:
    """A ResNet-18 and its SimCLR step."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        backbone = torchvision.models.resnet18()
        backbone.fc = nn.Identity()
        self.model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(
            device, memory_format=torch.channels_last
        )
        self.loss = NTXentLoss(0.2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, views: Views) -> None:
        """Take a step, in one memory format: FFCV's batches have another than torch's and ours."""
        images = torch.cat(views).contiguous(memory_format=torch.channels_last)
        loss = self.loss(*self.model(images).chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class Round(NamedTuple):
    """Steps of one kind, in a row."""

    waiting: list[float]  # seconds of waiting for each batch
    training: list[float]  # seconds of training on it
    cpu: float  # seconds of all processors in a step, workers included
    power: dict[str, float] | None  # of Meter


def queue(case: Case) -> int:
    """Return how many batches a loader's workers are ahead at most."""
    return 0 if case.loader == "mlviews" else 2 * case.workers


def timed_steps(case: Case, steps: int) -> int:
    """Return how many steps to time: at least one batch of each worker; two, so that reuse has an order."""
    return max(steps, queue(case) // 2, 2)


def time_round(case: Case, learner: Learner, steps: int, meter: Meter) -> list[Round]:
    """Time steps in the steady state: of a generator those that make samples, and those that show them again.

    A loader with workers fills its queue, or falls behind, in the first steps, which are left out; it goes on
    making batches to the end of the last timed step.
    """
    steps = timed_steps(case, steps)
    untimed = queue(case) + 1
    kinds = 2 if case.loader == "mlviews" else 1
    views = FEEDS[case.loader](case, untimed + kinds * steps + queue(case))
    for batch in itertools.islice(views, untimed):
        learner.step(batch)
    rounds = []
    for _ in range(kinds):
        part, power = meter.measure(lambda: time_steps(case, views, learner, steps))
        rounds.append(Round(*part, power))
    for _ in views:  # to its end, so that no worker is left behind
        pass
    return rounds


def time_steps(
    case: Case, views: Iterator[Views], learner: Learner, steps: int
) -> tuple[list[float], list[float], float]:
    """Return seconds of waiting and of training, step by step, and the mean of all processors' seconds."""
    waiting, training = [], []
    cpu = cpu_seconds()
    for _ in range(steps):
        begin = now(case.device)
        batch = next(views)
        arrival = now(case.device)
        learner.step(batch)
        waiting.append(arrival - begin)
        training.append(now(case.device) - arrival)
    return waiting, training, (cpu_seconds() - cpu) / steps


def cpu_seconds() -> float:
    """Return the processors' seconds that this process and its workers have had."""
    import psutil

    seconds = time.process_time()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def time_alone(case: Case, steps: int) -> float:
    """Return seconds of a batch with nothing beside the loader: it keeps up if training takes longer."""
    untimed, count = queue(case) + 1, queue(case) + steps
    views = FEEDS[case.loader](case, untimed + count)
    for _ in range(untimed):
        next(views)
    begin = now(case.device)
    for _ in range(count):
        next(views)
    return (now(case.device) - begin) / count


def peak_memory(case: Case) -> dict[str, float]:
    """Return the most MiB that this process and its workers take over a few steps, and those of a GPU.

    A page that processes share is counted once.
    """
    import psutil

    torch.set_num_threads(case.threads)
    finished, peaks = threading.Event(), [0.0]

    def watch() -> None:
        while not finished.wait(0.05):
            main = psutil.Process()
            total = 0
            for process in (main, *main.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_full_info().pss
            peaks.append(total / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        time_round(case, Learner(case.device), 1, Meter(case.device, ""))
    finally:
        finished.set()
        thread.join()
    memory = {"host_mib": round(max(peaks), 1)}
    if torch.device(case.device).type == "cuda":
        memory["device_mib"] = round(torch.cuda.max_memory_allocated(case.device) / 2**20, 1)
    return memory


class Meter:
    """Energy and CO2 by codecarbon, where there is something to read them from.

    Args:
        device: what is measured.
        country: ISO code of the country whose electricity it is.
    """

    def __init__(self, device: str, country: str) -> None:
        self.country, self.why_not, self.note = country, "", ""
        cuda = torch.device(device).type == "cuda"
        counters = Path("/sys/class/powercap").glob("intel-rapl*/energy_uj")
        readable = any(os.access(path, os.R_OK) for path in counters)
        missing = "this machine shows no RAPL counters, without which codecarbon assumes a constant power"
        if not importlib.util.find_spec("codecarbon"):
            self.why_not = "codecarbon is not installed (extra bench)"
        elif not readable and not cuda:
            self.why_not = missing
        if cuda and not readable:
            self.note = f"the GPU's is read; of the CPU, {missing}"

    def measure(self, call: Callable[[], Any]) -> tuple[Any, dict[str, float] | None]:
        """Return what the call returns, and its mean power: kWh and grams of CO2 equivalent a second."""
        if self.why_not:
            return call(), None
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(
            country_iso_code=self.country, measure_power_secs=1, save_to_file=False, log_level="error"
        )
        begin = time.perf_counter()
        tracker.start()
        try:
            result = call()
        finally:
            tracker.stop()
        emissions, seconds = tracker.final_emissions_data, time.perf_counter() - begin
        return result, {
            "kwh": emissions.energy_consumed / seconds,
            "co2_g": 1000 * emissions.emissions / seconds,
        }
