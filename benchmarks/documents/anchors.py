"""What real anchors gain: records of ``benchmarks/real_anchors.py``."""

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
            with_interval(row["scores"]["linear 100%"]),
            with_interval(row["scores"]["kNN"]),
        ]
        for row in record["rows"]
    ]
    seeds = record["rows"][0]["seeds"]
    return captioned(
        markdown(["own images", "views", "linear", "kNN"], rows),
        f"Accuracy in % on 10,000 real test images of encoders trained by SimCLR for {record['steps']} steps "
        f"of {record['batch_size']} pairs; mean of {seeds} seeds ± half of the 95% interval.",
        f"Probes are fitted on 10,000 labeled images. {threads(record)} a cell.",
        provenance(record),
    )
