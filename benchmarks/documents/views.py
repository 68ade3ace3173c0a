"""Views compared by what an encoder learns from them: records of ``mlviews probe`` and the like."""

from __future__ import annotations

from collections.abc import Collection

from record import SCORES, intervals, paired_differences, with_interval

from documents.common import Record, captioned, markdown, provenance, table, with_range

METHODS = {"simclr": "SimCLR", "simsiam": "SimSiam", "byol": "BYOL"}
TELLING = {
    "raw pixels": "no encoder: raw pixels",
    "untrained encoder": "none: untrained encoder",
    "real, gentle": "real images",
    "none, gentle": "generated, no latent moved",
    "single random, gentle": "single-latent random",
    "ML random, gentle": "**multi-level random**",
}
MEASURES = " (without `--collect` it measures)."


@table("probe/demo-slice-seed0", "probe/full-seed0", "probe/full-seed1", "probe/full-seed2")
def probe(demo: Record, *runs: Record) -> str:
    """Linear probes and kNN of the demo's encoder, over seeds."""
    first = runs[0]
    shares = first["scores"]["raw pixels"]["linear"]
    rows = []
    for name in first["scores"]:
        scores = [run["scores"][name] for run in runs]
        linear = [with_range([score["linear"][share] for score in scores], ".1f") for share in shares]
        rows.append([name, *linear, with_range([score["knn"] for score in scores], ".1f")])
    header = ["features", *(f"linear, {float(share):.0%} of labels" for share in shares), "kNN"]

    training, seconds = first["training"], [run["seconds"]["training"] for run in runs]
    trained, untrained = (demo["scores"][name] for name in ("encoder trained on views", "untrained encoder"))
    return captioned(
        markdown(header, rows),
        f"Top-1 in percent on {first['test_images']:,} real Fashion-MNIST test images, mean (range) of "
        f"{len(runs)} seeds; {first['probe_images']:,} labelled training images for the probes.",
        f"{training['method']}, preset `{first['preset']}`, {training['steps']:,} steps of "
        f"{training['batch_size']} pairs, {first['encoder_parameters'] / 1e6:.1f} M-parameter encoder; "
        f"{min(seconds):.0f}–{max(seconds):.0f} s of training with "
        f"{first['machine']['threads']} thread(s) on {first['machine']['processor']}.",
        "The generator learned from the 60,000 training images, without labels; the encoder saw none of "
        "them.",
        provenance(first),
        f"`{demo['command']}` (preset `{demo['preset']}`, {demo['training']['steps']:,} steps), with the "
        f"bundled slice ({demo['probe_images']:,} images to fit, "
        f"{demo['test_images']:,} to test) and {demo['machine']['threads']} threads: linear "
        f"{trained['linear']['1']:.1f}, kNN {trained['knn']:.1f}, untrained {untrained['linear']['1']:.1f} "
        f"and {untrained['knn']:.1f}, after {demo['seconds']['all']:.0f} s.",
    )


@table("second/probe", "probe", generators=())
def views_second(second: Record, first: Record) -> str:
    """The same presets by the first and the second weights of the bundled GAN."""
    scores = ("linear 100%", "kNN")
    before = {(row["method"], row["source"]): row["scores"] for row in first["summary"]["rows"]}
    rows = []
    for row in second["summary"]["rows"]:
        key = row["method"], row["source"]
        cells = [row["source"], row["transform"]]
        for score in scores:
            measured = with_interval(row["scores"][score])
            if key in before:
                change = with_interval(_change(second, first, key, score), sign="+")
                cells += [with_interval(before[key][score]), measured, change]
            else:
                cells += ["", measured, ""]
        rows.append(cells)
    columns = [f"{score}: {column}" for score in scores for column in ("first weights", "second", "change")]
    return captioned(
        markdown(["views", "T_x", *columns], rows),
        f"SimCLR, {second['steps']:,} steps of {second['batch_size']} pairs; mean ± half of the 95 % "
        f"interval over {second['seeds']} seeds, of the change over differences at the same seed; "
        f"{_cost(second)}.",
        provenance(second),
    )


def _change(new: Record, old: Record, key: tuple[str, str], score: str) -> Record:
    """Return the interval of a score's change between records, seed by seed, of a method and source."""
    after, before = (
        {cell["seed"]: cell["scores"] for cell in record["cells"] if (cell["method"], cell["source"]) == key}
        for record in (new, old)
    )
    change: Record = intervals(paired_differences(after, before))[score]
    return change


@table("probe", generators=["fashion"])
def views(record: Record) -> str:
    """The paper's tables 2 and 3: SimCLR on every source."""
    return captioned(
        scores_table(record, "untrained", "sources"),
        f"Top-1 in percent on {record['test_images']:,} real Fashion-MNIST test images, mean ± half of the "
        f"95 % interval over seeds (Student's t); {record['probe_images']:,} labelled training images for "
        "the probes.",
        f'SimCLR, {record["steps"]:,} steps of {record["batch_size"]} pairs; T_x "crop": crop and flip, '
        '"full": brightness and contrast too.',
        f"All {len(record['cells'])} cells of this and the following tables: {_cost(record)}.",
        provenance(record, note=MEASURES),
    )


@table("probe", generators=["fashion"])
def views_telling(record: Record) -> str:
    """The four telling sources, for every method."""
    keys = ("linear 100%", "kNN")
    scores = {(row["method"], row["source"]): row["scores"] for row in record["summary"]["rows"]}
    rows = []
    for name, label in TELLING.items():
        # What is not trained has the same scores for every method, and stands under SimCLR.
        by_method = [scores.get((method, name), scores["simclr", name]) for method in METHODS]
        rows.append([label, *(with_interval(score[key]) for score in by_method for key in keys)])
    seeds = min(score["kNN"]["seeds"] for (_, name), score in scores.items() if name in TELLING)
    header = ["views", *(f"{title}, {key.split()[0]}" for title in METHODS.values() for key in keys)]
    return captioned(
        markdown(header, rows),
        f"Top-1 in percent on {record['test_images']:,} real Fashion-MNIST test images, mean ± half of the "
        f"95 % interval over {seeds} seeds; {record['steps']:,} steps of {record['batch_size']} pairs; one "
        "T_x for all (crops of 60 % of the area and more, flip, brightness, contrast); "
        f"{record['probe_images']:,} labelled images for the probes.",
        provenance(record),
    )


@table("probe", generators=["fashion"])
def views_of_others(record: Record) -> str:
    """SimSiam and BYOL on the four telling sources."""
    return scores_table(record, "transforms", methods=("simsiam", "byol"))


@table("probe", generators=["fashion"])
def views_transforms(record: Record) -> str:
    """The paper's appendix E."""
    return scores_table(
        record, "transforms", extra=("real, crop and flip", "real", "none", "single random", "ML random")
    )


@table("probe", generators=["fashion"])
def views_magnitudes(record: Record) -> str:
    """How far to move."""
    return scores_table(record, "magnitudes", extra=("single random, no T_x", "ML random, no T_x"))


@table("probe", generators=["fashion"])
def views_learned(record: Record) -> str:
    """Learned views against random ones with the same T_x."""
    extra = ("single random, gentle", "ML random, gentle", "ML random, no T_x", "ML random", "ML learned")
    extents = ", ".join(f"`{name}` {extent:.2f}" for name, extent in record["extents"].items())
    return captioned(
        scores_table(record, "learned", extra=extra),
        f"Mean L2 distance of a positive's pixels, in [0, 1], from its anchor's, before T_x: {extents}.",
    )


@table("drawn/probe")
def views_drawn(record: Record) -> str:
    """Views of a walker that draws, against random ones and those of a walker that does not."""
    extents = ", ".join(f"`{name}` {extent:.2f}" for name, extent in record["extents"].items())
    scores = scores_table(record, "drawn", "learned", "transforms")
    return captioned(
        f"{scores}\n\n{differences_table(record)}",
        f"{record['steps']:,} steps of {record['batch_size']} pairs; all rows but the drawn ones are those "
        f"of the tables above. Mean L2 distance of a positive's pixels, as above: {extents}.",
        provenance(record, note=MEASURES),
    )


@table("diffusion/probe")
def views_diffusion(record: Record) -> str:
    """Views of a sampler's late steps, against a little of all steps, and against the GAN's."""
    scores = scores_table(record, "diffusion", extra=("ML random, gentle", "ML random, no T_x"))
    return captioned(
        f"{scores}\n\n{differences_table(record)}",
        f"{record['steps']:,} steps of {record['batch_size']} pairs; the rows of `fashion` are those of the "
        f"tables above; {_cost(record)}.",
        provenance(record, note=MEASURES),
    )


@table("probe", "fashion-poor.quality", "fashion-first.quality", generators=["fashion"])
def views_quality(record: Record, poor: Record, fashion: Record) -> str:
    """How good the generator is."""
    poor_anchors, anchors = poor["fidelity"]["anchors"], fashion["fidelity"]["anchors"]
    return captioned(
        scores_table(record, "quality", extra=("none, gentle", "single random, no T_x", "ML random, no T_x")),
        f"Fréchet distance to the training images: {poor_anchors['frechet_to_train']:.1f} of the poor "
        f"generator, {anchors['frechet_to_train']:.1f} of `fashion`; mean confidence of the "
        f"classifier: {poor_anchors['confidence']:.3f} and {anchors['confidence']:.3f}.",
        "The classifiers are two of one recipe.",
        provenance(poor["run"]),
    )


@table("probe", generators=["fashion-nvae"])
def views_nvae(record: Record) -> str:
    """The paper's table 4."""
    return scores_table(record, "nvae")


@table("probe", generators=["fashion"])
def views_pools(record: Record) -> str:
    """Sec. 3.3: fixed sets against the endless stream."""
    return scores_table(record, "pools", extra=("ML random", "ML random, no T_x"))


@table("long/probe")
def views_pools_long(record: Record) -> str:
    """The same in a longer training."""
    return _with_differences(record, "pools")


@table("reuse/probe")
def views_reuse(record: Record) -> str:
    """Samples that serve several steps."""
    return _with_differences(record, "reuse")


@table("reuse-long/probe")
def views_reuse_long(record: Record) -> str:
    """The same in a longer training."""
    return _with_differences(record, "reuse")


@table("probe")
def views_differences(record: Record) -> str:
    """Paired differences of the whole table."""
    return differences_table(record)


def scores_table(
    record: Record, *groups: str, methods: Collection[str] = ("simclr",), extra: Collection[str] = ()
) -> str:
    """Return the scores of the sources of some groups, and of ``extra`` sources by name."""
    name_method = len(methods) > 1
    names = record.get("score_names", SCORES)
    rows = []
    for row in record["summary"]["rows"]:
        if row["method"] in methods and (row["group"] in groups or row["source"] in extra):
            scores = [with_interval(row["scores"][key]) for key in names]
            method = [f"`{row['method']}`"] if name_method else []
            rows.append(
                [*method, row["source"], row["transform"], *scores, str(row["scores"]["kNN"]["seeds"])]
            )
    return markdown([*(["method"] if name_method else []), "views", "T_x", *names, "seeds"], rows)


def differences_table(record: Record) -> str:
    """Return the paired differences of a record."""
    names = record.get("score_names", SCORES)
    rows = []
    for row in record["summary"]["differences"]:
        points = [with_interval(row["scores"][key], sign="+") for key in names]
        rows.append([f"`{row['method']}`", f"{row['of']} − {row['less']}", *points])
    if not rows:
        return "No source was measured at the same seed as another one."
    return captioned(
        markdown(["method", "difference at the same seed", *names], rows),
        "Points, mean ± half of the 95 % interval over seeds.",
    )


def _with_differences(record: Record, group: str) -> str:
    """Return the scores of a group and of endless streams, and the paired differences of the record."""
    scores = scores_table(record, group, extra=("ML random", "ML random, no T_x"))
    return captioned(
        f"{scores}\n\n{differences_table(record)}",
        f"{record['steps']:,} steps of {record['batch_size']} pairs; {_cost(record)}.",
        provenance(record, note=MEASURES),
    )


def _cost(record: Record) -> str:
    """Return how long all cells of a record took."""
    hours = sum(sum(cell["seconds"].values()) for cell in record["cells"]) / 3600
    return f"{hours:.1f} hours of single threads of {record['machine']['processor']}"
