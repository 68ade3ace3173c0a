"""What real anchors gain and cost: records of ``real_anchors.py`` and ``anchors_cost.py``."""

from __future__ import annotations

from record import with_interval

from documents.common import Record, captioned, markdown, provenance, table, threads


@table("real-anchors")
def real_anchors(record: Record) -> str:
    """Encoders trained on real images with generated positives, beside those trained on real images only."""
    rows = [
        [
            f"{row['images']:,}",
            row["arm"],
            str(row["seeds"]),
            with_interval(row["scores"]["linear 100%"]),
            with_interval(row["scores"]["kNN"]),
        ]
        for row in record["rows"]
    ]
    return captioned(
        markdown(["own images", "views", "seeds", "linear", "kNN"], rows),
        f"Accuracy in % on 10,000 real test images of encoders trained by SimCLR for {record['steps']} steps "
        f"of {record['batch_size']} pairs; mean ± half of the 95% interval over the seeds.",
        f"Probes are fitted on 10,000 labeled images. {threads(record)} a cell.",
        provenance(record),
    )


@table("real-anchors")
def real_anchors_differences(record: Record) -> str:
    """Every arm with generated positives, less the best real one and the best drawn one, seed by seed."""
    rows = [
        [
            f"{row['images']:,}",
            f"{row['of']} − {row['less']}",
            with_interval(row["scores"]["linear 100%"], sign="+"),
            with_interval(row["scores"]["kNN"], sign="+"),
        ]
        for row in record["differences"]
        if row["seeds"] > 1
    ]
    return captioned(
        markdown(["own images", "difference at the same seed", "linear", "kNN"], rows),
        "Points, mean ± half of the 95% interval over seeds. Subtracted is the arm of real views only, or of "
        "drawn anchors, that is the best by kNN.",
    )


@table("anchors-cost")
def anchors_cost(record: Record) -> str:
    """Time and memory of a step with the user's own images, and what is on disk."""
    rows = [
        [
            row["arm"],
            f"{row['milliseconds']['wall']['median']:.0f}",
            f"{row['milliseconds']['cpu']['median']:.0f}",
            "" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}",
        ]
        for row in record["rows"]
    ]
    return captioned(
        markdown(["a step's pairs", "ms", "ms of this process' CPU", "MB"], rows),
        f"{record['batch_size']} pairs of {record['images']} images at 32 pixels, crop and flip; median of "
        f"{record['turns']} turns of {record['steps']} steps. The last row is the training step itself, of "
        "the encoder of the probes. MB: the peak of a process above what it has once the source is made, "
        "with its workers. Before the first batch of the refined arm, refinement takes "
        f"{record['milliseconds_to_refine_an_image']:.0f} ms an image, "
        "once.",
        f"{threads(record)}; {record['shared']}.",
        provenance(record),
    )


@table("anchors-cost")
def anchors_disk(record: Record) -> str:
    """Bytes on disk for 60,000 images, beside what systems that write candidates would take at this size."""
    count = 60_000
    size = record["bytes"]
    rows = [
        ["the images themselves (PNG)", f"{size['image']:.0f}", f"{size['image'] * count / 1e6:.1f}"],
        ["mlviews, positives made at every step", "0", "0.0"],
        ["mlviews, latents of `fashion` kept", f"{size['codes']:.0f}", f"{size['codes'] * count / 1e6:.1f}"],
    ]
    for name, candidates in size["candidates"].items():
        total = candidates * size["positive"]
        plural = "s" * (candidates > 1)
        rows.append(
            [
                f"{candidates} candidate{plural} an image, as {name}",
                f"{total:.0f}",
                f"{total * count / 1e6:.1f}",
            ]
        )
    return captioned(
        markdown(["on disk", "bytes an image", "MB for 60,000 images"], rows),
        f"Candidates are PNG files of {size['positive']:.0f} bytes, as exported positives take. The "
        "published systems write them at 32 to 512 pixels in color; their numbers of candidates are those of "
        "their code.",
        provenance(record),
    )


@table("unseen")
def unseen_generators(record: Record) -> str:
    """Reconstructions of real images of classes that a generator saw, and of those that it did not."""
    rows = [
        [
            facts["generator"],
            f"{facts['images']:,}",
            *(f"{error / 1000:.4f}" for error in facts["scores"].values()),
        ]
        for facts in record["generators"]
    ]
    first, second = record["generators"][0]["shown"]
    return captioned(
        markdown(["NVAE trained on", "images", *_groups(record)], rows),
        "Mean squared error of 10,000 real test images, encoded and decoded, over the 28×28 real pixels. "
        f"Both networks are `nvae` of the zoo: {first:,} images were shown, and {second:,} in the second "
        "training.",
        provenance(record),
    )


@table("unseen")
def unseen_classes(record: Record) -> str:
    """Encoders trained on real images, of which the generator saw eight of ten classes, or all."""
    rows = [
        [row["arm"], *(with_interval(score) for score in row["scores"].values())] for row in record["rows"]
    ]
    seeds = record["rows"][0]["scores"]["kNN all"]["seeds"]
    return captioned(
        markdown(["views", *_probes(record)], rows),
        f"Accuracy in % on 10,000 real test images of encoders trained by SimCLR for {record['steps']} steps "
        f"of {record['batch_size']} pairs of all ten classes, gentle T_x; mean ± half of the 95% interval "
        f"over {seeds} seeds. Probes are fitted on 10,000 labeled images of all classes. {threads(record)} a "
        "cell.",
        provenance(record),
    )


@table("unseen")
def unseen_differences(record: Record) -> str:
    """Differences of those encoders, seed by seed."""
    rows = [
        [
            f"{row['of']} − {row['less']}",
            *(with_interval(score, sign="+") for score in row["scores"].values()),
        ]
        for row in record["differences"]
    ]
    return captioned(
        markdown(["difference at the same seed", *_probes(record)], rows),
        "Points, mean ± half of the 95% interval over seeds.",
    )


def _groups(record: Record) -> list[str]:
    """Return the groups of classes, as the head of a table."""
    return ["all", *(f"{name}, left out" for name in record["left_out"]), "others"]


def _probes(record: Record) -> list[str]:
    """Return the probes and the groups of classes, as the head of a table."""
    return [f"{probe}: {group}" for probe in ("linear", "kNN") for group in _groups(record)]
