"""A measurement's main figures as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def summary(report: dict[str, Any]) -> list[Table]:
    """Return the report's main figures as tables."""
    tables = [
        _fidelity_table(report["fidelity"]),
        _level_table(report["levels"]["table"]),
        _memorisation_table(report["memorisation"]),
    ]
    if "likelihood" in report:
        tables.append(_likelihood_table(report["likelihood"]))
    return tables


def _fidelity_table(fidelity: dict[str, Any]) -> Table:
    """Return a row for each set of images."""
    table = Table("images", "confidence", "entropy", "Fréchet to train", "to test", title="Fidelity")
    for name, row in fidelity.items():
        keys = ("frechet_to_train", "frechet_to_test")
        distances = [f"{row[key]:.3f}" if key in row else "" for key in keys]
        table.add_row(
            name, f"{row['confidence']:.3f}", f"{row['entropy_of_mean_prediction']:.4f}", *distances
        )
    return table


def _level_table(levels: list[dict[str, Any]]) -> Table:
    """Return a row for each set of levels that is moved."""
    kinds = [kind for kind in ("normal", "resample") if kind in levels[0]]
    titles = [f"{figure}: {kind}" for figure in ("class kept", "pixel change") for kind in kinds]
    table = Table("level", *titles, title="Levels")
    for row in levels:
        shares = [f"{row[kind]['class_kept']:.1%}" for kind in kinds]
        changes = [f"{row[kind]['pixel_change']:.4f}" for kind in kinds]
        table.add_row(f"{row['level']} ({row['name']})", *shares, *changes)
    return table


def _memorisation_table(memorisation: dict[str, Any]) -> Table:
    """Return the quantiles of the distances, and their ratios."""
    table = Table("distance to nearest training image", "mean", "1 %", "5 %", "median", title="Memorisation")
    for name in ("samples", "test", "ratio"):
        figures = memorisation[name]
        keys = ("mean", "quantile_01", "quantile_05", "median")
        table.add_row(name, *(f"{figures[key]:.3f}" for key in keys))
    return table


def _likelihood_table(likelihood: dict[str, Any]) -> Table:
    """Return the bound and the errors of the reconstructions, in one row."""
    title = "Likelihood, and reconstruction of real test images"
    table = Table("bits per dimension", "error (MSE)", "PSNR, dB", title=title)
    errors = likelihood["reconstruction"]
    bits = likelihood["bits_per_dimension"]
    table.add_row(f"{bits:.3f}", f"{errors['mse']:.5f}", f"{errors['psnr']:.1f}")
    return table
