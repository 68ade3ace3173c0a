"""mlviews in Lightning: a data module for both of its namespaces, ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mlviews.config import load_config
from mlviews.source import MLViewSource

__all__ = ["MLViewDataModule"]

_NAMESPACES = [f"{name}{rest}" for name, rest in (("lightning", ".pytorch"), ("pytorch_lightning", "")) if find_spec(name)]
if not _NAMESPACES:
    raise ModuleNotFoundError('The data module needs Lightning: pip install "mlviews[lightning]".', name="lightning")
# A Trainer takes the data modules of its own namespace only, and nothing says which one it will come from.
_Base: Any = type("_Base", tuple(import_module(name).LightningDataModule for name in _NAMESPACES), {})


class MLViewDataModule(_Base):  # type: ignore[misc]
    """Fresh views to train on, real data to validate on; for the Trainers of ``lightning.pytorch`` and ``pytorch_lightning``.

    Each of Lightning's epochs is one of the source's. A checkpoint carries the place in the epoch, also where Lightning drops
    the state of loaders (where ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``), and training goes on with the
    next sample that was not trained on, with another batch size or number of ranks too. With ``Trainer(overfit_batches=n)``
    all epochs have the samples of epoch 0.

    Args:
        source: an :class:`~mlviews.MLViewSource`, a preset's name, the path of a YAML file, or a mapping with the same keys. From all
            but the first, every rank makes its own source when training is set up. Without a device of its own, the source
            works on the Trainer's.
        val_dataloaders: what to validate on: a loader, a list of them, or a callable that returns either; None: nothing.
        test_dataloaders: what to test on, likewise.

    Raises:
        ValueError: for an unknown preset or key.

    Examples:
        >>> module = MLViewDataModule({"preset": "fashion-ml-random", "batch_size": 256})
        >>> trainer.fit(model, module)
    """

    def __init__(
        self,
        source: MLViewSource | str | Path | Mapping[Any, Any] | DictConfig,
        val_dataloaders: Any = None,
        test_dataloaders: Any = None,
    ) -> None:
        super().__init__()
        self._source = source if isinstance(source, MLViewSource) else None
        self._config = None if isinstance(source, MLViewSource) else load_config(source)
        self._loader: _Loader | None = None
        self._loaders = {"val_dataloader": val_dataloaders, "test_dataloader": test_dataloaders}
        for name, loaders in self._loaders.items():
            if loaders is None and getattr(type(self), name) is getattr(MLViewDataModule, name):
                setattr(self, name, None)  # how Lightning reads that there is none, in either namespace

    @property
    def source(self) -> MLViewSource:
        """The source that trains; made by :meth:`setup`, unless it was given.

        Raises:
            ValueError: if it is not made yet.
        """
        if self._source is None:
            raise ValueError("The data module has no source yet: Trainer.fit makes it, or call setup('fit').")
        return self._source

    def setup(self, stage: str) -> None:
        """Make the source, on the Trainer's device. Lightning calls it on every rank."""
        if self._source is None:
            self._source = MLViewSource.from_config(self._config)
        if self._source.requested_device is None and self.trainer is not None:
            self._source.generator.to(self.trainer.strategy.root_device)
        self._loader = _Loader(self._source, self.trainer)

    def train_dataloader(self) -> _Loader:
        """The source, its epoch and place kept in step with the Trainer's.

        Raises:
            ValueError: before :meth:`setup`.
        """
        if self._loader is None:
            raise ValueError("The data module is not set up: Trainer.fit does it, or call setup('fit').")
        return self._loader

    def val_dataloader(self) -> Any:
        """What to validate on."""
        return _called(self._loaders["val_dataloader"])

    def test_dataloader(self) -> Any:
        """What to test on."""
        return _called(self._loaders["test_dataloader"])

    def state_dict(self) -> dict[str, int]:
        """The place in training, for a checkpoint: ``seed``, ``epoch`` (the Trainer's), and ``position`` in samples over all ranks."""
        return self.train_dataloader().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Make training go on from a checkpoint's place.

        Raises:
            ValueError: if the state is incomplete, belongs to another seed, or lies beyond this epoch's end.
        """
        self.train_dataloader().load_state_dict(state_dict)


class _Loader:
    """The source as its Trainer sees it. Its state is the module's, so that it does not matter which of the two Lightning restores."""

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    def __init__(self, source: MLViewSource, trainer: Any) -> None:
        self.source = source
        self._trainer = trainer
        self._epoch = 0  # the Trainer's
        self._state: dict[str, int] | None = None  # loaded, and not yet gone on from
        self._trained = 0  # samples of this epoch that were trained on before the latest batch, over all ranks
        self._over = False  # the epoch that was loaded has no batch left

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if self._over:
            return
        for batch in self.source:
            yield batch
            self._trained = self._position

    @property
    def _position(self) -> int:
        return self.source.state_dict()["position"]

    @property
    def sampler(self) -> _Loader:
        """Where Lightning sets the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each of its epochs."""
        state, self._state = self._state, None
        self._epoch = epoch
        self._over = False
        pinned = 0 if self._trainer is not None and self._trainer.overfit_batches else epoch
        if state is None:
            self.source.set_epoch(pinned)
        else:
            position = state["position"] if state["epoch"] == epoch else 0
            self.source.load_state_dict({"seed": self.source.seed, "epoch": pinned, "position": position})
            left = self.source.batches_after(position)
            self._over = left == 0
            self._recount(len(self) - left)
        self._trained = self._position

    def state_dict(self) -> dict[str, int]:
        """The place after the last batch that was trained on."""
        if self._state is not None:
            return dict(self._state)
        count = None if self._batches is None else self._batches.current
        unfinished = count is not None and count.ready > count.processed  # a batch whose step was interrupted
        return self.source.state_dict() | {"epoch": self._epoch, "position": self._trained if unfinished else self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Keep the state until Lightning says which epoch it goes on with."""
        self.source.load_state_dict(state)  # it checks it
        self._state = {name: int(state[name]) for name in self.source.state_dict() if name in state}

    @property
    def _batches(self) -> Any:
        """Lightning's count of batches; ``current`` is that of this epoch."""
        return None if self._trainer is None else self._trainer.fit_loop.epoch_loop.batch_progress

    def _recount(self, done: int) -> None:
        """Replace the restored count, which is of the checkpoint's batch size or epoch: it decides when this epoch ends."""
        if self._batches is not None:
            self._batches.is_last_batch = False
            count = self._batches.current
            behind = count.processed - count.completed  # 1 in a checkpoint of on_train_batch_end, which Lightning adds in a moment
            count.ready = count.started = count.processed = done
            count.completed = done - behind


def _called(loaders: Any) -> Any:
    return loaders() if callable(loaders) else loaders
