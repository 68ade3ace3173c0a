"""A training step fed by files and by a generator: the record of ``benchmarks/loaders.py``."""

from __future__ import annotations

from documents.common import Record, captioned, markdown, provenance, table, threads


@table("loaders")
def loaders(record: Record) -> str:
    """The paper's figure 5."""
    rows = []
    for row in record["rows"]:
        rows.append([
            f"{row['size']} px",
            str(row["batch_size"]),
            f"`{name_of(row)}`",
            _median(row["data_s"], ".0f", 1e3),
            _median(row["training_s"], ".0f", 1e3),
            f"{row['data_share']:.0%}",
            _median(row["step_of_first"], ".2f"),
            _median(row["cpu_s"], ".0f", 1e3),
            _median(row["cpu_of_first"], ".2f"),
            f"{row['samples_per_s']:.1f}",
            f"{row['samples_per_s_alone']:,.1f}",
            f"{row['epoch_s'] / 60:.0f}",
        ])  # fmt: skip
    header = [
        "images", "batch", "loader", "waiting, ms", "training, ms", "waiting", f"step / {record['first']}'s",
        "CPU, ms", f"CPU / {record['first']}'s", "samples/s", "the loader alone, samples/s", "epoch, min",
    ]  # fmt: skip
    energy = "in the record"
    if record["energy_not_measured"] is not None:
        energy = f"not measured: {record['energy_not_measured']}"
    versions = record["versions"]
    return captioned(
        markdown(header, rows),
        f"Mean of a round's steps, median (range) of {record['rounds']} rounds, in which the loaders take "
        "turns. CPU: seconds of all processors, workers included. With reuse, the mean of a step that makes "
        "its samples and of steps that show them again.",
        f"An epoch has {record['epoch']:,} samples.",
        f"{_machine(record)}, {record['workers']} workers; torchvision {versions['torchvision']}, FFCV "
        f"{versions.get('ffcv', 'not installed')}.",
        f"Energy and CO2 {energy}.",
        provenance(record),
    )


@table("loaders")
def loaders_short(record: Record) -> str:
    """Figure 5 at the largest batch of each size."""
    facts = {
        (disk["size"], disk["loader"]): (disk, unique)
        for disk, unique in zip(record["disk"], record["unique"], strict=True)
    }
    rows = []
    for row in at_largest_batch(record):
        disk, unique = facts[row["size"], row["loader"]]
        showings = unique["images"] * row.get("reuse", 1)
        rows.append([
            f"{row['size']} px, batch {row['batch_size']}, `{name_of(row)}`",
            f"{row['data_share']:.0%}",
            f"{row['step_of_first']['median']:.2f}",
            f"{row['samples_per_s']:.1f}",
            f"{disk['bytes'] / 1e6:,.1f}",
            f"{unique['different'] / showings:.0%}",
        ])  # fmt: skip
    header = [
        "images, loader", "of a step spent waiting", f"step / {record['first']}'s", "samples/s",
        "on disk, MB", "of the images of two epochs, distinct before T_x",
    ]  # fmt: skip
    return captioned(
        markdown(header, rows),
        f"SimCLR with a ResNet-18, {record['images']:,} files; {_machine(record)}.",
        provenance(record),
    )


@table("loaders")
def loaders_reuse(record: Record) -> str:
    """The reuse that this machine needs."""
    return printed_reuse(record)


@table("loaders")
def loaders_storage(record: Record) -> str:
    """Bytes on disk, peak memory, and how many images differ."""
    rows = []
    for disk, unique in zip(record["disk"], record["unique"], strict=True):
        different = f"{unique['different']:,} of {unique['images']:,}"
        rows.append([
            f"{disk['size']} px, batch {disk['batch_size']}",
            f"`{disk['loader']}`",
            f"{disk['bytes'] / 1e6:,.1f}",
            " + ".join(f"{value:,.0f}" for value in disk["peak"].values()),
            different,
        ])  # fmt: skip
    header = [
        "images",
        "loader",
        f"MB for {record['images']:,} images",
        "peak memory, MiB",
        "different images in two epochs, looked at",
    ]
    return markdown(header, rows)


@table("profile-step")
def profile_step(record: Record) -> str:
    """Parts of a training step, against the rate of a matrix product."""
    fresh = record["median_ms"]["fresh"]
    total = sum(fresh.values())
    rows = []
    for name, ms in sorted(fresh.items(), key=lambda item: -item[1]):
        count = record["gflop"].get(name)
        cells = [name, f"{ms:.1f}", f"{ms / total:.1%}"]
        limit = "" if count is None else f"{count / record['gflop_per_s'] / ms * 1e3:.0%}"
        rows.append([*cells, "" if count is None else f"{count:.1f}", limit])
    data = {name: sum(parts.values()) for name, parts in record["median_ms"].items()}
    data["fresh"] -= fresh["encoder"]
    again = record["median_ms"]["shown again"]
    return captioned(
        markdown(["part of a step", "CPU, ms", "of the step", "GFLOP", "of the limit"], rows),
        f"The limit is torch's product of {record['product']} x {record['product']} matrices: "
        f"{record['gflop_per_s']:.0f} GFLOP a second on one thread.",
        f"The batch costs {data['fresh']:.0f} ms; {data['fresh, whole batch']:.0f} ms if the generator gets "
        f"all of it at once; {data['shown again']:.0f} ms if its samples are shown again, of which T_x "
        f"{again['T_x']:.0f} ms and reading them {again['samples kept']:.0f} ms.",
        f"Median CPU time of {record['turns']} steps of {record['batch_size']} pairs, {threads(record)}; "
        "other jobs ran on the machine, and the kinds of steps took turns.",
        provenance(record),
    )


def at_largest_batch(record: Record) -> list[Record]:
    """Return the rows of the largest batch of each size."""
    largest: dict[int, int] = {}
    for row in record["rows"]:
        largest[row["size"]] = max(row["batch_size"], largest.get(row["size"], 0))
    return [row for row in record["rows"] if row["batch_size"] == largest[row["size"]]]


def name_of(row: Record) -> str:
    """Return a loader's name, with how often a sample is shown if it is more than once."""
    times = row.get("reuse", 1)
    return row["loader"] if times == 1 else f"{row['loader']}, reuse={times}"


def printed_reuse(record: Record) -> str:
    """Return the least reuse with which steps wait for less than the record's share, by size and batch."""
    sentences = []
    for size in dict.fromkeys(row["size"] for row in record["reuse"]):
        rows = [row for row in record["reuse"] if row["size"] == size]
        by_batch = ", ".join(f"{row['reuse'] or 'none'} for batches of {row['batch_size']}" for row in rows)
        enough = all(row["reuse"] for row in rows)
        reuse = f"reuse={max(row['reuse'] for row in rows)}" if enough else "no reuse is enough"
        sentences.append(f"**On this machine, {reuse}** at {size} px ({by_batch}).")
    return (
        f"{' '.join(sentences)} With it, a step waits for no more than {record['waiting']:.0%} of its time."
    )


@table("overhead")
def overhead(record: Record) -> str:
    """Parts of a step."""
    generator = record["median_ms"]["generator"]
    rows = [[name, f"{value:.2f}", f"{value / generator:.1%}"] for name, value in record["median_ms"].items()]
    return captioned(
        markdown(["part of a step", "median, ms", "of the generator"], rows),
        f"All but the generator and T_x: **{record['overhead_of_generator']:.1%}** of the generator's "
        f"forward pass; T_x: {record['t_x_of_generator']:.1%}.",
        f"Preset `{record['preset']}`, batch {record['batch_size']}, {record['steps']} steps, "
        f"{threads(record)}.",
        provenance(record),
    )


def _median(figures: Record, form: str, scale: float = 1.0) -> str:
    """Return ``median (smallest–largest)`` over rounds."""
    median, low, high = (format(scale * value, form) for value in (figures["median"], *figures["range"]))
    return f"{median} ({low}–{high})"


def _machine(record: Record) -> str:
    """Return the device, and the threads of the processor."""
    machine = record["machine"]
    return f"{machine['device'].upper()}, {machine['threads']} threads of {machine['processor']}"
