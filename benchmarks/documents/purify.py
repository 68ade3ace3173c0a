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
        f"APGD: {budget['steps']} steps of {budget['draws']} draws; Square: {budget['queries']} queries; "
        f"{budget['samples']} copies of an image; {budget['seeds']} fresh draws judge; classifiers trained "
        f"on {budget['train']:,} images, {budget['epochs']} epochs.",
        provenance(record, note=" (without `--collect` it measures)."),
    )


@table("purify")
def purify_attacks(record: Record) -> str:
    """Return the accuracy under every attack, at the second radius of each norm; judged by majority."""
    attacks = list(dict.fromkeys(row["attack"] for row in record["rows"]))
    attacks.sort(key=lambda attack: ("known" in attack, attack.startswith("all")))
    tables = []
    for norm, radii in record["radii"].items():
        rows = {
            (row["defence"], row["attack"]): row["majority"] for row in record["rows"] if row["norm"] == norm
        }
        lines = []
        for defence in dict.fromkeys(defence for defence, _ in rows):
            columns = [rows.get((defence, attack), []) for attack in attacks]
            lines.append(
                [defence, *(f"{figures[2]['mean']:.0f}" if figures[2:] else "" for figures in columns)]
            )
        tables.append(markdown([_radius(norm, radii[1]), *attacks], lines))
    return "\n\n".join(tables)


@table("purify")
def purify_seconds(record: Record) -> str:
    """Return the processor's seconds that every attack took, all radii of both norms together."""
    seconds: dict[str, dict[str, float]] = {}
    for cell, value in record["seconds"].items():
        defence, _, attack = cell.split(" / ")
        row = seconds.setdefault(defence, {})
        row[attack] = row.get(attack, 0) + value
    attacks = list(dict.fromkeys(attack for row in seconds.values() for attack in row))
    lines = [
        [defence, *(f"{row[attack]:.0f}" if attack in row else "" for attack in attacks)]
        for defence, row in seconds.items()
    ]
    return markdown(["seconds", *attacks], lines)


def _radius(norm: str, radius: float) -> str:
    return f"{norm} {radius:g}" if norm == "L2" else f"{norm} {radius * 255:.0f}/255"


def _with_bounds(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.0f} ({figure['low']:.0f}–{figure['high']:.0f})"
