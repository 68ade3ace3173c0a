"""The user's own images through every adapter: the samples of the source, with the images' labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import by_index
from PIL import Image
from test_images import COUNT, folder, pixels, source
from test_solo_learn import configuration

from mlviews import MLViewSource
from mlviews.integrations import files
from mlviews.integrations.plain_torch import train as plain_torch
from mlviews.integrations.solo_learn.views import Views, summary
from mlviews.source import Batch

PRESET = "fashion-nvae-real-resample"


def photos(path: Path, classes: int = 3) -> Path:
    """Images of 28 pixels, of class i % classes."""
    return folder(path, pixels(COUNT, (1, 28, 28)), classes)


def expected(images: Path, **options: Any) -> dict[int, int]:
    """The class of each sample's image."""
    views = MLViewSource.from_config(PRESET, images=str(images), seed=7, batch_size=COUNT, **options)
    batch = views.batch(0, COUNT)
    return dict(zip(batch.indices.tolist(), batch.targets.tolist(), strict=True))


# -- solo-learn ----------------------------------------------------------------------------------------------


def test_solo_learn_gets_the_images_and_their_labels(tmp_path: Path) -> None:
    images = photos(tmp_path)
    views = Views(configuration(data__mlvgm={"preset": PRESET, "images": str(images)}))
    loader = views.source(4)
    batches = list(loader)
    assert len(batches) == COUNT // 4
    labels = expected(images)
    for indices, crops, targets in batches:
        assert [crop.shape[1:] for crop in crops] == [(3, 28, 28)] * 2
        assert targets.tolist() == [labels[index] for index in indices.tolist()]
    assert views.num_classes(0) == 5  # as momentum methods need
    assert "of 21 images" in summary(loader)
    assert "3 classes" in summary(loader)
    assert views.config["images"] == str(images), "as args.json takes it"


def test_solo_learns_train_path_as_the_images(tmp_path: Path) -> None:
    mlvgm = {"preset": PRESET, "images": "${data.train_path}"}
    cfg = configuration(data__train_path=str(photos(tmp_path)), data__mlvgm=mlvgm)
    source = Views(cfg).source(4)
    assert source.images is not None
    assert source.images.path == tmp_path  # type: ignore[attr-defined]
    assert source.num_samples == COUNT


def test_images_serve_methods_that_need_labels_or_a_memory(tmp_path: Path) -> None:
    mlvgm = {"preset": PRESET, "images": str(photos(tmp_path / "classes"))}
    for method in ("supcon", "deepclusterv2"):
        assert Views(configuration(method=method, data__mlvgm=mlvgm)).labelled
    flat = {"preset": PRESET, "images": str(photos(tmp_path / "flat", classes=0))}
    assert not Views(configuration(data__mlvgm=flat)).labelled
    assert not Views(configuration(data__no_labels=True, data__mlvgm=mlvgm)).labelled
    with pytest.raises(ValueError, match="or images of your own in one folder a class"):
        Views(configuration(method="supcon", data__mlvgm=flat))
    with pytest.raises(FileNotFoundError, match="No image folder"):
        Views(configuration(data__mlvgm={"preset": PRESET, "images": str(tmp_path / "nowhere")}))


def test_a_memory_has_room_for_every_image(tmp_path: Path) -> None:
    mlvgm = {"preset": PRESET, "images": str(photos(tmp_path)), "num_samples": 8}
    loader = Views(configuration(method="deepclusterv2", data__mlvgm=mlvgm)).source(4)
    indices = torch.cat([batch[0] for _ in range(4) for batch in loader])
    assert 8 <= int(indices.max()) < len(loader.dataset) == COUNT


# -- the others ----------------------------------------------------------------------------------------------


def test_lightning_trains_on_every_image_once_an_epoch(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from mlviews.integrations.lightning import MLViewDataModule

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[tuple[int, int, int]] = []

        def training_step(self, batch: Any, index: int) -> Any:
            indices, views, targets = batch
            pairs = zip(indices.tolist(), targets.tolist(), strict=True)
            self.seen += [(self.current_epoch, *pair) for pair in pairs]
            return self.layer(views[1].mean().view(1, 1)).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    images = photos(tmp_path)
    config = {
        "preset": PRESET,
        "images": str(images),
        "batch_size": 7,
        "seed": 7,
        "layout": "solo",
        "transform": None,
    }
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)
    model = Model()
    trainer.fit(model, MLViewDataModule(config))
    labels = expected(images)
    for epoch in range(2):
        assert {index: label for number, index, label in model.seen if number == epoch} == labels


def test_lightly_gets_the_labels(tmp_path: Path) -> None:
    images = photos(tmp_path)
    labels = expected(images)
    loader = MLViewSource.from_config(PRESET, images=str(images), batch_size=7, seed=7, layout="lightly")
    seen = {}
    for views, targets, names in loader:
        assert [len(view) for view in views] == [7, 7]
        seen |= dict(zip(map(int, names), targets.tolist(), strict=True))
    assert seen == labels


def test_plain_torch_trains_on_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(json.dumps({"preset": PRESET, "images": "photos"}))  # beside it
    photos(tmp_path / "photos")
    plain_torch.main(str(preset), 2, COUNT, 7, tmp_path / "out.pt")
    assert capsys.readouterr().out.count("loss") == 2


def test_an_export_has_the_images_and_their_labels(tmp_path: Path) -> None:
    def views(**options: Any) -> MLViewSource:
        return source(images=folder(tmp_path / "images"), drop_last=False, **options)

    out = tmp_path / "out"
    outcome = files.export(views(), out, progress=False)
    assert (outcome.complete, outcome.written) == (True, COUNT)
    batch: Batch = views().batch(0, COUNT)
    anchors = by_index([batch])
    stored = [np.asarray(Image.open(path)) for path in out.rglob("*.png")]
    assert len(stored) == 2 * COUNT
    pixels_of_anchors = [(view[0, 0] * 255).round().byte().numpy() for view in anchors.values()]
    exact = sum(any(np.array_equal(image, anchor) for image in stored) for anchor in pixels_of_anchors)
    assert exact == COUNT, "every image itself is an anchor"
    with pytest.raises(ValueError, match="anchor_view"):
        files.export(views(anchor_view="reconstructed"), out, progress=False)
    (tmp_path / "images" / "class0" / "000.png").unlink()
    with pytest.raises(ValueError, match="holds an export with"):
        files.export(source(images=tmp_path / "images", drop_last=False), out, progress=False)
