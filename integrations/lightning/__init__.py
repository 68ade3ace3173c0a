"""mlviews in Lightning: a data module for both of Lightning's packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mlviews.config import load_config
from mlviews.source import _ROUND as ROUND
from mlviews.source import MLViewSource

__all__ = ["MLViewDataModule"]

_NAMESPACES = [
    namespace
    for package, namespace in (
        ("lightning", "lightning.pytorch"),
        ("pytorch_lightning", "pytorch_lightning"),
    )
    if find_spec(package)
]
if not _NAMESPACES:
    raise ModuleNotFoundError(
        'The data module needs Lightning: pip install "mlviews[lightning]".', name="lightning"
    )
# A Trainer takes only data modules of its own namespace, and nothing says which namespace it will come from.
_Base: Any = type("_Base", tuple(import_module(name).LightningDataModule for name in _NAMESPACES), {})


class MLViewDataModule(_Base):  # type: ignore[misc]
    """Fresh views to train on, and real data to validate on.

    It works with the Trainers of ``lightning.pytorch`` and of ``pytorch_lightning``. Each of Lightning's
    epochs is one of the source's. A checkpoint carries the place in the epoch, also where Lightning drops the
    state of loaders (where ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``). Training
    goes on with the next sample that was not trained on, with another batch size or number of ranks too. With
    ``Trainer(overfit_batches=n)`` all epochs have the samples of epoch 0.

    Args:
        source: an :class:`~mlviews.MLViewSource`, a preset's name, the path of a YAML file, or a mapping with
            the same keys. From all but the first, every rank makes its own source when training is set up. A
            source that names no device works on the Trainer's.
        val_dataloaders: what to validate on: a loader, a list of them, or a callable that returns either;
            None: nothing.
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
        self._source: MLViewSource | None = None
        self._config: dict[str, Any] = {}
        if isinstance(source, MLViewSource):
            self._source = source
        else:
            self._config = load_config(source)  # an unknown preset or key is an error now, not in setup
        self._loader: _Loader | None = None
        self._loaders = {"val_dataloader": val_dataloaders, "test_dataloader": test_dataloaders}
        for name, loaders in self._loaders.items():
            is_overridden = getattr(type(self), name) is not getattr(MLViewDataModule, name)
            if loaders is None and not is_overridden:
                setattr(self, name, None)  # tells Lightning, in either namespace, that there is no loader

    @property
    def source(self) -> MLViewSource:
        """The source that trains; :meth:`setup` makes it, unless it was given.

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
        """Return the source, its epoch and its place kept in step with the Trainer's.

        Raises:
            ValueError: before :meth:`setup`.
        """
        return self._ready()

    def val_dataloader(self) -> Any:
        """Return what to validate on."""
        return _called(self._loaders["val_dataloader"])

    def test_dataloader(self) -> Any:
        """Return what to test on."""
        return _called(self._loaders["test_dataloader"])

    def state_dict(self) -> dict[str, int]:
        """Return the place in training, for a checkpoint.

        It has ``seed``, ``epoch`` (the Trainer's), and ``position`` in samples over all ranks.
        """
        return self._ready().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Make training go on from a checkpoint's place.

        Raises:
            ValueError: if the state is incomplete, belongs to another seed, or lies beyond this epoch's end.
        """
        self._ready().load_state_dict(state_dict)

    def _ready(self) -> _Loader:
        """Return the module's own loader: a subclass may hand out others beside it."""
        if self._loader is None:
            raise ValueError("The data module is not set up: Trainer.fit does it, or call setup('fit').")
        return self._loader


class _Loader:
    """The source as its Trainer sees it.

    Its state is the module's, so that it does not matter which of the two Lightning restores.

    Args:
        source: the source.
        trainer: the Trainer; None if there is none.
    """

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    def __init__(self, source: MLViewSource, trainer: Any) -> None:
        self.source = source
        self._trainer = trainer
        self._offset = 0  # the source's epoch minus the Trainer's
        self._state: dict[str, int] | None = None  # a loaded state that training has not gone on from yet
        self._trained = source.state_dict()  # the source's place before the latest batch

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source:
            yield batch
            self._trained = self.source.state_dict()

    @property
    def sampler(self) -> _Loader:
        """The loader itself: Lightning sets the epoch through it."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the Trainer's epoch. Lightning calls it before each of its epochs.

        Passes after the first one in it are rounds of it (:class:`mlviews.source.Cursor`).
        """
        state, self._state = self._state, None
        overfits = self._trainer is not None and self._trainer.overfit_batches
        self._offset = -epoch if overfits else 0
        if state is not None:
            goes_on = state["epoch"] % ROUND == epoch
            place = state["epoch"] if goes_on else epoch, state["position"] if goes_on else 0
            self.source.load_state_dict(state | {"epoch": place[0] + self._offset, "position": place[1]})
            self._recount(len(self) - self.source.batches_after(place[1]))
        self.source.set_epoch(epoch + self._offset, by_trainer=True)
        self._trained = self.source.state_dict()

    def state_dict(self) -> dict[str, int]:
        """Return the place after the last batch that was trained on."""
        if self._state is not None:
            return dict(self._state)
        place = self.source.state_dict()
        if self._batches is not None:
            count = self._batches.current
            if count.ready > count.processed:  # the step of the latest batch was interrupted
                place = self._trained
        return place | {"epoch": place["epoch"] - self._offset}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Keep the state until Lightning says which epoch it goes on with."""
        self.source.load_state_dict(state)  # checks the state
        self._state = {name: int(state[name]) for name in self.source.state_dict() if name in state}

    @property
    def _batches(self) -> Any:
        """Lightning's count of batches, whose ``current`` is that of this epoch; None without a Trainer."""
        return None if self._trainer is None else self._trainer.fit_loop.epoch_loop.batch_progress

    def _recount(self, batches: int) -> None:
        """Set Lightning's count of this epoch's batches, which decides when the epoch ends.

        The restored count is in batches of the checkpoint's size, or of the checkpoint's epoch. Beside other
        loaders it is not the source's alone, and is left as it is.
        """
        if self._batches is None or self._trainer.train_dataloader is not self:
            return
        self._batches.is_last_batch = False
        count = self._batches.current
        # 1 in a checkpoint of on_train_batch_end, as Lightning completes the batch just after it; else 0.
        pending = count.processed - count.completed
        count.ready = count.started = count.processed = batches
        count.completed = batches - pending


def _called(loaders: Any) -> Any:
    """Return the loaders, or what a callable returns for them."""
    return loaders() if callable(loaders) else loaders
