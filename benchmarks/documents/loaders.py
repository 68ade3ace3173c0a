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
            f"`{row['loader']}`",
            _median(row["data_s"], ".0f", 1e3),
            _median(row["training_s"], ".0f", 1e3),
            f"{row['data_share']:.0%}",
            _median(row["step_of_first"], ".2f"),
            f"{row['samples_per_s']:.1f}",
            f"{row['samples_per_s_alone']:,.1f}",
            f"{row['epoch_s'] / 60:.0f}",
            _peak(row),
        ])  # fmt: skip
    header = [
        "images", "batch", "loader", "waiting, ms", "training, ms", "waiting", f"step / {record['first']}'s",
        "samples/s", "the loader alone, samples/s", "epoch, min", "peak, MiB",
    ]  # fmt: skip
    energy = "in the record"
    if record["energy_not_measured"] is not None:
        energy = f"not measured: {record['energy_not_measured']}"
    versions = record["versions"]
    return captioned(
        markdown(header, rows),
        f"Mean of a round's steps, median (range) of {record['rounds']} rounds, in which the loaders take "
        "turns.",
        f"An epoch has {record['epoch']:,} samples.",
        f"{_machine(record)}, {record['workers']} workers; torchvision {versions['torchvision']}, FFCV "
        f"{versions.get('ffcv', 'not installed')}.",
        f"Energy and CO2 {energy}.",
        provenance(record),
    )


@table("loaders")
def loaders_short(record: Record) -> str:
    """Figure 5 at the largest batch."""
    largest = max(row["batch_size"] for row in record["rows"])
    steps = [row for row in record["rows"] if row["batch_size"] == largest]
    rows = []
    for row, disk, unique in zip(steps, record["disk"], record["unique"], strict=True):
        rows.append([
            f"{row['size']} px, `{row['loader']}`",
            f"{row['data_share']:.0%}",
            f"{row['step_of_first']['median']:.2f}",
            f"{row['samples_per_s']:.1f}",
            _peak(row),
            f"{disk['bytes'] / 1e6:,.1f}",
            f"{unique['different'] / unique['images']:.0%}",
        ])  # fmt: skip
    header = [
        "images, loader", "of a step spent waiting", f"step / {record['first']}'s", "samples/s", "peak, MiB",
        "on disk, MB", "of the images of two epochs, distinct",
    ]  # fmt: skip
    return captioned(
        markdown(header, rows),
        f"SimCLR with a ResNet-18, batches of {largest}, {record['images']:,} files; {_machine(record)}.",
        provenance(record),
    )


@table("loaders")
def loaders_storage(record: Record) -> str:
    """Bytes on disk, and how many images differ."""
    rows = []
    for disk, unique in zip(record["disk"], record["unique"], strict=True):
        different = f"{unique['different']:,} of {unique['images']:,}"
        rows.append([f"{disk['size']} px", f"`{disk['loader']}`", f"{disk['bytes'] / 1e6:,.1f}", different])
    header = [
        "images",
        "loader",
        f"MB for {record['images']:,} images",
        "different images in two epochs, looked at",
    ]
    return markdown(header, rows)


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


def _peak(row: Record) -> str:
    """Return MiB of the host's memory, and of the device's where it has its own."""
    return " + ".join(f"{value:,.0f}" for value in row["peak"].values())
