"""Tables of the page of latents: purification under attack."""

from __future__ import annotations

from documents.common import Record, captioned, markdown, provenance, table


@table("purify")
def purify_radii(record: Record) -> str:
    """Return accuracy under all attacks by radius, a table for each norm."""
    tables = []
    for norm, radii in record["radii"].items():
        rows = [row for row in record["rows"] if row["norm"] == norm and row["attack"].startswith("all")]
        header = ["defence", "judged by", "clean", *(_radius(norm, radius) for radius in radii)]
        lines = []
        for row in rows:
            judges = {"majority": "majority", "worst": "worst draw"}
            if row["worst"] == row["majority"]:  # nothing is drawn
                judges = {"majority": ""}
            if row["attack"] != "all":
                judges = {"majority": "known seed"}
            for kind, judge in judges.items():
                lines.append([row["defence"], judge, *map(_with_bounds, row[kind])])
        tables.append(markdown(header, lines))
    budget = record["budget"]
    return captioned(
        "\n\n".join(tables),
        f"Percent of {budget['images']} real test images that are classified right under all attacks that "
        "were run, with Wilson's 95 % interval.",
        f"APGD: {budget['steps']} steps of {budget['draws']} draws; {budget['samples']} copies of an image; "
        f"{budget['seeds']} fresh draws judge; classifiers trained on {budget['train']:,} images.",
        provenance(record, note=" (without `--collect` it measures)."),
    )


@table("purify")
def purify_attacks(record: Record) -> str:
    """Return the accuracy under every attack, at the middle radius of each norm; judged by majority."""
    middle = 1 + len(record["radii"]["L2"]) // 2
    attacks = list(dict.fromkeys(row["attack"] for row in record["rows"]))
    lines = []
    for defence in dict.fromkeys(row["defence"] for row in record["rows"]):
        for norm, radii in record["radii"].items():
            figures = {
                row["attack"]: row["majority"][middle]["mean"]
                for row in record["rows"]
                if (row["defence"], row["norm"]) == (defence, norm)
            }
            if figures:
                cells = [f"{figures[attack]:.0f}" if attack in figures else "" for attack in attacks]
                lines.append([defence, _radius(norm, radii[middle - 1]), *cells])
    return markdown(["defence", "radius", *attacks], lines)


def _radius(norm: str, radius: float) -> str:
    return f"{norm} {radius:g}" if norm == "L2" else f"{norm} {radius * 255:.0f}/255"


def _with_bounds(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.0f} ({figure['low']:.0f}–{figure['high']:.0f})"
