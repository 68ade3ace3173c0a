"""The latents of the user's own images: made at every step, or once, and kept in a folder.

A network encodes an image faster than a file of its latents is worth. A few steps of optimization an image
cost a hundred times as much, and their result never changes: it is worth keeping.

A folder of latents belongs to one set of images, one generator, one encoder and one number of steps, which
``codes.json`` holds; another one's is refused. Its files appear whole or not at all, each made by the process
that holds its lock, so a run may be killed at any moment, goes on where it was, and shares the work with all
others that use the folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mlviews.checks import integer, path_of
from mlviews.generators.base import MLVGM
from mlviews.generators.inverter import Inverter
from mlviews.identity import generator_identity
from mlviews.images import ImageSet, fits_device, sent
from mlviews.runs.checkpoint import differences
from mlviews.runs.files import fingerprint, whole
from mlviews.runs.processes import rank_of_run
from mlviews.runs.progress import bar
from mlviews.weights.files import printable, write_safetensors

VERSION = 1
"""Of the latents; it rises when the same images get others, as by another way to decode files."""

SHARD = 512
"""Images whose latents are in one file: so much is lost when a run is killed."""

_FORMAT = "mlviews.codes"
_SETTINGS = "codes.json"
_POLL = 0.1  # seconds between looks at files that other processes make


class Encoding:
    """How images become latents: by the generator's encoder, and a few steps of optimization after it.

    Args:
        generator: it has an encoder, or an inverter.
        refine: steps of optimization an image, of the generator's :class:`~mlviews.generators.inverter.
            Inverter`; 0: none.
        micro_batch_size: the most images that are encoded at once.

    Raises:
        ValueError: for steps below 0, or of a generator without such an inverter.
    """

    def __init__(self, generator: MLVGM, refine: int, micro_batch_size: int) -> None:
        self.generator, self.micro_batch_size = generator, micro_batch_size
        self.refine = integer("refine", refine, 0)
        if self.refine and not isinstance(generator.inverter, Inverter):
            raise ValueError(
                f"Invalid refine={refine}: generator {generator.name!r} has no inverter, whose latents could "
                "be refined; train one with mlviews.train_inverter, or leave refine out."
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return the latents of images, float32 ``[B, *level.shape]`` per level.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], on the generator's device.
            labels: int64 ``[B]`` for a class-conditional generator, else None.
        """
        parts = []
        for start in range(0, len(images), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            part_labels = None if labels is None else labels[rows]
            latents = self.generator.encode_labelled(images[rows], part_labels)
            if self.refine:
                assert isinstance(self.generator.inverter, Inverter)
                latents = self.generator.inverter.refine(
                    self.generator,
                    images[rows],
                    latents,
                    steps=self.refine,
                    labels=part_labels,
                )
            parts.append(latents)
        return [torch.cat(levels) for levels in zip(*parts, strict=True)]

    def settings(self) -> dict[str, Any]:
        """Return what the latents of an image depend on besides the image, as JSON can hold it."""
        inverter = self.generator.inverter
        return {
            "generator": generator_identity(self.generator),
            "inverter": None if inverter is None else fingerprint(inverter),
            "refine": self.refine,
        }


class Codes:
    """The latents of a set of images in a folder, where they are made when they are first asked for.

    Args:
        folder: the folder; it is made if it is missing.
        images: the images.
        encoding: how they become latents.

    Raises:
        ValueError: when latents are first asked for, if the folder holds something else, or latents of other
            images or of another encoder.
    """

    def __init__(self, folder: str | Path, images: ImageSet, encoding: Encoding) -> None:
        self.folder = path_of(folder, "folder of codes").expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"Invalid codes={str(folder)!r}: it is a file; give a folder.")
        self.images, self.encoding = images, encoding
        generator = encoding.generator
        self.levels = generator.levels[:1] if generator.tied else generator.levels
        self._resident: list[Tensor] = []  # per level, [N, *level.shape] on the device
        self._shards: list[list[Tensor]] = []  # mapped files of a large set, per shard and level

    @property
    def is_small(self) -> bool:
        """Whether all latents are kept on the device."""
        return fits_device(4 * len(self.images) * sum(level.size for level in self.levels))

    def __call__(self, rows: Tensor, numbers: Sequence[int] | None) -> list[Tensor]:
        """Return the latents of images, float32 ``[B, *level.shape]`` per level.

        Args:
            rows: the numbers of the images, int64 ``[B]`` on the device.
            numbers: the same, for a set that is not small.
        """
        if not self._resident and not self._shards:
            with torch.inference_mode(False):  # they are kept, and may be needed outside
                self._load(rows.device)
        if self.is_small:
            if self._resident[0].device != rows.device:
                self._resident = [level.to(rows.device) for level in self._resident]
            latents = [level[rows] for level in self._resident]
        else:
            assert numbers is not None
            places = [divmod(number, SHARD) for number in numbers]
            latents = [
                sent(torch.stack([self._shards[shard][level][row] for shard, row in places]), rows.device)
                for level in range(len(self.levels))
            ]
        generator = self.encoding.generator
        return latents * len(generator.levels) if generator.tied else latents

    def _load(self, device: torch.device) -> None:
        """Make the latents that the folder lacks, and read all of them."""
        token = self._open()
        self._complete(token, device)
        shards = [self._read(start, token) for start in self._starts]
        if self.is_small:
            self._resident = [torch.cat(levels).to(device) for levels in zip(*shards, strict=True)]
        else:
            self._shards = shards

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the latents, which a copy reads anew."""
        return {**self.__dict__, "_resident": [], "_shards": []}

    # -- the folder ------------------------------------------------------------------------------------------

    @property
    def _starts(self) -> range:
        """The number of the first image of each file."""
        return range(0, len(self.images), SHARD)

    def _count(self, start: int) -> int:
        """Return the number of images whose latents are in a file."""
        return min(SHARD, len(self.images) - start)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:010d}.safetensors"

    def _open(self) -> str:
        """Return the digest of the folder's settings, which its files hold too.

        Raises:
            ValueError: if they are not this set's and this encoder's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _SETTINGS
        with FileLock(self.folder / ".lock"):
            glance = self.images.glance()
            stored = _stored(path)
            # Files that look as they did are not read again.
            same = stored is not None and glance is not None and stored["glance"] == glance
            settings = {
                "version": VERSION,
                "images": stored["settings"].get("images") if stored and same else self.images.content(),
                **self.encoding.settings(),
            }
            if self.encoding.generator.num_classes:
                settings["labels"] = hashlib.sha256(self.images.labels.numpy().tobytes()).hexdigest()[:16]
            if stored is None:
                if any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                    raise ValueError(
                        f"{self.folder} has files and no latents of images: give codes= another folder, or "
                        "empty it."
                    )
            else:
                changed = differences(stored["settings"], settings)
                if changed:
                    raise ValueError(
                        f"{self.folder} holds latents of {changed[0]}: give codes= another folder, or delete "
                        "this one."
                    )
                settings = stored["settings"]  # processors round differently, and files hold its digest
            if not same:
                with whole(path) as part:
                    part.write_text(json.dumps({"settings": settings, "glance": glance}, indent=1) + "\n")
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def _complete(self, token: str, device: torch.device) -> None:
        """Make the files that are missing, side by side with other processes."""
        missing = [start for start in self._starts if not self._path(start).exists()]
        if not missing:
            return
        total = len(self.images)
        begun = total - sum(map(self._count, missing))
        with bar("latents of the images", total, begun, show=rank_of_run() == 0) as advance:
            while missing:
                waits = True
                for start in tuple(missing):
                    if self._make(start, token, device):
                        waits = False
                    if self._path(start).exists():
                        missing.remove(start)
                        advance(total - sum(map(self._count, missing)), "")
                if waits and missing:
                    time.sleep(_POLL)  # other processes make them; the lock of a killed one is free

    def _make(self, start: int, token: str, device: torch.device) -> bool:
        """Make the latents of one file; return whether this process did it."""
        path = self._path(start)
        lock = FileLock(self.folder / f".{path.stem}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            if path.exists():
                return False
            numbers = range(start, start + self._count(start))
            images = self.images.batch(numbers, device).float() / 255
            labels = None
            if self.encoding.generator.num_classes:
                labels = self.images.labels.to(device)[start : numbers.stop]
            latents = self.encoding(images, labels)
            if len(latents) > len(self.encoding.generator.levels):
                raise ValueError(
                    f"Invalid codes={str(self.folder)!r}: a folder of codes has no place for W+ codes of "
                    "StyleGAN2; leave codes out."
                )
            tensors = {level.name: z.float().cpu() for level, z in zip(self.levels, latents, strict=False)}
            write_safetensors(path, tensors, {"format": _FORMAT, "settings": token})
        finally:
            lock.release()
        (self.folder / f".{path.stem}.lock").unlink(missing_ok=True)
        return True

    def _read(self, start: int, token: str) -> list[Tensor]:
        """Return the latents in one file, ``[n, *level.shape]`` per level, as the system maps them.

        Raises:
            ValueError: if it is damaged, or belongs to another folder.
        """
        path = self._path(start)
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                latents = [file.get_tensor(level.name) for level in self.levels]
        except Exception as error:  # a damaged file can raise anything
            problem = f"{type(error).__name__}: {printable(error, 160)}"
            raise ValueError(f"{path} is damaged ({problem}): delete it, and it is made anew.") from error
        shapes = [(self._count(start), *level.shape) for level in self.levels]
        fits = all(
            tuple(z.shape) == shape and z.dtype == torch.float32
            for z, shape in zip(latents, shapes, strict=True)
        )
        if metadata.get("format") != _FORMAT or metadata.get("settings") != token or not fits:
            raise ValueError(f"{path} holds other latents than {_SETTINGS} says: delete the folder.")
        return latents


def _stored(path: Path) -> dict[str, Any] | None:
    """Return what a folder's settings file holds; None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return {"settings": dict(content["settings"]), "glance": content["glance"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete its folder, and the latents are made anew.") from error
