"""accelerate around a source: in one process here, and on two processes that torchrun starts below."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun, toy_source
from torch import nn
from torch.utils.data import DataLoader

from mlviews import MLViewSource

accelerate = pytest.importorskip("accelerate")

Record = list[list[tuple[list[int], float]]]
"""Of each pass, the batches: their indices, and a number that follows from their content."""


def views(**options: Any) -> MLViewSource:
    """48 samples an epoch in batches of 4."""
    return toy_source(batch_size=4, layout=lambda batch: (batch.indices, *batch.views), **options)


def bare(source: MLViewSource) -> Any:
    return source


def loader(source: MLViewSource) -> Any:
    return DataLoader(source, batch_size=None)


FORMS = {"source": bare, "loader": loader}


def passes(batches: Any, lengths: list[int | None]) -> Record:
    """What passes hand out that are left after so many batches; None: that come to their end."""
    return [
        [(batch[0].tolist(), round(float(batch[1].sum()), 4)) for batch in itertools.islice(batches, length)]
        for length in lengths
    ]


def content(record: Record) -> list[float]:
    return [number for one_pass in record for _, number in one_pass]


def resumed(accelerator: Any, form: Any, folder: Path) -> tuple[Record, Record]:
    """A run that is saved in the middle of its second epoch, and what comes after it in a new one."""
    source = views()
    batches = accelerator.prepare(form(source))
    accelerator.register_for_checkpointing(source)
    before = passes(batches, [None])
    for step, batch in enumerate(batches):
        before.append([(batch[0].tolist(), round(float(batch[1].sum()), 4))])
        if step == 2:
            break
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()  # the first process alone writes
    accelerator._custom_objects.clear()

    source = views()
    batches = accelerator.prepare(form(source))
    accelerator.register_for_checkpointing(source)
    accelerator.load_state(str(folder))
    accelerator._custom_objects.clear()
    return before, passes(batches, [None, None])


@pytest.mark.parametrize("form", FORMS)
def test_epochs_and_a_pass_left_early(form: str) -> None:
    batches = accelerate.Accelerator(cpu=True).prepare(FORMS[form](views()))
    record = passes(batches, [None, 2, None, 1, 1, None])
    assert [len(one_pass) for one_pass in record] == [12, 2, 12, 1, 1, 12]
    assert len(set(content(record))) == 40
    assert sorted(index for indices, _ in record[0] for index in indices) == list(range(48))


@pytest.mark.parametrize("form", FORMS)
def test_a_named_epoch(form: str) -> None:
    source = views()
    batches = accelerate.Accelerator(cpu=True).prepare(FORMS[form](source))
    expected = passes(views(), [None] * 6)
    for epoch in (0, 4, 5):
        source.set_epoch(epoch)
        assert passes(batches, [None]) == [expected[epoch]]


@pytest.mark.parametrize("form", FORMS)
def test_resume(form: str, tmp_path: Path) -> None:
    expected = passes(views(), [None] * 3)
    before, after = resumed(accelerate.Accelerator(cpu=True), FORMS[form], tmp_path)
    assert content(before) == content(expected)[:15]
    # accelerate asks a data loader for one batch more than it has handed out, which is left out then.
    left_out = {"source": 0, "loader": 1}[form]
    assert content(after) == content(expected)[15 + left_out :]


def test_resume_by_torchdatas_loader() -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    configuration = accelerate.utils.DataLoaderConfiguration(use_stateful_dataloader=True)
    expected = content(passes(views(), [None] * 2))
    batches = accelerate.Accelerator(cpu=True, dataloader_config=configuration).prepare(loader(views()))
    before = []
    for batch in batches:
        before.append(round(float(batch[1].sum()), 4))
        if len(before) == 5:
            state = batches.state_dict()
            break
    again = accelerate.Accelerator(cpu=True, dataloader_config=configuration).prepare(loader(views()))
    again.load_state_dict(state)
    assert before + content(passes(again, [None, None])) == expected


@pytest.mark.parametrize(("form", "steps"), [("source", [4, 9, 14, 19]), ("loader", [4, 9, 11, 16, 21, 23])])
def test_gradient_accumulation(form: str, steps: list[int]) -> None:
    """A data loader's last batch ends an accumulation; the bare source's goes on into the next epoch."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=5)
    net = nn.Linear(16, 1)
    net, optimizer, batches = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), 0.1), FORMS[form](views())
    )
    updates, step = [], 0
    for _ in range(2):
        for batch in batches:
            with accelerator.accumulate(net):
                accelerator.backward(net(batch[1].flatten(1)).mean())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                updates.append(step)
            step += 1
    assert updates == steps


def test_skip_first_batches() -> None:
    """It wants a data loader; the source's own state does it without making the batches."""
    with pytest.raises(AttributeError, match="dataset"):
        accelerate.skip_first_batches(views(), 3)
    expected = passes(views(), [None])
    batches = accelerate.Accelerator(cpu=True).prepare(loader(views()))
    assert passes(accelerate.skip_first_batches(batches, 3), [None]) == [expected[0][3:]]


def test_two_processes(tmp_path: Path) -> None:
    torchrun(str(Path(__file__)), str(tmp_path), OMP_NUM_THREADS="1")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for form in FORMS:
        epochs = list(zip(*(rank[form] for rank in ranks), strict=True))
        for whole in (epochs[0], epochs[2]):
            assert [len(one_pass) for one_pass in whole] == [6, 6]
            samples = sorted(index for one_pass in whole for indices, _ in one_pass for index in indices)
            assert samples == list(range(48))
        numbers = [number for rank in ranks for number in content(rank[form])]
        assert len(numbers) == len(set(numbers)) == 2 * (6 + 2 + 6)

        before = {number for rank in ranks for number in content(rank[f"{form}, resumed"][0])}
        after = {number for rank in ranks for number in content(rank[f"{form}, resumed"][1])}
        assert not before & after
        assert len(before) == 2 * (6 + 3)
        assert len(after) == 2 * (6 - 3 + 6) - {"source": 0, "loader": 2}[form]
        assert [rank[f"{form}, length"] for rank in ranks] == [6, 6]
    assert all(
        "give it the source itself, accelerator.prepare(source)" in rank["no dispatch"] for rank in ranks
    )


def one_rank(folder: Path) -> None:
    """A rank of all runs on two processes, one after the other, to pay for the start once."""
    accelerator = accelerate.Accelerator(cpu=True)
    record: dict[str, Any] = {}
    for form, wrapped in FORMS.items():
        batches = accelerator.prepare(wrapped(views()))
        record[form] = passes(batches, [None, 2, None])
        record[f"{form}, length"] = len(batches)
        record[f"{form}, resumed"] = resumed(accelerator, wrapped, folder / form)
    configuration = accelerate.utils.DataLoaderConfiguration(dispatch_batches=False)
    try:
        accelerate.Accelerator(cpu=True, dataloader_config=configuration).prepare(loader(views()))
    except ValueError as error:
        record["no dispatch"] = str(error)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(record))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
