from __future__ import annotations

import ast
import copy
import csv
import json
import math
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import mlviews
from mlviews import load_generator
from mlviews.impact.report import Curve, Distances, History, ImpactReport, LevelImpact
from mlviews.perturb import Fixed, Normal, Perturber, Resample, Walker, assign, build
from mlviews.viz import mosaic

Saved = dict[str, tuple[ImpactReport, Path, list[Path]]]  # by method: what was saved, where, and the files
NAMES = ("4x4", "8x8", "16x16", "32x32")
MAGNITUDES = [0.03, 0.1, 0.3, 1.0, 3.0]
SIGMA = 0.1234567890123


def distances(mean: float, prior: float = 5.5, norm: float = 1.0, diversity: float = 0.9) -> Distances:
    return Distances(
        1000, mean, 0.2 * mean, [0.0, mean, 2 * mean], [400, 600], prior, norm, diversity, 1 + 7 * diversity
    )


def sweep() -> ImpactReport:
    """Over-used, balanced, resample, under-used."""
    curve = Curve(MAGNITUDES, [0.01, 0.2, 0.9, 1.7, 1.6], [0.02] * 5, [0.01, 0.2, 0.9, 1.65, 1.65], 1.4, 0.03)
    impacts = (
        LevelImpact(
            (0,),
            NAMES[0],
            "reached",
            Normal(SIGMA),
            0.7,
            0.01,
            distances(0.6),
            SIGMA,
            (0.1, 0.15),
            (0.5, 0.7),
        ),
        LevelImpact(
            (1,),
            NAMES[1],
            "reached",
            Normal(1 / 3, 2.0),
            0.71,
            0.01,
            distances(4.4),
            1 / 3,
            (0.3, 0.4),
            (4.0, 4.9),
        ),
        LevelImpact((2,), NAMES[2], "resample", Resample(), 0.9, 0.02, distances(5.5), curve=curve),
        LevelImpact((3,), NAMES[3], "under-used", Resample(), 0.1, 0.02, distances(5.5)),
    )
    impacts = tuple(replace(impact, curve=curve, steps=500, seconds=12.5) for impact in impacts)
    return report("sweep", impacts)


def walker() -> ImpactReport:
    """Healthy, collapsed, outside the prior, all levels at once."""
    history = History([3.0, 0.5, 0.1, 0.4, 0.8], [3.0, 1.5, 0.6, 0.5, 0.7], [0.1, 0.1, 0.1, 3.0, 8.0], 2)
    shifts = (distances(4.0), distances(6.0, diversity=0.05), distances(16.0, norm=2.9))
    impacts = [
        LevelImpact(
            (i,), NAMES[i], "reached", Walker(16, {"seed": i}), 0.7, 0.01, shift, steps=5, history=history
        )
        for i, shift in enumerate(shifts)
    ]
    return report(
        "walker",
        (
            *impacts,
            LevelImpact((3,), NAMES[3], "reached", Fixed(), 0.7, 0.01, distances(3.0), history=history),
        ),
    )


def report(method: str, impacts: tuple[LevelImpact, ...]) -> ImpactReport:
    grids = {
        name: torch.arange(2 * 3 * 16 * 16).remainder(255).to(torch.uint8).view(2, 3, 1, 16, 16)
        for name in NAMES
    }
    environment = {"versions": {"mlviews": "0"}, "machine": {"processor": "a <fast> one", "threads": 1}}
    levels = tuple((name, (16,)) for name in NAMES)
    return ImpactReport(
        "fashion",
        (1, 32, 32),
        levels,
        method,
        0.7,
        0.1,
        64,
        3,
        impacts,
        99.5,
        environment,
        {"magnitudes": MAGNITUDES},
        grids,
    )


class Page(HTMLParser):
    """What a browser would load, and whether tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    reports = {}
    for original in (sweep(), walker()):
        folder = tmp_path_factory.mktemp("reports") / original.method
        reports[original.method] = (original, folder, original.save(folder))
    return reports


@pytest.mark.parametrize("method", ["sweep", "walker"])
def test_what_is_saved_is_read_back(saved: Saved, method: str) -> None:
    original, folder, _ = saved[method]
    assert ImpactReport.load(folder) == ImpactReport.load(folder / "impact.json") == original
    assert ImpactReport.load(folder) != replace(original, seed=4)
    assert ImpactReport.load(folder) != replace(original, impacts=original.impacts[:3])


def test_equal_reports_have_equal_perturbers() -> None:
    impact = sweep().impacts[0]
    first, second = Walker(4), Walker(4)
    for perturber, second_perturber, equal in (
        (Fixed(), Fixed(), True),
        (Fixed(), Resample(), False),
        (Normal(1.0), Normal(1.0), True),
        (Normal(1.0), Normal(1.5), False),
        (first, first, True),
        (first, copy.deepcopy(first), True),
        (first, second, False),
        (first, Walker(5), False),
        (first, Normal(1.0), False),
    ):
        assert (replace(impact, perturber=perturber) == replace(impact, perturber=second_perturber)) is equal
    assert impact != "report"


def test_files(saved: Saved) -> None:
    always = {
        "impact.json",
        "impact.csv",
        "impact.md",
        "impact.tex",
        "magnitude.png",
        "views.png",
        "distances.png",
        "report.html",
    }
    for method, extra in {
        "sweep": {"curves.png"},
        "walker": {"dynamics.png"} | {f"walker-{i}.safetensors" for i in range(3)},
    }.items():
        _, folder, paths = saved[method]
        assert {path.name for path in paths} == {path.name for path in folder.iterdir()} == always | extra, (
            "nothing half-written stays"
        )
        assert all(path.parent == folder and path.stat().st_size for path in paths)
        assert paths[-1].name == "report.html"


def test_pictures_of_what_there_is(tmp_path: Path) -> None:
    bare = replace(
        sweep(), grids={}, impacts=tuple(replace(impact, curve=None) for impact in sweep().impacts)
    )
    assert {path.name for path in bare.save(tmp_path)} & {"views.png", "curves.png", "dynamics.png"} == set()
    large = {name: torch.zeros(2, 3, 3, 256, 256, dtype=torch.uint8) for name in NAMES}
    many = tuple(replace(walker().impacts[i % 4], levels=(i,)) for i in range(5))
    assert (tmp_path / "many" / "dynamics.png") in replace(walker(), grids=large, impacts=many).save(
        tmp_path / "many"
    )


@pytest.mark.parametrize("method", ["sweep", "walker"])
def test_the_page_needs_nothing_else(saved: Saved, method: str) -> None:
    original, _, paths = saved[method]
    text = paths[-1].read_text(encoding="utf-8")
    page = Page(text)
    pictures = [path for path in paths if path.suffix == ".png"]
    assert page.open == []
    assert len(page.loaded) == len(pictures)
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert "script" not in page.tags
    assert "url(" not in text
    assert "@import" not in text
    page_text = unescape(text)
    for impact in original.impacts:
        assert impact.advice in page_text
        assert all(warning in page_text for warning in impact.warnings)
    for cells in original.cells():
        assert all(f">{cell}</td>" in page_text for cell in cells.values())
    assert "a &lt;fast&gt; one" in text


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_any_number_of_channels(channels: int) -> None:
    image = torch.rand(channels, 2, 3)
    picture = mosaic([[image, image[:, :1]]])
    assert picture.shape == (4, 9, 3)
    expected = image[: 3 if channels > 2 else 1].expand(3, 2, 3).permute(1, 2, 0)
    assert torch.equal(picture[1:3, 1:4], expected)
    assert torch.equal(picture[1:2, 5:8], expected[:1])
    assert (picture[2, 5:8] == 1).all(), "a smaller image leaves white"


def test_verdicts_and_what_to_do() -> None:
    impacts = sweep().impacts
    assert [impact.verdict for impact in impacts] == ["over-used", "balanced", "balanced", "under-used"]
    assert "at most 0.600: Normal(std=0.123)" in impacts[0].advice
    assert "Normal(std=0.333, truncation=2) spends the budget" in impacts[1].advice
    assert "use Resample()" in impacts[2].advice
    assert "does no harm" in impacts[3].advice
    headline = " ".join(sweep().headline)
    assert "0 (4x4) is over-used, 1 (8x8) and 2 (16x16) are balanced and 3 (32x32) is under-used" in headline
    assert "grows with the level: from 0.600 at level 0 (11% of the distance" in headline
    assert "does not grow steadily" in " ".join(walker().headline)


def test_walkers_to_beware_of() -> None:
    healthy, collapsed, outside, fixed = (impact.warnings for impact in walker().impacts)
    assert healthy == fixed == []
    assert len(collapsed) == len(outside) == 1
    assert "one direction" in collapsed[0]
    assert "left the prior" in outside[0]
    assert "walker-1.safetensors" in walker().impacts[1].advice


def test_frame_and_csv(saved: Saved) -> None:
    original, folder, _ = saved["sweep"]
    frame = original.frame()
    assert list(frame["level"]) == ["0", "1", "2", "3"]
    assert frame["mi_bound_nats"][0] == math.log(127) - 0.7
    assert frame["loss_paper_scale"][0] == pytest.approx(1.0)
    assert math.isnan(frame["sigma"][2])
    with (folder / "impact.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["distance_mean"]) for row in rows] == [0.6, 4.4, 5.5, 5.5]
    assert [row["sigma"] for row in rows] == [repr(SIGMA), repr(1 / 3), "", ""], "digits survive"
    assert walker().frame()["sigma"].isna().all()


def test_markdown() -> None:
    lines = sweep().markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 6
    assert {line.count("|") for line in table} == {10}
    first = ["0", "4x4", "0.700 ± 0.010", "4.14", "1.00", "0.600 ± 0.120", "0.11", r"0.123 \[0.100, 0.150\]"]
    assert table[2] == f"| {' | '.join(first)} | over-used |"
    assert "| ≥ 5.50 ± 1.10 | ≥ 1.00 | resample | under-used |" in table[5]


def test_latex() -> None:
    lines = sweep().latex().splitlines()
    kinds = re.fullmatch(r"  \\begin\{tabular\}\{(\w+)\}", lines[4])
    assert kinds is not None
    rows = [line.strip() for line in lines if line.endswith(r"\\")]
    assert {row.count(" & ") + 1 for row in rows} == {len(kinds[1])}
    assert rows[0].startswith("level & name & loss, nats & mean & std & ")
    assert rows[1].startswith(
        r"0 & 4x4 & 0.700 $\pm$ 0.010 & 0.600 & 0.120 & 4.14 & 1.00 & 0.11 & 0.123 [0.100, 0.150] & over-used"
    )
    assert [lines.count(rule) for rule in (r"    \toprule", r"    \midrule", r"    \bottomrule")] == [1, 1, 1]
    assert all(line.count("{") == line.count("}") for line in lines)


def test_the_table_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print(sweep().table())
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == str(sweep())
    with (console := Console(width=120)).capture() as capture:
        console.print(sweep())
    assert "0.123 [0.100, 0.150]" in capture.get(), "in color, too"
    for text in (
        "over-used",
        "0.123 [0.100, 0.150]",
        "0.700 ± 0.010",
        "≥ 5.50 ± 1.10",
        "ceiling of 4.84 nats",
        "A conversion only",
    ):
        assert text in printed
    assert "diversity" in str(walker())


def test_names_with_special_characters(tmp_path: Path) -> None:
    name = r"a_1 & <b>50%</b> | {x} [red] $^"
    odd = replace(sweep(), generator="My<i>Net", grids={}, impacts=(replace(sweep().impacts[0], name=name),))
    text = odd.save(tmp_path)[-1].read_text(encoding="utf-8")
    assert "<b>" not in text
    assert "<i>" not in text
    assert "a_1 &amp; &lt;b&gt;50%&lt;/b&gt; | {x} [red] $^" in text
    assert r"a\_1 \& $<$b$>$50\%$<$/b$>$ $|$ \{x\} [red] \$\textasciicircum{}" in odd.latex()
    assert r"a\_1 & \<b>50%\</b> \| {x} \[red\] $^" in odd.markdown()
    assert name in str(odd)
    assert ImpactReport.load(tmp_path) == replace(odd, grids={})


HOSTILE = "=cmd|' /C calc'!A0\n# a heading\r\n| a | row |\x1b[31m\u202e\x07"


def test_names_with_line_breaks_formulas_and_escape_sequences(saved: Saved, tmp_path: Path) -> None:
    path = damaged_copy(saved, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["generator"] = content["impacts"][0]["name"] = content["levels"][0][0] = HOSTILE
    content["environment"] = {HOSTILE: HOSTILE}
    path.write_text(json.dumps(content), encoding="utf-8")
    odd = ImpactReport.load(tmp_path)
    markdown = odd.markdown().splitlines()
    assert [line for line in markdown if line.startswith("#")] == markdown[:1]
    assert len([line for line in markdown if line.startswith("|")]) == 6
    texts = (odd.markdown(), odd.latex(), odd.html({}), str(odd), odd.title, *odd.headline, odd.snippet)
    for text in (*texts, *(part for fact in odd.facts for part in fact)):
        assert not set(text) & set("\x1b\r\x07\u202e")
    rows = odd.frame().to_csv(index=False).splitlines()
    assert len(rows) == 5
    assert rows[1].startswith("0,'=cmd|' /C calc'!A0 #")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "＝1"])
def test_no_cell_of_a_table_is_a_formula(name: str) -> None:
    odd = replace(sweep(), impacts=(replace(sweep().impacts[0], name=name),))
    cell = odd.frame()["name"][0]
    assert cell == "'" + name.replace("\t", " ")
    assert replace(sweep()).frame()["name"][0] == "4x4"


@pytest.mark.parametrize(
    "options",
    [
        {"weights": 'x"); import os; os.system("id"); ("'},
        {"crop": "\\"},
        {"groups": "a\nimport os"},
        {"x); import os; (y": 1},
        {"class": 1, "a b": 2},
        {"name": "x"},
    ],
    ids=str,
)
def test_a_snippet_is_the_call_that_it_says(options: dict[str, Any]) -> None:
    odd = replace(sweep(), generator="stylegan2", options={"generator": options})
    tree = ast.parse(odd.snippet)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) == 2
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load_generator"
    ]
    assert [ast.literal_eval(argument) for argument in call.args] == ["stylegan2"]
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        values |= value if keyword.arg is None else {keyword.arg: value}
    assert values == {"weights": "FILE"} | {key: options[key] for key in options if key != "name"}


def test_the_configuration_says_what_the_report_found() -> None:
    values = yaml.safe_load(sweep().configuration)
    assert values["generator"] == "fashion"
    assert values["perturb"] == {
        0: {"name": "normal", "std": 0.1235},
        1: {"name": "normal", "std": 0.3333, "truncation": 2.0},
        2: "resample",
        3: "resample",
    }
    perturb = {key: build(item) for key, item in values["perturb"].items()}
    assert len(assign(perturb, load_generator("fashion").levels)) == 4
    joint = replace(walker(), generator="Mine", impacts=(replace(walker().impacts[0], levels=(0, 1, 2)),))
    assert yaml.safe_load(joint.configuration)["perturb"] == {
        "0:3": {"name": "walker", "path": "walker-0-1-2.safetensors"}
    }
    assert "generator" not in yaml.safe_load(joint.configuration)
    assert replace(joint, impacts=(replace(joint.impacts[0], levels=(0, 2)),)).configuration == "", (
        "no key names levels 0 and 2"
    )
    assert replace(joint, impacts=joint.impacts * 2).configuration == "", "a level has one perturber"


def test_snippets_are_python() -> None:
    for name in ("fashion", "bigbigan", "MyNet"):
        compile(replace(sweep(), generator=name).snippet, name, "exec")
    assert 'weights="FILE"' in replace(sweep(), generator="bigbigan").snippet
    cars = replace(sweep(), generator="stylegan2", options={"generator": {"groups": 4}})
    assert 'load_generator("stylegan2", weights="FILE", groups=4)' in cars.snippet
    assert yaml.safe_load(cars.configuration)["generator"] == {
        "name": "stylegan2",
        "weights": "FILE",
        "groups": 4,
    }
    assert "generator = ..." in replace(sweep(), generator="MyNet").snippet


def test_files_that_are_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No impact report"):
        ImpactReport.load(tmp_path)
    with pytest.raises(ValueError, match="Invalid report 3"):
        ImpactReport.load(3)  # type: ignore[arg-type]
    path = tmp_path / "impact.json"
    for text in (
        "",
        "{",
        "[1]",
        "3",
        "\udcff",
        '{"format": "other"}',
        "[" * 100_000,
        '{"format": "mlviews.impact", "version": 99}',
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"impact\.json (is not JSON|holds)"):
            ImpactReport.load(tmp_path)


def damaged_copy(saved: Saved, folder: Path) -> Path:
    """Copy the walkers' report, and return the path of its impact.json, to be damaged."""
    for file in saved["walker"][1].glob("*.[js]*"):
        shutil.copy(file, folder)
    return folder / "impact.json"


def test_damaged_reports(saved: Saved, tmp_path: Path) -> None:
    path = damaged_copy(saved, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    row = content["impacts"][0]
    distances, history = row["distances"], row["history"]
    for key, value, message in (
        ("seed", None, "report.seed is None"),
        ("seed", 1.5, r"report.seed is 1\.5"),
        ("target_loss", "0.7", "report.target_loss is '0.7'"),
        ("target_loss", math.nan, "report.target_loss is nan"),
        ("image_shape", [1, 2], "report.image_shape has 2 values, not 3"),
        ("impacts", {}, r"report.impacts is \{\}"),
        ("impacts", [{}], r"report.impacts\[0\] has the keys \[\]"),
        ("impacts", [{**row, "loss": True}], r"report.impacts\[0\].loss is True"),
        ("impacts", [{**row, "history": [1]}], r"report.impacts\[0\].history is \[1\]"),
        ("impacts", [{**row, "interval": [1.0]}], r"report.impacts\[0\].interval has 1 values, not 2"),
        (
            "impacts",
            [row, {**row, "distances": {**distances, "mean": "4"}}],
            r"report.impacts\[1\].distances.mean is '4'",
        ),
        (
            "impacts",
            [{**row, "history": {**history, "losses": [1.0, math.inf]}}],
            r"report.impacts\[0\].history.losses\[1\] is inf",
        ),
        (
            "impacts",
            [{**row, "distances": {**distances, "median": 1.0}}],
            r"report.impacts\[0\].distances has the keys .*'median'",
        ),
        ("impacts", [{**row, "history": {"losses": []}}], r"report.impacts\[0\].history has the keys"),
        ("impacts", [{**row, "perturber": {"name": "magic"}}], "magic"),
        (
            "impacts",
            [{**row, "perturber": {"name": "walker", "path": "../walker-0.safetensors"}}],
            r"report.impacts\[0\].perturber.path is '../walker-0.safetensors': .* beside the report",
        ),
        ("image_shape", [1, 2, 3, 4], "report.image_shape has 4 values, not 3"),
        ("grids", {}, "report has the keys"),
        ("unheard", 1, "report has the keys"),
    ):
        path.write_text(json.dumps({**content, key: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"impact\.json is damaged: .*{message}"):
            ImpactReport.load(path)


UNFIT: list[tuple[str, Any, str]] = [
    ("impacts", [], "impacts is []: it must be one row or more"),
    ("temperature", 0.0, "temperature is 0.0: it must be a number above 0"),
    ("target_loss", -1.0, "target_loss is -1.0"),
    ("pairs", 1, "pairs is 1: it must be an integer of at least 2"),
    ("pairs", 10**30, "pairs is 'enormous': it must be an integer of at least 2"),
    ("method", "magic", "method is 'magic': it must be one of sweep, walker"),
    ("image_shape", [1, 32, 0], "image_shape[2] is 0"),
    ("seconds", -1.0, "seconds is -1.0"),
    ("options", {"generator": [1]}, "options.generator is [1]: it must be a mapping"),
    ("options", {"generator": "x"}, "options.generator is 'x'"),
    ("impacts.0.levels", [], "impacts[0].levels is []"),
    ("impacts.0.levels", [4], "impacts[0].levels is [4]: it must be indices of the 4 levels"),
    ("impacts.0.levels", [-1], "impacts[0].levels is [-1]"),
    ("impacts.0.status", "=1", "impacts[0].status is '=1'"),
    ("impacts.0.interval", [2.0, 1.0], "impacts[0].interval is [2.0, 1.0]"),
    ("impacts.0.distances.prior", 0.0, "impacts[0].distances.prior is 0.0: it must be a number above 0"),
    ("impacts.0.distances.prior", 5e-324, "impacts[0].distances.prior is 5e-324"),
    ("impacts.0.distances.mean", -1.0, "impacts[0].distances.mean is -1.0"),
    ("impacts.0.distances.count", 0, "impacts[0].distances.count is 0"),
    ("impacts.0.distances.edges", [0.0], "impacts[0].distances.edges is [0.0]"),
    ("impacts.0.distances.counts", [-1, 1], "impacts[0].distances.counts[0] is -1"),
    ("impacts.0.history.losses", [], "impacts[0].history.losses is []"),
    ("impacts.0.history.distances", [1.0], "impacts[0].history.distances is [1.0]"),
    ("impacts.0.history.warmup", 99, "impacts[0].history.warmup is 99"),
    ("impacts.0.curve", {"magnitudes": [], "losses": [], "stderrs": [], "monotone": [], "resample": 1.0,
                         "resample_stderr": 0.1}, "impacts[0].curve.losses is []"),
    ("impacts.0.curve", {"magnitudes": [0.0], "losses": [1.0], "stderrs": [1.0], "monotone": [1.0],
                         "resample": 1.0, "resample_stderr": 0.1}, "impacts[0].curve.magnitudes is [0.0]"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "message"), UNFIT, ids=[f"{a} {b!r:.20}" for a, b, _ in UNFIT])
def test_figures_that_nothing_can_be_made_of(
    saved: Saved, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    path = damaged_copy(saved, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    target, *keys = content, *(int(key) if key.isdigit() else key for key in place.split("."))
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"impact\.json") as caught:
        ImpactReport.load(path)
    assert "\n" not in str(caught.value)
    assert f"is damaged: report.{message}" in str(caught.value)


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".part-abc").mkdir()
    (tmp_path / ".part-abc" / "impact.json").write_text("{")
    files = sweep().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)


def test_reports_without_a_key(saved: Saved, tmp_path: Path) -> None:
    """One that has a default in Python is missed, too."""
    path = damaged_copy(saved, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("seed", "options"):
        shortened = {key: value for key, value in content.items() if key != name}
        path.write_text(json.dumps(shortened), encoding="utf-8")
        with pytest.raises(ValueError, match=r"damaged: report has the keys"):
            ImpactReport.load(path)
    row = content["impacts"][0]
    shortened = {key: value for key, value in row.items() if key != "curve"}
    path.write_text(json.dumps({**content, "impacts": [shortened]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"damaged: report\.impacts\[0\] has the keys"):
        ImpactReport.load(path)


def test_reports_whose_walker_is_damaged_or_missing(saved: Saved, tmp_path: Path) -> None:
    path = damaged_copy(saved, tmp_path)
    (tmp_path / "walker-1.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"walker-1\.safetensors is not a whole"):
        ImpactReport.load(path)
    (tmp_path / "walker-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"walker-1\.safetensors"):
        ImpactReport.load(path)


def test_reports_that_cannot_be_written(tmp_path: Path) -> None:
    class Own(Perturber):
        def __call__(self, latents: object, noise: object) -> list[torch.Tensor]:
            return []

    impact = sweep().impacts[0]
    with pytest.raises(ValueError, match=r"Invalid report\.impacts\[0\]\.loss=nan"):
        replace(sweep(), impacts=(replace(impact, loss=math.nan),)).save(tmp_path / "nan")
    with pytest.raises(ValueError, match="a report holds Fixed, Mix, Normal, Resample or Walker"):
        replace(sweep(), impacts=(replace(impact, perturber=Own()),)).save(tmp_path / "own")
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_the_file_is_that_of_version_1(saved: Saved) -> None:
    """Its keys, in their order, with the perturber last in each row: files of other days are read by it."""
    content = json.loads((saved["sweep"][1] / "impact.json").read_text(encoding="utf-8"))
    assert list(content) == [
        "format",
        "version",
        "generator",
        "image_shape",
        "levels",
        "method",
        "target_loss",
        "temperature",
        "pairs",
        "seed",
        "impacts",
        "seconds",
        "environment",
        "options",
    ]
    assert (content["format"], content["version"]) == ("mlviews.impact", 1)
    row = content["impacts"][0]
    assert list(row)[-2:] == ["curve", "perturber"]
    assert row["perturber"] == {"name": "normal", "std": SIGMA, "truncation": None, "mean": 0.0}
    assert row["interval"] == [0.1, 0.15]


def test_layers() -> None:
    """Figures know nothing of what is made of them, and pages, plots and terminal know figures only."""
    allowed = {"figures": {"stored"}, "pages": {"figures"}, "plots": {"figures"}, "terminal": {"figures"}}
    for name, lower in allowed.items():
        text = (Path(mlviews.impact.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        assert set(re.findall(r"from mlviews\.impact\.(\w+) import", text)) == lower
