"""What only a GPU can show: the record of ``benchmarks/gpu.py``, as soon as there is one."""

from __future__ import annotations

from documents.common import Record, captioned, markdown, provenance, table

ABSENT = "*Not run yet: no GPU was at hand. `python benchmarks/gpu.py` measures it within eight minutes.*"


@table("gpu", absent=ABSENT)
def gpu_checks(record: Record) -> str:
    """Waits for the device, and samples equal to the CPU's."""
    steps = rows_of(record, "device")
    problems = [f"{row['case']}: {row['problem']}" for row in steps if row["problem"]]
    outcome = "; ".join(problems) or "none waited for the device or left it"
    if record["card"]["name"] == "cpu":
        outcome = "the CPU says nothing of waits"
    columns = [f"{part}, {precision}" for part in ("latents", "images") for precision in ("float32", "TF32")]
    rows = [[row["case"], *(f"{row[column]:.1e}" for column in columns)] for row in rows_of(record, "equal")]
    return captioned(
        markdown(["largest difference from the CPU's", *columns], rows),
        f"Steps looked at: {len(steps)}; {outcome}.",
        _card(record),
        _left_out(record, "device", "equal"),
        provenance(record),
    )


@table("gpu", absent=ABSENT)
def gpu_speed(record: Record) -> str:
    """Pairs per second and peak memory of every architecture."""
    rows = []
    for row in (*rows_of(record, "speed"), *rows_of(record, "compiled")):
        rows.append([
            row["network"],
            row["dtype"] + (", compiled" if row["compile"] else ""),
            _number(row, "batch_size", ",.0f"),
            _number(row, "pairs_per_s", ",.0f"),
            _number(row, "peak_mib", ",.0f"),
            row.get("problem", ""),
        ])  # fmt: skip
    header = ["generator, random weights", "precision", "batch", "pairs/s", "peak, MiB", "problem"]
    return captioned(
        markdown(header, rows),
        "A pair's images differ in the finer half of the levels; no T_x.",
        _card(record),
        _left_out(record, "speed", "compiled"),
        provenance(record),
    )


@table("gpu", absent=ABSENT)
def gpu_loaders(record: Record) -> str:
    """Figure 5 with reuse."""
    first = {row["case"]: row for row in rows_of(record, "loaders") if row["loader"] == "torch"}
    rows = []
    for row in rows_of(record, "loaders"):
        reference = first.get(row["case"], {})
        ratio = ""
        if "samples_per_s" in row and "samples_per_s" in reference:
            ratio = f"{reference['samples_per_s'] / row['samples_per_s']:.2f}"
        rows.append([
            row["case"],
            str(row["batch_size"]),
            f"`{row['loader']}`",
            _number(row, "waiting_ms", ",.1f"),
            _number(row, "training_ms", ",.1f"),
            ratio,
            _number(row, "samples_per_s", ",.0f"),
            row.get("problem", ""),
        ])  # fmt: skip
    header = [
        "images", "batch", "loader", "waiting, ms", "training, ms", "step / torch's", "samples/s", "problem",
    ]  # fmt: skip
    return captioned(
        markdown(header, rows),
        "Means of an epoch's steps; waiting and training are timed apart, with a synchronization after each.",
        _card(record),
        _left_out(record, "loaders"),
        provenance(record),
    )


@table("gpu", absent=ABSENT)
def gpu_overlap(record: Record) -> str:
    """Data time that is hidden behind training."""
    rows = []
    for row in rows_of(record, "overlap"):
        alone = row["generating_ms"] + row["training_ms"]
        cells = [row["network"], str(row["batch_size"])]
        cells += [_number(row, name, ",.1f") for name in ("generating_ms", "training_ms")]
        for name in ("one_stream_ms", "two_streams_ms"):
            hidden = ""
            if name in row:
                hidden = f"{row[name]:,.1f} ({(alone - row[name]) / row['generating_ms']:.0%} hidden)"
            cells.append(hidden)
        rows.append(cells)
    header = ["images", "batch", "generating alone, ms", "training alone, ms", "one stream, ms", "two, ms"]
    return captioned(
        markdown(header, rows),
        "Milliseconds of a step, with no synchronization in between; hidden: of the generator's time.",
        _card(record),
        _left_out(record, "overlap"),
        provenance(record),
    )


def rows_of(record: Record, section: str) -> list[Record]:
    """Return a section's rows; none if it was not run."""
    rows: list[Record] = record.get(section, {}).get("rows", [])
    return rows


def _number(row: Record, name: str, form: str) -> str:
    """Return a figure in a format; nothing if it was not measured."""
    return format(row[name], form) if name in row else ""


def _card(record: Record) -> str:
    """Return the sentence that says what was measured on."""
    facts, versions = record["card"], record["versions"]
    memory = f", {facts['memory_mib']:,} MiB" if "memory_mib" in facts else ""
    return f"{facts['name']}{memory}; torch {versions['torch']}."


def _left_out(record: Record, *sections: str) -> str:
    """Return the sentence that says what there was no time for."""
    names = [name for section in sections for name in record.get(section, {}).get("left_out", [])]
    return f"Left out: {'; '.join(names)}." if names else "Nothing was left out."
