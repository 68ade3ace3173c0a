"""What measuring a generator's levels returns: the figures with their words, tables, pages and files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlviews.checks import path_of
from mlviews.impact import pages, stored, validity
from mlviews.impact.figures import Curve, Distances, History, LevelImpact, Measurement
from mlviews.perturb import Walker
from mlviews.runs.files import new_files

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

__all__ = ["Curve", "Distances", "History", "ImpactReport", "LevelImpact", "Measurement"]

FORMAT, VERSION = "mlviews.impact", 1
NUMBERS_OR_NONE = ("distance_low", "distance_high", "sigma", "sigma_low", "sigma_high")


@dataclass(frozen=True)
class ImpactReport(Measurement):
    """What :func:`mlviews.measure_impact` returns: Table 1 of the paper for one generator."""

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()

    # -- tables and pages -------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """Return one row per impact, with flat columns that name their units.

        A figure that the method does not have is NaN. A name that a spreadsheet would take for a formula
        begins with an apostrophe.
        """
        import pandas as pd  # half a second that measuring need not wait for

        rows = [row | {"name": _no_formula(row["name"])} for row in self.rows()]
        return pd.DataFrame(rows).astype(dict.fromkeys(NUMBERS_OR_NONE, float))

    def table(self) -> Table:
        """Return the table for a terminal: both ``print`` and a rich console show it."""
        from mlviews.impact.terminal import table  # importing rich takes a number from Python's random state

        return table(self)

    def markdown(self) -> str:
        """Return headline, table, notes and advice as a Markdown document."""
        return pages.markdown(self)

    def latex(self) -> str:
        """Return the table as LaTeX (booktabs), with the columns of the paper's Table 1 first."""
        return pages.latex(self)

    def html(self, pictures: Mapping[Path, str]) -> str:
        """Return the report as one self-contained page.

        Args:
            pictures: the PNG files to embed, with their captions.
        """
        return pages.html(self, pictures)

    # -- files ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> list[Path]:
        """Write the report, each file whole or not at all, and the page last.

        Args:
            folder: the folder for ``impact.json``, ``impact.csv``, ``impact.md``, ``impact.tex``, the
                pictures, ``report.html``, and a ``walker-<levels>.safetensors`` for each walker; it is made
                if it is missing.

        Returns:
            The files' paths, in the order in which they were written.

        Raises:
            ValueError: for a figure that is not finite, or a perturber that cannot be written.
            OSError: if the folder cannot be written to, e.g. as the disk is full.
        """
        from mlviews.impact.plots import draw  # matplotlib takes a second

        folder = path_of(folder, "folder")
        content = self._text()
        with new_files(folder) as part:
            walkers = self._save_walkers(part)
            texts = {
                "impact.json": content,
                "impact.csv": self.frame().to_csv(index=False, lineterminator="\n"),
                "impact.md": self.markdown(),
                "impact.tex": self.latex(),
            }
            pictures = draw(self, part)
            page = {"report.html": self.html(pictures)}
            for file_name, text in {**texts, **page}.items():
                (part / file_name).write_text(text, encoding="utf-8", newline="\n")
            names = [*walkers, *texts, *(picture.name for picture in pictures), *page]
            return [(part / file_name).replace(folder / file_name) for file_name in names]

    def save_figures(self, folder: Path) -> list[Path]:
        """Write what :meth:`load` reads, ``impact.json`` and the walkers, into a folder that is there.

        Raises:
            ValueError, OSError: as :meth:`save`.
        """
        text = self._text()
        names = self._save_walkers(folder)
        (folder / "impact.json").write_text(text, encoding="utf-8", newline="\n")
        return [folder / name for name in [*names, "impact.json"]]

    def _save_walkers(self, folder: Path) -> list[str]:
        """Write each walker into a folder; return the files' names."""
        names = []
        for impact in self.impacts:
            if isinstance(impact.perturber, Walker):
                names.append(impact.specification["path"])
                impact.perturber.save(folder / names[-1])
        return list(dict.fromkeys(names))  # rows of the same levels share a file

    def _text(self) -> str:
        """Return the text of ``impact.json``.

        Raises:
            ValueError: for a figure that is not finite, or a perturber that cannot be written.
        """
        from pydantic import TypeAdapter

        elsewhere: Any = {"grids": True, "impacts": {"__all__": {"perturber"}}}
        figures = TypeAdapter(type(self)).dump_python(self, exclude=elsewhere, warnings=False)
        stored.check_finite(figures, "report")
        for row, impact in zip(figures["impacts"], self.impacts, strict=True):
            row["perturber"] = impact.specification
        content = {"format": FORMAT, "version": VERSION, **figures}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> ImpactReport:
        """Read the report that :meth:`save` wrote, without its grids.

        Args:
            path: the folder, or the ``impact.json`` in it; walkers are read from the files beside it.

        Raises:
            FileNotFoundError: if there is no such file, or a walker's is missing.
            ValueError: if it is damaged, or holds something else.
        """
        path = path_of(path, "report")
        path = path / "impact.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"No impact report {path}.")
        content = _read_json(path)
        try:
            _check_keys(content)
            report = stored.read(cls, content, path.parent, "report")
            validity.check(report)
            return report
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error} Copy it again, or measure again.") from error


def _no_formula(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) else text


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of an ``impact.json`` without its format and version, which must be these."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); give the folder or the impact.json that ImpactReport.save wrote."
        ) from error
    name, version = None, None
    if isinstance(content, dict):
        name, version = content.pop("format", None), content.pop("version", None)
    if (name, version) != (FORMAT, VERSION):
        raise ValueError(
            f"{path} holds {name!r} of version {version!r}, not {FORMAT!r} of version {VERSION}."
        )
    return dict(content)


def _check_keys(content: Mapping[str, Any]) -> None:
    """Raise a ValueError if the report or one of its rows lacks a key, or has one more."""
    names = [field.name for field in dataclasses.fields(Measurement) if field.name != "grids"]
    stored.check_keys(content, names, "report")
    row_names = [field.name for field in dataclasses.fields(LevelImpact)]
    rows = content["impacts"] if isinstance(content["impacts"], list) else []
    for index, row in enumerate(rows):
        if isinstance(row, dict):
            stored.check_keys(row, row_names, f"report.impacts[{index}]")
