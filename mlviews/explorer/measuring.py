"""Measuring what levels cost, beside the page: `mlviews impact` as a process of its own, then the classes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mlviews.explorer import classes
from mlviews.explorer.costs import Costs
from mlviews.source import MLViewSource

COMMAND = (sys.executable, "-m", "mlviews.cli", "impact")
"""What measures."""


class Job:
    """A measurement that is under way, in a thread: what it last said, and what came out of it.

    Args:
        configuration: the source's; generator and anchors are taken from it.
        source: the source itself.
        measured: what was measured before; a report in it is not measured again.
        folder: for the report; a run that was stopped there is gone on with.
        options: further words of the command `mlviews impact`.

    Raises:
        OSError: if the folder cannot be written to.
    """

    def __init__(
        self,
        configuration: Mapping[str, Any],
        source: MLViewSource,
        measured: Costs,
        folder: Path,
        options: tuple[str, ...] = (),
    ) -> None:
        self.source, self.folder, self.options = source, folder, options
        self.costs: Costs | None = None
        self.text = "starting"
        self._begin = time.monotonic()
        self._stopped = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if measured.report is None:
            self._process = self._started(configuration)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _started(self, configuration: Mapping[str, Any]) -> subprocess.Popen[str]:
        """Start `mlviews impact` on the generator and the anchors."""
        names = [name for name in ("generator", "weights", "anchor") if name in configuration]
        settings = self.folder / "measured.yaml"
        settings.write_text(yaml.safe_dump({name: configuration[name] for name in names}))
        arguments = ["--out", str(self.folder), "--device", str(self.source.device), *self.options]
        command = [*COMMAND, str(settings), *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    @property
    def is_running(self) -> bool:
        """Whether it is under way."""
        return self._thread.is_alive()

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        return f"{self.text} ({time.monotonic() - self._begin:.0f} s)"

    def stop(self) -> None:
        """Stop it; its checkpoint stays, and the next one goes on from there."""
        self._stopped.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._thread.join(10)

    def _run(self) -> None:
        try:
            if self._process is not None:
                self._follow(self._process)
            self.costs = self._with_classes(Costs.load(self.folder, self.source.generator))
            self.text = f"measured; the report is in {self.folder}"
        except (ValueError, OSError, RuntimeError) as error:
            self.text = str(error)
        if self._stopped.is_set():
            self.text = "stopped; measuring again goes on from here"

    def _follow(self, process: subprocess.Popen[str]) -> None:
        """Take note of what a process says until it ends.

        Raises:
            RuntimeError: if it fails, with what it said.
        """
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                self.text = line.strip()
        if process.wait():
            raise RuntimeError(self.text)

    def _with_classes(self, costs: Costs) -> Costs:
        """Measure the share of positives that keep their class, where there is a classifier."""
        impacts = () if costs.report is None else costs.report.impacts
        curves = [impact.curve for impact in impacts if impact.curve is not None]
        if not curves or costs.classes is not None or not classes.has_classifier(self.source.generator):
            return costs
        magnitudes = curves[0].magnitudes[::2]  # the shares are smooth, and no more is read off them
        shares = classes.measure(
            self.source.generator, self.source.anchor, magnitudes, costs.sweep, self._advance
        )
        with contextlib.suppress(OSError):  # the figures are good on a full disk too
            shares.save(self.folder)
        return Costs(costs.report, shares)

    def _advance(self, share: float) -> None:
        self.text = f"class kept: {share:.0%}"
        if self._stopped.is_set():
            raise InterruptedError
