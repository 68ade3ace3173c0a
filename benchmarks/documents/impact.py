"""What levels cost: records of ``benchmarks/impact.py``, ``benchmarks/mi.py`` and ``mlviews impact``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from documents.common import Record, captioned, markdown, provenance, table, threads, with_range

REMEDIES = {
    "walker": "as in the paper",
    "walker-2-processes": "as in the paper, 2 processes",
    "walker-diverse": "directions=4",
    "walker-norm": "keep_norm=True",
    "walker-diverse-norm": "both",
    "walker-joint": "both, levels 1–3 together",
}

COLLECTED = "; its cells were measured by the same command without `--collect`, a process for each method."


@table("mi")
def mutual_information(record: Record) -> str:
    """The estimate beside the truth, where that is known."""
    rows = []
    for row in record["rows"]:
        truth, runs = row["truth"], row["runs"]
        nats = [run["nats"] for run in runs]
        mean = statistics.mean(nats)
        excess = max((run["nats"] - truth) / run["stderr"] for run in runs)
        rows.append([
            row["case"] + ("" if row["required"] else " (limit)"),
            f"{truth:g}",
            f"{mean:.3f} ({min(nats):.3f}–{max(nats):.3f})",
            f"{max(run['stderr'] for run in runs):.3f}",
            f"{mean / truth - 1:+.1%}",
            f"{excess:+.1f}",
        ])  # fmt: skip
    header = [
        "pairs", "truth, nats", "estimate, nats", "standard error", "error of the mean",
        "largest excess, standard errors",
    ]  # fmt: skip
    ratios = [run["nats"] / row["truth"] for row in record["rows"] for run in row["runs"]]
    near = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    seconds = [run["cpu_seconds"] for row in record["rows"] for run in row["runs"]]
    return captioned(
        markdown(header, rows),
        f"{record['pairs']:,} pairs (the generator's images: as many again to evaluate on); mean (range) of "
        f"{len(record['seeds'])} seeds, the largest of their standard errors.",
        f"Mean within 10% of the truth, and no seed above it by more than two standard errors: "
        f"{sum(row['met'] for row in record['rows'])} of {len(record['rows'])} rows; single estimates "
        f"within 10%: {near} of {len(ratios)}.",
        "Rows marked (limit) were set apart after trials missed there.",
        f"{min(seconds):.0f}–{max(seconds):.0f} s of one core each, on {record['machine']['processor']}.",
        provenance(record),
    )


@table("impact")
def impact(record: Record) -> str:
    """Table 1 of the paper for the bundled generators, by both methods."""
    groups = _by_generator_and_method(record)
    rows = []
    for (name, method), cells in groups.items():
        for level in _levels(cells):  # the same level's row of every seed
            reached = "" if all(row["status"] != "under-used" for row in level) else "≥ "
            sigmas = [row["sigma"] for row in level if row["sigma"] is not None]
            same_class = [row["class_kept"] for row in level if "class_kept" in row]
            rows.append([
                f"`{name}`, {method}, {_title(level)}",
                _over_seeds(level, "loss_nats"),
                reached + _over_seeds(level, "distance_mean"),
                _over_seeds(level, "distance_std"),
                reached + _over_seeds(level, "distance_relative"),
                with_range(sigmas, ".3g") if sigmas else "",
                _shares(same_class) if same_class else "",
                _verdicts(level),
            ])  # fmt: skip
    header = [
        "level", "loss, nats", "distance", "its std", "of two draws' distance", "σ", "class kept", "verdict",
    ]  # fmt: skip
    first = record["cells"][0]
    seeds = ", ".join(f"`{name}`, {method}: {len(cells)}" for (name, method), cells in groups.items())
    return captioned(
        markdown(header, rows),
        f"Mean (range) over seeds ({seeds}).",
        f"Target {first['target_loss']:g} nats (1.00 on the scale of the paper's code), K = "
        f"{first['pairs']}, {first['options']['monte_carlo']:,} anchors for the distances.",
        "Class kept: share of 2,000 pairs, by a classifier trained on real images.",
        f"≥: the target was not reached. {record['machine']['processor']}.",
        provenance(record, note=COLLECTED if "--collect" in record["command"] else "."),
    )


@table("impact-sweep")
def impact_sweep(record: Record) -> str:
    """The sweep of the bundled GAN, after its second training."""
    return impact(record)


@table("impact", generators=["fashion"])
def impact_fashion(record: Record) -> str:
    """Table 1 in short, for one generator."""
    groups = _by_generator_and_method(record)
    swept, walked = (list(_levels(groups["fashion", method])) for method in ("sweep", "walker"))
    rows = []
    for sweep, walker in zip(swept, walked, strict=True):
        rows.append([
            _title(sweep),
            _over_seeds(sweep, "distance_mean"),
            _over_seeds(sweep, "distance_relative"),
            f"{statistics.mean(row['class_kept'] for row in sweep):.0%}",
            _verdicts(sweep),
            _over_seeds(walker, "distance_mean"),
        ])  # fmt: skip
    header = [
        "level of `fashion`", "distance for 0.7 nats, sweep", "of two draws' distance", "class kept",
        "verdict", "distance, walkers",
    ]  # fmt: skip
    losses = [statistics.mean(row["loss_nats"] for row in level) for level in walked]
    return captioned(
        markdown(header, rows),
        f"Mean (range) over {len(groups['fashion', 'sweep'])} seeds.",
        f"Walkers end at lower losses, {min(losses):.2f} to {max(losses):.2f} nats on fresh pairs.",
        provenance(record),
    )


@table("impact", "fashion-sweep")
def impact_agreement(record: Record, alone: Record) -> str:
    """How far the two methods agree, and what they cost."""
    groups = _by_generator_and_method(record)
    rows = []
    for name, agreement in record["agreement"].items():
        keys = ("between methods", "sweep with the level", "walker with the level")
        minutes = [[cell["seconds"] / 60 for cell in groups[name, method]] for method in ("sweep", "walker")]
        correlations = [f"{agreement[key]:.2f}" for key in keys]
        rows.append([f"`{name}`", *correlations, *(with_range(values, ".1f") for values in minutes)])
    header = [
        "generator", "rank correlation of the methods", "sweep with the level", "walker with the level",
        "sweep, min", "walker, min",
    ]  # fmt: skip
    return captioned(
        markdown(header, rows),
        "Spearman's, of the levels' mean distances, averaged over seeds; levels that never reached the "
        "target rank as the farthest, and equal.",
        "Minutes of wall time for all levels, mean (range) over seeds, with one thread, beside one to four "
        "other busy processes on a shared machine of two cores.",
        f"Alone, with {alone['environment']['machine']['threads']} threads: the sweep of "
        f"`{alone['generator']}` in **{alone['seconds'] / 60:.1f} min** (`mlviews impact fashion`).",
    )


@table("impact-diffusion")
def impact_diffusion(record: Record) -> str:
    """Table 1 for the steps of the bundled diffusion model."""
    cells = record["cells"]
    ceiling = cells[0]["rows"][0]["mi_ceiling_nats"]
    curves = list(zip(*(cell["curves"] for cell in cells), strict=True))  # the same level's of every seed
    rows = []
    for level, level_curves in zip(_levels(cells), curves, strict=True):
        rates = [row["sigma"] / math.hypot(1, row["sigma"]) for row in level if row["sigma"] is not None]
        reached = "" if all(row["status"] == "reached" for row in level) else "≥ "
        lowest = level_curves[0]["magnitudes"][0]  # of the grid
        at_most = (
            "≤ " if any(row["sigma"] is not None and row["sigma"] <= 1.001 * lowest for row in level) else ""
        )
        rows.append([
            _title(level),
            with_range([curve["resample"] for curve in level_curves], ".2f"),
            with_range([max(0.0, ceiling - curve["resample"]) for curve in level_curves], ".2f"),
            at_most + with_range(rates, ".2f") if rates else "",
            reached + _over_seeds(level, "distance_relative"),
            _verdicts(level),
        ])  # fmt: skip
    header = [
        "step's noise", "loss drawn afresh, nats", "information left, nats", "rate for 0.7 nats",
        "its distance, of two draws'", "verdict",
    ]  # fmt: skip
    first = cells[0]
    options = first["options"]
    return captioned(
        markdown(header, rows),
        f"Mean (range) of {len(cells)} seed(s); critics trained for {options['steps']} steps with "
        f"K = {options['train_pairs']}, and evaluated on {options['evaluations']} batches of "
        f"K = {first['pairs']}.",
        f"Information left: the bound log(2K − 1) − loss, at least 0 and at most {ceiling:.2f}.",
        provenance(record),
    )


@table("impact-semafo")
def impact_semafo(record: Record) -> str:
    """Table 1 for the levels of the bundled SemafoVAE."""
    cells = record["cells"]
    ceiling = cells[0]["rows"][0]["mi_ceiling_nats"]
    curves = list(zip(*(cell["curves"] for cell in cells), strict=True))  # the same level's of every seed
    rows = []
    for level, level_curves in zip(_levels(cells), curves, strict=True):
        reached = "" if all(row["status"] != "under-used" for row in level) else "≥ "
        sigmas = [row["sigma"] for row in level if row["sigma"] is not None]
        same_class = [row["class_kept"] for row in level if "class_kept" in row]
        lowest = level_curves[0]["magnitudes"][0]  # of the grid
        at_most = "≤ " if any(sigma <= 1.001 * lowest for sigma in sigmas) else ""
        rows.append([
            _title(level),
            _over_seeds(level, "loss_nats"),
            at_most + reached + _over_seeds(level, "distance_relative"),
            at_most + with_range(sigmas, ".2f") if sigmas else "drawn afresh",
            _shares(same_class) if same_class else "",
            with_range([max(0.0, ceiling - curve["resample"]) for curve in level_curves], ".2f"),
            _verdicts(level),
        ])  # fmt: skip
    header = [
        "level", "loss, nats", "distance, of two draws'", "σ", "class kept",
        "information left when drawn afresh, nats", "verdict",
    ]  # fmt: skip
    first = cells[0]
    options = first["options"]
    return captioned(
        markdown(header, rows),
        f"Mean (range) of {len(cells)} seed(s); target {first['target_loss']:g} nats; critics trained for "
        f"{options['steps']} steps with K = {options['train_pairs']}, and evaluated on "
        f"{options['evaluations']} batches of K = {first['pairs']}. The views of a pair share their label.",
        f"Information left: the bound log(2K − 1) − loss, at least 0 and at most {ceiling:.2f}.",
        provenance(record),
    )


@table("impact-remedies", "impact", generators=["fashion"])
def impact_remedies(remedies: Record, plain: Record) -> str:
    """Walkers of one level, with and without the remedies for their two flaws."""
    cells = {
        cell["method"]: cell
        for cell in [*remedies["cells"], *plain["cells"]]
        if cell["generator"] == "fashion" and cell["seed"] == 0
    }
    rows = []
    for method, title in REMEDIES.items():
        row = next(row for row in cells[method]["rows"] if row["level"] in ("1", "1:4"))
        rows.append([
            title,
            f"{row['loss_nats']:.2f} ± {row['loss_stderr']:.2f}",
            f"{row['distance_mean']:.2f} ± {row['distance_std']:.2f}",
            f"{row['distance_relative']:.2f}",
            f"{1 - row['diversity']:.2f}",
            f"{row['directions']:.1f}",
            f"{row['norm_ratio']:.2f}",
            f"{row['class_kept']:.0%}",
        ])  # fmt: skip
    header = [
        "walker", "loss, nats", "distance", "of two draws'", "length of the mean direction", "directions",
        "norm ratio", "class kept",
    ]  # fmt: skip
    return captioned(markdown(header, rows), "`fashion`, level 1, seed 0.", provenance(remedies))


@table("impact-drawn")
def impact_drawn(record: Record) -> str:
    """A walker that draws: the whole of it, and each of its levels."""
    (cell,) = record["cells"]
    (row,) = cell["rows"]
    levels = row["by_level"]
    rows = [
        [
            f"{level['level']}",
            f"{level['distance_relative']:.2f}",
            f"{level['directions']:.1f}",
            str(level["scalars"]),
        ]
        for level in levels
    ]
    scalars = sum(level["scalars"] for level in levels)
    rows.append(["together", f"{row['distance_relative']:.2f}", f"{row['directions']:.1f}", str(scalars)])
    share = f"class kept: {row['class_kept']:.0%}. " if "class_kept" in row else ""
    return captioned(
        markdown(["level", "distance, of two draws'", "directions", "scalars"], rows),
        f"`fashion`, seed {cell['seed']}: {row['loss_nats']:.2f} ± {row['loss_stderr']:.2f} nats on fresh "
        f"pairs (target {cell['target_loss']:g}); norm ratio {row['norm_ratio']:.2f}, length of the mean "
        f"direction {1 - row['diversity']:.2f}; {share}"
        f"{cell['seconds'] / 60:.0f} min with {threads(record)}, beside other busy processes.",
        provenance(record),
    )


def _by_generator_and_method(record: Record) -> dict[tuple[str, str], list[Record]]:
    """Return the cells of each generator and method, one a seed."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["generator"], cell["method"]), []).append(cell)
    return groups


def _levels(cells: Sequence[Record]) -> Iterable[tuple[Record, ...]]:
    """Return the rows of each level, one a seed."""
    return zip(*(cell["rows"] for cell in cells), strict=True)


def _title(level: Sequence[Record]) -> str:
    """Return a level's index and name."""
    return f"{level[0]['level']} ({level[0]['name']})"


def _over_seeds(level: Sequence[Record], key: str) -> str:
    """Return mean and range of a figure, to three digits."""
    return with_range([row[key] for row in level], ".3g")


def _verdicts(level: Sequence[Record]) -> str:
    """Return the verdicts of all seeds, each once."""
    return ", ".join(dict.fromkeys(row["verdict"] for row in level))


def _shares(values: Sequence[float]) -> str:
    """Return mean and range of shares, in percent."""
    return f"{statistics.mean(values):.0%} ({min(values):.0%}–{max(values):.0%})"
