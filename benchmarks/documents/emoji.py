"""Views compared on color images: the record of ``emoji_views.py``."""

from __future__ import annotations

from record import with_interval

from documents.common import Record, captioned, markdown, provenance, table, threads
from documents.views import differences_table, scores_table


@table("emoji")
def emoji(record: Record) -> str:
    """Encoders trained on each source of views, with each T_x."""
    images = record["manifest"]["images"]
    emoji_count = record["manifest"]["emoji"]
    tested = images["test"]
    largest = max(tested, key=tested.__getitem__)
    queries = sum(tested.values())
    hours = sum(sum(cell["seconds"].values()) for cell in record["cells"]) / 3600
    return captioned(
        scores_table(record, *dict.fromkeys(row["group"] for row in record["summary"]["rows"])),
        f"Percent on {queries:,} pictures of {emoji_count['test']} held-out emoji, mean ± half of the 95 % "
        f"interval over seeds (Student's t). Groups: {len(tested)}; the largest has "
        f"{100 * tested[largest] / queries:.0f} % of the test pictures, and chance is "
        f"{100 / len(tested):.0f} % of the balanced accuracy, the mean over groups. Probes are fitted on all "
        f"{record['labels']:,} training pictures. Retrieval: the {3 * queries // 4:,} pictures of the other "
        "three vendors, three of which are right.",
        f"SimCLR, {record['steps']} steps of {record['batch_size']} pairs; `reuse={record['reuse']}` for "
        'generated views; T_x "crop": crop and flip, "full": color jitter and grayscale too. '
        f"All cells: {hours:.1f} hours of {threads(record)}, beside other jobs.",
        provenance(record),
    )


@table("emoji")
def emoji_short(record: Record) -> str:
    """Real and multi-level views, with and without color in T_x."""
    scores = {row["source"]: row["scores"] for row in record["summary"]["rows"]}
    names = {"linear, balanced": "groups", "recall@1": "same emoji"}
    labels = {"real": "real images", "ML random": "multi-level random"}
    rows = [
        [
            label,
            *(
                with_interval(scores[f"{views}, {transform}"][key])
                for key in names
                for transform in ("crop", "full")
            ),
        ]
        for views, label in labels.items()
    ]
    header = [f"{title}, {how}" for title in names.values() for how in ("crop and flip", "color too")]
    untrained = scores["untrained encoder"]
    return captioned(
        markdown(["views", *header], rows),
        "Emoji as four vendors draw them, held out by emoji; percent, mean ± half of the 95 % interval over "
        f"{record['seeds']} seeds, SimCLR, {record['steps']} steps of {record['batch_size']} pairs. Groups: "
        "balanced accuracy of a linear probe. Same emoji: the nearest picture of another vendor is the same "
        f"emoji. An untrained encoder has {untrained['linear, balanced']['mean']:.1f} and "
        f"{untrained['recall@1']['mean']:.1f}.",
        provenance(record),
    )


@table("emoji")
def emoji_differences(record: Record) -> str:
    """Paired differences."""
    return differences_table(record)


@table("emoji")
def emoji_generator(record: Record) -> str:
    """The levels of the generator, and how good it is."""
    rows = [
        [
            f"{row['level']} ({row['name']})",
            f"{row['distance_mean']:.3g}",
            f"{row['distance_relative']:.3g}",
            "drawn anew" if row["sigma"] is None else f"{row['sigma']:.2f}",
        ]
        for row in record["levels"]
    ]
    facts = record["generator"]
    frechet, samples, test = facts["frechet"], facts["nearest"]["samples"], facts["nearest"]["test"]
    return captioned(
        markdown(["level", "distance for 0.7 nats", "of two draws' distance", 'std of "ML matched"'], rows),
        f"One seed of the short sweep. Fréchet distance of as many samples as there are training images from "
        f"these, in the features of an encoder trained on real images: {frechet['samples']:.1f}; of one half "
        f"of the training emoji from the other: {frechet['halves']:.1f}. Median distance to the nearest "
        f"training image: {samples['median']:.2f} of samples, {test['median']:.2f} of held-out emoji; the "
        f"closest 5 %: {samples['quantile_05']:.2f} and {test['quantile_05']:.2f}.",
        f"{facts['provenance']['images']:,} images shown; SHA-256 of the weights: `{facts['sha256']}`.",
    )
