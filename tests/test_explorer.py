"""The explorer without a browser: states, presets, costs, uploads, measuring, and who gets an answer."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Toy
from PIL import Image

from mlviews import ImpactReport, MLViewSource
from mlviews.evaluation.data import Labelled, bundled_slice
from mlviews.explorer import classes, costs, measuring, pictures, uploads
from mlviews.explorer.costs import ClassCurve, ClassShares, Costs
from mlviews.explorer.session import Session
from mlviews.explorer.state import Setting, State, preset_yaml, python_lines
from mlviews.impact.sweep import SweepOptions
from mlviews.perturb import Mix, Normal, Resample, matched
from mlviews.viz import view_images

ROOT = Path(__file__).parents[1]
GRID = [0.05, 0.3, 1.0, 4.0]
SHARES = ClassShares(
    "fashion",
    "normal",
    2.0,
    100,
    0.9,
    dict.fromkeys(range(4), ClassCurve(GRID, [0.9, 0.8, 0.6, 0.2], 0.3)),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report, with class curves beside it."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(ROOT / "benchmarks" / "results" / "fashion-sweep.json", folder / "impact.json")
    SHARES.save(folder)
    return folder


@pytest.fixture(scope="module")
def session(report: Path) -> Session:
    return Session("fashion-ml-matched", report=report)


def small(session: Session, **changes: Any) -> State:
    """The session's state with few images."""
    return dataclasses.replace(session.initial, anchors=2, views=3, **changes)


def stacked(views: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(views)


# -- states ----------------------------------------------------------------------------------------------


def test_a_state_survives_its_json(session: Session) -> None:
    settings = (Setting("fixed"), Setting("normal", 0.3, None), Setting("resample"), Setting("normal", 1.5))
    state = small(session, settings=settings, seed=2**53 - 1, dim=3, level=1)
    assert session.read(state.json(session.rows)) == state
    assert session.read("{}") == session.initial


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "of type list"),
        ('{"path": "/etc/passwd"}', "Invalid key 'path'"),
        ('{"perturb": 3}', "Invalid perturb=3"),
        ('{"perturb": {"4": "fixed"}}', "Invalid level '4'"),
        ('{"perturb": {"1": "walker"}}', "Invalid perturber 'walker': there are fixed, normal, mix"),
        ('{"perturb": {"1": {"name": "walker", "path": "/etc/passwd"}}}', "Invalid perturber 'walker'"),
        ('{"perturb": {"1": {"name": "normal", "path": "x"}}}', "Invalid option 'path'"),
        ('{"perturb": {"1": {"name": "normal", "std": 1e99}}}', "Invalid std=1e"),
        ('{"perturb": {"1": {"name": "normal", "std": NaN}}}', "Invalid std=nan"),
        ('{"perturb": {"1": {"name": "normal", "std": "1"}}}', "Invalid std='1'"),
        ('{"perturb": {"1": {"name": "normal", "truncation": 0}}}', "Invalid truncation=0"),
        ('{"perturb": {"1": "preset"}}', "Invalid perturber of level 1 'preset'"),
        ('{"perturb": {"1": ["fixed"]}}', "Invalid perturber"),
        ('{"seed": -1}', "Invalid seed=-1"),
        ('{"seed": 9007199254740992}', "from 0 to 2\\*\\*53 - 1"),
        ('{"anchors": 1000000}', "Invalid anchors=1000000"),
        ('{"views": 1e3}', "Invalid views=1000.0"),
        ('{"steps": 1}', "Invalid steps=1"),
        ('{"span": Infinity}', "Invalid span=inf"),
        ('{"level": 9}', "Invalid level=9"),
        ('{"split": 5}', "Invalid split=5"),
        ('{"keep": true}', "Invalid keep=True"),
    ],
)
def test_a_link_of_anyone_is_checked(session: Session, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.read(text)


# -- the preset makes what is on screen ------------------------------------------------------------------


def check_taken_away(session: Session, state: State, folder: Path) -> None:
    """The YAML and the Python lines make the images that the session shows."""
    views = session.views(state)
    configuration = session.configuration_of(state)
    (folder / "mine.yaml").write_text(preset_yaml(configuration, state))
    source = MLViewSource.from_config(folder / "mine.yaml")
    replayed = view_images(source, state.anchors, state.views)
    assert torch.equal(stacked(replayed.generated), stacked(views.generated))
    assert replayed.augmented is not None
    assert views.augmented is not None
    assert torch.equal(stacked(replayed.augmented), stacked(views.augmented))
    names: dict[str, Any] = {}
    exec(python_lines(configuration, state), names)
    assert torch.equal(stacked(names["views"]), stacked(views.generated))


def test_the_preset_makes_what_is_on_screen(session: Session, tmp_path: Path) -> None:
    check_taken_away(session, small(session), tmp_path)
    settings = (Setting("fixed"), Setting("normal", 0.123), Setting("normal", 0.123), Setting("resample"))
    check_taken_away(session, small(session, settings=(*settings[:3], Setting("mix", 0.3))), tmp_path)
    state = small(session, settings=settings, seed=7)
    check_taken_away(session, state, tmp_path)
    # Neighbors that are alike have one key.
    assert session.configuration_of(state)["perturb"] == {
        0: "fixed",
        "1:3": {"name": "normal", "std": 0.123, "truncation": 2.0},
        3: "resample",
    }


def test_a_preset_with_a_walker(tmp_path: Path) -> None:
    session = Session("fashion-ml-learned")
    assert [row.key for row in session.rows] == ["0", "1:4"]
    assert session.rows[1].kinds == ("preset", "fixed", "normal", "mix", "resample")
    state = small(session)
    assert state.settings[1].kind == "preset"
    check_taken_away(session, state, tmp_path)
    check_taken_away(session, small(session, settings=(Setting("fixed"), Setting("normal", 0.5))), tmp_path)
    assert session.costs.nats(session.rows[1], state.settings[1]) is None
    views = session.views(state)
    assert len(views.alone) == 2  # the anchor, and the walker's row


def test_a_pool_and_several_crops(tmp_path: Path) -> None:
    sizes = [{"name": "simclr", "size": size, "color": False} for size in (28, 28, 16)]
    pool = {"preset": "fashion-ml-random", "pool": True, "num_samples": 40, "crops": [0, 1, 1]}
    (tmp_path / "pool.yaml").write_text(json.dumps({**pool, "transform": sizes}))
    session = Session(str(tmp_path / "pool.yaml"))
    state = small(session)
    source = MLViewSource.from_config(tmp_path / "pool.yaml", batch_size=2, transform=None, crops=None)
    assert torch.equal(session.views(state).generated[0], source.batch(0, 2).views[0])
    check_taken_away(session, state, tmp_path)


def test_images_as_anchors(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((40, 30), 60 + number).save(folder / f"{number}.png")
    session = Session("fashion-real-ml", images=folder)
    state = small(session)
    assert state.anchors <= 3
    check_taken_away(session, state, tmp_path)
    own = session.own_images(state, None)
    assert own.images.shape == own.reconstructed.shape == (2, 1, 32, 32)
    assert len(own.positives) == 2


def test_a_generator_by_its_name() -> None:
    session = Session("fashion-nvae", seed=5)
    assert [setting.kind for setting in session.initial.settings] == ["normal"] * 3
    assert session.initial.seed == 5
    assert "weights" not in session.configuration


# -- images ----------------------------------------------------------------------------------------------


def test_anchors_and_earlier_positives_stay(session: Session) -> None:
    first = session.views(small(session)).generated
    moved = small(session, settings=(Setting("normal", 1.0), *session.initial.settings[1:]))
    second = session.views(moved).generated
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    more = session.views(dataclasses.replace(small(session), views=5)).generated
    torch.testing.assert_close(stacked(more[:3]), stacked(first), atol=1e-5, rtol=0)
    assert not torch.allclose(first[0], session.views(small(session, seed=1)).generated[0])


def test_a_level_moved_alone_moves_as_it_does_with_the_others(session: Session) -> None:
    state = small(session)
    views = session.views(state)
    assert len(views.alone) == 5
    for level, images in enumerate(views.alone[1:]):
        settings = [Setting("fixed")] * 4
        settings[level] = state.settings[level]
        only = session.views(dataclasses.replace(state, settings=tuple(settings)))
        torch.testing.assert_close(only.generated[1], images, atol=1e-5, rtol=0)


def test_uploaded_images_keep_their_order(session: Session) -> None:
    pixels = torch.arange(0, 250, 50, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 32, 32)
    own = session.own_images(dataclasses.replace(session.initial, anchors=4), pixels)
    assert own.images.mean((1, 2, 3)).mul(255).round().tolist() == [0, 50, 100, 150]
    decoded = session.generator(session.generator.encode(own.images))
    torch.testing.assert_close(own.reconstructed, decoded, atol=1e-5, rtol=0)
    everything = session.own_images(dataclasses.replace(session.initial, keep=4), pixels)
    for kept, drawn in zip(everything.purified, own.purified, strict=True):
        torch.testing.assert_close(kept[:1], decoded[:1], atol=1e-5, rtol=0)
        assert not torch.allclose(kept[:4], drawn)
    with pytest.raises(ValueError, match="There are no images"):
        session.own_images(session.initial, None)


def test_latents_in_hand(session: Session) -> None:
    state = small(session, level=1, steps=3, split=2)
    anchors = session.views(state).generated[0]
    traversal = session.traversal(state)
    assert [len(direction) for direction in traversal] == [3, 3]
    for direction in traversal:  # an odd number of steps has the anchors in the middle
        torch.testing.assert_close(direction[1], anchors, atol=1e-5, rtol=0)
    assert len(session.traversal(dataclasses.replace(state, dim=15))) == 1
    with pytest.raises(ValueError, match="Invalid coordinate 16: level 8x8 has 16"):
        session.traversal(dataclasses.replace(state, dim=16))
    (before,), (after,), drawn = session.intervention(state)
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=0)  # it is set to its own value
    assert not torch.allclose(after[1], before[1])
    assert len(drawn) == 1
    (rows,), columns = session.recombination(state)
    assert rows.shape == (3, 1, 32, 32)
    for number, column in enumerate(columns):
        torch.testing.assert_close(column[0], anchors[number], atol=1e-5, rtol=0)
        torch.testing.assert_close(column[1 + number], anchors[number], atol=1e-5, rtol=0)
    assert not torch.allclose(columns[0][2], anchors[1])


def test_pictures_hold_the_pixels() -> None:
    images = torch.rand(2, 3, 4, 5)
    with Image.open(io.BytesIO(pictures.png(pictures.grid([[images], [images, images]])))) as image:
        pixels = torch.from_numpy(np.array(image))
    assert pixels.shape == (2 * 5 + 1, 3 * 6 + 1 + 1 + 2, 3)
    assert torch.equal(pixels[1:5, 1:6], (images[0] * 255).round().to(torch.uint8).permute(1, 2, 0))
    text = pictures.picture([[images]], "grid", "caption", "a.png", ["<script>"])
    assert "<script>" not in text
    assert 'download="a.png"' in text


# -- costs -----------------------------------------------------------------------------------------------


def test_nats_are_read_off_the_curve(session: Session) -> None:
    row, impact = session.rows[0], session.costs.report.impacts[0]  # type: ignore[union-attr]
    curve = impact.curve
    assert curve is not None
    for magnitude, loss in zip(curve.magnitudes, curve.monotone, strict=True):
        assert session.costs.nats(row, Setting("normal", magnitude)) == pytest.approx(loss)
    between = (curve.magnitudes[3] * curve.magnitudes[4]) ** 0.5
    middle = (curve.monotone[3] + curve.monotone[4]) / 2
    assert session.costs.nats(row, Setting("normal", between)) == pytest.approx(middle)
    assert session.costs.nats(row, Setting("normal", impact.magnitude or 0)) == pytest.approx(0.7, abs=1e-6)
    half = session.costs.nats(row, Setting("normal", curve.magnitudes[0] / 2))
    assert half == pytest.approx(curve.monotone[0] / 2)
    assert session.costs.nats(row, Setting("normal", 0.0)) == 0
    assert session.costs.nats(row, Setting("fixed")) == 0
    assert session.costs.nats(row, Setting("resample")) == curve.resample
    assert session.costs.nats(row, Setting("normal", 0.2, None)) is None  # the sweep's noise was truncated
    assert Costs().nats(row, Setting("resample")) is None


def test_class_kept_is_read_off_its_curve(session: Session) -> None:
    row = session.rows[0]
    assert session.costs.class_kept(row, Setting("normal", 0.3)) == pytest.approx(0.8)
    assert session.costs.class_kept(row, Setting("normal", 0.025)) == pytest.approx(0.95)
    assert session.costs.class_kept(row, Setting("normal", 8.0)) == pytest.approx(0.2)
    assert session.costs.class_kept(row, Setting("resample")) == 0.3
    assert session.costs.class_kept(row, Setting("fixed")) == 1
    assert costs.described(0.7, 0.8) == "0.70 nats · class kept 80%"
    assert costs.described(None, 0.8) == "cost not measured"


def test_the_report_s_own_target_is_spent_as_matched_spends_it(session: Session) -> None:
    known = session.costs
    assert known.report is not None
    for key, perturber in matched(known.report).items():
        row = session.rows[int(key)]
        setting = known.spend(row, Setting("fixed"), known.report.target_loss)
        if isinstance(perturber, Resample):
            assert setting.kind == "resample"
        else:
            assert isinstance(perturber, Normal)
            assert setting.amount == pytest.approx(perturber.std, rel=5e-3)


@pytest.mark.parametrize("nats", [0.01, 0.2, 0.5, 1.5])
def test_the_same_is_spent_at_every_level_that_can(session: Session, nats: float) -> None:
    for row in session.rows:
        setting = session.costs.spend(row, Setting("fixed"), nats)
        if setting.kind == "normal":
            assert session.costs.nats(row, setting) == pytest.approx(nats, rel=0.02)
        else:
            assert setting.kind == "resample"
    assert session.costs.spend(row, Setting("resample"), 0.0).kind == "fixed"
    assert session.costs.spend(row, Setting("normal", 0.5), 100.0).kind == "resample"
    assert Costs().spend(row, Setting("normal", 0.5), nats) == Setting("normal", 0.5)


def test_a_report_of_mixtures(session: Session) -> None:
    report = session.costs.report
    assert report is not None
    mixed = Costs(dataclasses.replace(report, options={**report.options, "perturber": "mix"}), SHARES)
    row = session.rows[0]
    std = SweepOptions(perturber="mix").shift(0.3)
    assert isinstance(std, Mix)
    expected = session.costs.nats(row, Setting("normal", 0.3))
    assert mixed.nats(row, Setting("mix", std.rate)) == pytest.approx(expected)
    assert mixed.nats(row, Setting("mix", 1.0, None)) == mixed.nats(row, Setting("resample"))
    assert mixed.nats(row, Setting("normal", 0.3)) is None
    assert mixed.class_kept(row, Setting("mix", std.rate)) is None  # of which the classes were not measured
    setting = mixed.spend(row, Setting("fixed"), 0.5)
    assert setting.kind == "mix"
    assert mixed.nats(row, setting) == pytest.approx(0.5, rel=0.02)


def test_class_shares_survive_their_file(tmp_path: Path) -> None:
    assert ClassShares.load(tmp_path) is None
    path = SHARES.save(tmp_path)
    assert ClassShares.load(tmp_path) == SHARES
    content = json.loads(path.read_text())
    curve = content["curves"]["0"]
    for damaged in (
        "{",
        "[]",
        json.dumps({**content, "format": "x"}),
        json.dumps({**content, "more": 1}),
        json.dumps({**content, "curves": {"0": {**curve, "shares": [1]}}}),
        json.dumps({**content, "curves": {"0": {**curve, "magnitudes": GRID[::-1]}}}),
        json.dumps({**content, "curves": {"0": {**curve, "resample": "1"}}}),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            ClassShares.load(tmp_path)


def test_a_report_of_another_generator(report: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of fashion with the levels 4x4, 8x8, 16x16, 32x32"):
        Session("fashion-nvae-resample", report=report)
    with pytest.raises(FileNotFoundError, match="No folder"):
        Session("fashion-ml-random", report=tmp_path / "nothing")


# -- measuring -------------------------------------------------------------------------------------------


class Command:
    """Stands for `mlviews impact`, which has tests of its own: says how far it is, and writes a report."""

    TEXT = """
import shutil, sys, time
settings, out = sys.argv[2], sys.argv[sys.argv.index("--out") + 1]
assert "generator: fashion" in open(settings).read()
print("sweep: critics: 1/10", file=sys.stderr, flush=True)
if "--wait" in sys.argv:
    time.sleep(60)
if "--fail" in sys.argv:
    sys.exit("mlviews: no.")
shutil.copy(sys.argv[1], out)
"""

    def __init__(self, folder: Path, report: Path) -> None:
        script = folder / "command.py"
        script.write_text(self.TEXT)
        self.words = (sys.executable, str(script), str(report / "impact.json"))


def test_measuring_beside_the_page(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "COMMAND", Command(tmp_path, report).words)
    monkeypatch.setattr(classes, "measure", lambda *arguments: SHARES)
    folder = tmp_path / "out"
    folder.mkdir()
    session = Session("fashion-ml-random", report=folder)
    assert session.missing == "what levels cost"
    job = session.measure("--fail")
    job._thread.join(30)
    assert (job.costs, job.text) == (None, "mlviews: no.")
    job = session.measure("--wait")
    assert session.measure() is job  # whoever asks looks on at it
    while "1/10" not in job.progress:
        assert job.is_running
    session.close()
    assert not job.is_running
    assert job.text.startswith("stopped")
    job = session.measure()
    job._thread.join(30)
    assert job.text == f"measured; the report is in {folder}"
    assert session.costs.report == ImpactReport.load(report)
    assert session.costs.classes == ClassShares.load(folder) == SHARES
    assert session.missing == ""


def test_classes_are_measured(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "PAIRS", 20)
    monkeypatch.setattr(classes, "BATCH", 20)
    monkeypatch.setattr(classes, "EPOCHS", 1)
    fit, test = bundled_slice()
    few = Labelled(fit.images[:640], fit.labels[:640]), Labelled(test.images[:200], test.labels[:200])
    monkeypatch.setattr(classes, "bundled_slice", lambda: few)
    progress: list[float] = []
    shares = classes.measure(session.generator, None, [0.01, 4.0], SweepOptions(), progress.append)
    assert progress[-1] == pytest.approx(1)
    assert set(shares.curves) == {0, 1, 2, 3}
    assert shares.curves[0].shares[0] > shares.curves[0].shares[1]
    assert shares.accuracy > 0.2
    assert not classes.has_classifier(Toy())


# -- uploads of anyone ------------------------------------------------------------------------------------


def hostile(folder: Path) -> Iterator[Path]:
    """Files that are no images that one would read."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    whole = buffer.getvalue()
    contents = {
        "truncated.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "drawing.png": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "b">]><svg>&b;</svg>',
        # Says that it is 60,000 pixels wide and high.
        "bomb.png": whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:],
        "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\nshowpage\n",
        "pickle.jpg": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name
    with zipfile.ZipFile(folder / "archive.png", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 20))
    yield folder / "archive.png"
    with (folder / "huge.png").open("wb") as file:
        file.truncate(uploads.MOST_BYTES + 1)
    yield folder / "huge.png"
    yield folder / "missing.png"


def test_hostile_uploads(session: Session, tmp_path: Path) -> None:
    files = list(hostile(tmp_path))
    good = tmp_path / "good.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010E] = "x" * 60_000
    Image.effect_noise((50, 40), 50).save(good, exif=exif)
    images, refusals = uploads.read_uploads([*files, good], session.shape)
    assert images is not None
    assert images.shape == (1, 1, 32, 32)
    assert len(refusals) == len(files)
    for file, refusal in zip(files, refusals, strict=True):
        assert refusal.startswith(f"{file.name} was not read: ")
        assert str(tmp_path) not in refusal
    assert list(tmp_path.iterdir()) == []
    images, refusals = uploads.read_uploads([tmp_path / "missing"] * 20, session.shape)
    assert images is None
    assert sum("only the first 16" in refusal for refusal in refusals) == 4
