"""The examples of the integrations, scored by the tools they are written for."""

from __future__ import annotations

from documents.common import Record, captioned, markdown, provenance, table, threads, with_range


@table(*(f"lightly-{method}" for method in ("simclr", "simsiam", "byol", "vicreg", "swav", "dino")))
def lightly(*runs: Record) -> str:
    """The lightly example's methods, scored by lightly's own classifiers."""
    keys = ("knn", "linear")
    untrained = [with_range([run["scores"]["untrained"][key] for run in runs], ".1f") for key in keys]
    rows = [["untrained", "", "", "", *untrained, ""]]
    for run in runs:
        trained = [f"{run['scores']['trained'][key]:.1f}" for key in keys]
        training, losses = run["training"], run["metrics_of_each_epoch"]["train_loss"]
        rows.append([
            f"`{training['method']}`",
            f"{training['steps']} × {training['batch_size']}",
            f"{losses[0]:.3f}",
            f"{losses[-1]:.3f}",
            *trained,
            f"{run['seconds']['training']:.0f}",
        ])  # fmt: skip
    first, last = runs[0], runs[-1]
    header = [
        "backbone", "steps × samples", "loss, first epoch", "last", "kNN", "linear", "training, s",
    ]  # fmt: skip
    return captioned(
        markdown(header, rows),
        f"Top-1 in percent on {first['test_images']:,} real Fashion-MNIST test images; "
        f"{first['probe_images']:,} labelled training images for the classifiers.",
        f"Preset `{first['preset']}`, {first['backbone_parameters'] / 1e6:.1f} M-parameter backbone, seed "
        f"{first['training']['seed']}; lightly {first['versions']['lightly']}, {threads(first)}, beside "
        "other processes.",
        provenance(first, note=f"; `simsiam` and `byol` alike. Of the others `{last['command']}`."),
    )


@table("solo-learn")
def solo_learn(record: Record) -> str:
    """SimCLR, SimSiam and BYOL from an unmodified checkout, scored by solo-learn's main_knn.py."""
    rows = []
    for method, run in record["runs"].items():
        (_, first_loss), (last_step, last_loss) = run["loss"][0], run["loss"][-1]
        rows.append([
            f"`{method}`",
            f"{last_step + 1:,}",
            f"{first_loss:.3f}",
            f"{last_loss:.3f}",
            f"{run['not_finite']} of {run['logged']}",
            f"{run['knn']['untrained']:.1f}",
            f"{run['knn']['trained']:.1f}",
            f"{run['seconds']:.0f}",
        ])  # fmt: skip
    header = [
        "method", "steps", "loss, first", "last", "logged values not finite", "kNN, untrained",
        "kNN, trained", "seconds",
    ]  # fmt: skip
    return captioned(
        markdown(header, rows),
        f"The ready configurations `fashion`, steps of {record['runs']['simclr']['batch_size']} pairs; kNN "
        f"is top-1 in percent of main_knn.py on {record['test_images']:,} real Fashion-MNIST test images, "
        f"with {record['labelled_images']:,} labelled ones (k = 20, cosine).",
        f"{record['solo_learn']}; {threads(record)}, beside other processes.",
        provenance(record),
    )


@table(*(f"stable-pretraining-{method}" for method in ("simclr", "byol", "vicreg", "dino")))
def stable_pretraining(*runs: Record) -> str:
    """The stable-pretraining example's four methods, scored by kNN on real images."""
    rows = [
        [
            f"`{run['method']}`",
            f"{run['loss']['first']:.3f}",
            f"{run['loss']['last']:.3f}",
            f"{run['knn']['untrained']:.1f}",
            f"{run['knn']['trained']:.1f}",
        ]
        for run in runs
    ]
    first = runs[0]
    return captioned(
        markdown(["method", "loss, first epoch", "last", "kNN, untrained", "kNN, trained"], rows),
        f"Preset `{first['preset']}`, {first['steps']} steps of 64 pairs, seed 0; kNN is top-1 in percent on "
        "10,000 real Fashion-MNIST test images; "
        f"stable-pretraining {first['stable_pretraining']}, {threads(first)}.",
        provenance(first, note="; the others with their own `--method`."),
    )


@table("elastic")
def elastic(record: Record) -> str:
    """Jobs on two nodes, of which a process or a node is killed."""
    killed = {"": "nothing", "process": "a process, by `kill -9`", "node": "a node, agent and process"}
    rows = [
        [row["job"], killed[row["killed"]], f"{row['seconds']:.0f}", "yes" if row["same"] else "no"]
        for row in record["rows"]
    ]
    return captioned(
        markdown(["job", "killed", "seconds", "result as undisturbed"], rows),
        f"Two torchrun agents on one machine, `--nnodes 1:2`, a process each; {threads(record)}, beside "
        "other processes.",
        "Results are compared to the last bit: weights and the optimizer's state; all files; every figure of "
        "the report.",
        provenance(record),
    )
