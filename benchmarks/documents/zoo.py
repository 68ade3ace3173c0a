"""The bundled generators: records of ``mlviews.zoo.evaluate``."""

from __future__ import annotations

from documents.common import Record, captioned, markdown, provenance, table

FIDELITY = ["samples", "confidence", "class entropy / log 10", "Fréchet to train", "to test"]

RECONSTRUCTION = [
    "latents by", "levels kept", "mean squared error", "PSNR", "class kept", "classified rightly"
]  # fmt: skip


@table("fashion.quality", "fashion-first.quality", "fashion-trial.quality", generators=())
def generator(fashion: Record, first: Record, trial: Record) -> str:
    """Fidelity of the bundled generator beside its first training, the trial recipe and real images."""
    fidelity, floor, trained = fashion["fidelity"], fashion["frechet_floor"], fashion["provenance"]
    anchors, first_anchors = fidelity["anchors"], first["fidelity"]["anchors"]
    images = f"{trained['start']['images']:,} images, then {trained['images']:,}"
    rows = [
        _fidelity(f"`fashion`, {images}", anchors),
        _fidelity("the same, prior not truncated", fidelity["prior"]),
        _fidelity("after the first training", first_anchors),
        _fidelity(f"trial recipe, {trial['provenance']['images']:,} images", trial["fidelity"]["anchors"]),
        _fidelity("real test images", fidelity["test"]),
    ]
    ratio = anchors["frechet_to_train"] / first_anchors["frechet_to_train"]
    return captioned(
        markdown(FIDELITY, rows),
        f"By a classifier of {fashion['classifier']['test_accuracy']:.1%} accuracy on real test images, "
        f"{anchors['samples']:,} samples.",
        f"The Fréchet distance is {ratio:.2f} times that after the first training; its floor, real images "
        f"against real images, is {floor['train_to_test']:.1f} with {floor['images_per_side']:,} a side and "
        f"{fidelity['test']['frechet_to_train']:.1f} with all.",
        provenance(fashion["run"]),
    )


@table("fashion.quality", "fashion-first.quality", generators=())
def levels(fashion: Record, first: Record) -> str:
    """What each level of the bundled generator does, and did after its first training."""
    rows = []
    for row, before in zip(fashion["levels"]["table"], first["levels"]["table"], strict=True):
        rows.append([
            f"{row['level']} ({row['name']})",
            f"{row['normal']['class_kept']:.1%}",
            f"{row['resample']['class_kept']:.1%}",
            f"{row['normal']['pixel_change']:.3f}",
            f"{before['normal']['class_kept']:.1%}",
            f"{before['normal']['pixel_change']:.3f}",
        ])  # fmt: skip
    header = [
        "level moved alone", "class kept, N^t(0, 1, 2)", "class kept, resampled", "mean change of a pixel",
        "first training: class kept, N^t(0, 1, 2)", "mean change of a pixel",
    ]  # fmt: skip
    return captioned(markdown(header, rows), f"Shares of {fashion['levels']['table'][0]['pairs']:,} pairs.")


@table("fashion.quality")
def classes(record: Record) -> str:
    """Confidence by class."""
    fidelity = record["fidelity"]
    on_samples, on_images = (fidelity[key]["confidence_by_class"] for key in ("anchors", "test"))
    rows = []
    for name, share in fidelity["anchors"]["classes"].items():
        rows.append([name, f"{on_samples[name]:.3f}", f"{on_images[name]:.3f}", f"{share:.1%}"])
    return markdown(
        ["classified as", "confidence on samples", "on real test images", "share of samples"], rows
    )


@table("fashion.quality")
def memorisation(record: Record) -> str:
    """Distances to the nearest training image."""
    return _memorisation(record)


def _memorisation(record: Record) -> str:
    """Return distances to the nearest training image."""
    distances = record["memorisation"]
    titles = {"mean": "mean", "quantile_01": "1 %", "quantile_05": "5 %", "median": "median"}
    rows = []
    for key, name in (("samples", "samples"), ("test", "real test images")):
        rows.append([name, *(f"{distances[key][statistic]:.2f}" for statistic in titles)])
    return captioned(
        markdown(["L2 distance to the nearest training image", *titles.values()], rows),
        f"{distances['queries']:,} images each, against all {distances['training_images']:,}.",
    )


@table("fashion-nvae.quality")
def nvae(record: Record) -> str:
    """Fidelity and likelihood of the bundled NVAE."""
    fidelity, likelihood = record["fidelity"], record["likelihood"]
    rows = [
        _fidelity("`fashion-nvae`", fidelity["anchors"]),
        _fidelity("the same, prior truncated at 2", fidelity["truncated"]),
        _fidelity("real test images", fidelity["test"]),
    ]
    nats, reconstruction = likelihood["nats"], likelihood["reconstruction"]
    rates = iter(nats["rate_of_each_group"])
    second = record["provenance"]
    first = second["start"]
    groups_of_scales = first["recipe"]["model"]["groups"]
    rate_of_scales = [sum(next(rates) for _ in range(groups)) for groups in groups_of_scales]
    samples = captioned(
        markdown(FIDELITY, rows),
        f"{first['images']:,} training images, then {second['images']:,} with the discriminator; "
        f"temperature {record['temperature']:g}; "
        f"{fidelity['anchors']['samples']:,} samples, classifier of "
        f"{record['classifier']['test_accuracy']:.1%} accuracy.",
    )
    return captioned(
        samples,
        f"Real test images ({likelihood['images']:,}): evidence lower bound "
        f"**{likelihood['bits_per_dimension']:.2f} bits per dimension** ({nats['distortion']:.0f} nats for "
        f"the pixels, {', '.join(f'{rate:.0f}' for rate in rate_of_scales)} for the scales, coarse to "
        f"fine; every nat counts, those of the padding too, over the {likelihood['dimensions']} real "
        "pixels).",
        f"Reconstruction: mean squared error **{reconstruction['mse']:.5f}** ({reconstruction['psnr']:.1f} "
        f"dB) over the real pixels.",
        provenance(record["run"]),
    )


@table("fashion-nvae.quality")
def nvae_levels(record: Record) -> str:
    """What each scale of the bundled NVAE does."""
    return _resampled_levels(record)


@table("fashion-diffusion.quality", "fashion.quality", "fashion-nvae.quality")
def diffusion_quality(record: Record, fashion: Record, nvae: Record) -> str:
    """Fidelity of the bundled diffusion model beside the other bundled generators."""
    fidelity = record["fidelity"]
    rows = [
        _fidelity("`fashion-diffusion`", fidelity["anchors"]),
        _fidelity("`fashion`", fashion["fidelity"]["anchors"]),
        _fidelity("`fashion-nvae`", nvae["fidelity"]["anchors"]),
        _fidelity("real test images", fidelity["test"]),
    ]
    return captioned(
        markdown(FIDELITY, rows),
        f"{record['provenance']['images']:,} training images; {fidelity['anchors']['samples']:,} samples, "
        f"classifier of {record['classifier']['test_accuracy']:.1%} accuracy; `fashion` and `fashion-nvae` "
        "by classifiers of the same recipe.",
        f"The {len(record['levels']['table']) - 1} noises are as many passes of the network.",
        provenance(record["run"]),
    )


@table("fashion-diffusion.quality")
def diffusion_levels(record: Record) -> str:
    """What each step's noise does in the bundled diffusion model."""
    return _resampled_levels(record)


@table("fashion-diffusion.quality")
def diffusion_memorisation(record: Record) -> str:
    """Distances of the bundled diffusion model's samples to the nearest training image."""
    return _memorisation(record)


@table("fashion-semafo.quality", "fashion-nvae.quality")
def semafo_quality(record: Record, nvae: Record) -> str:
    """Fidelity of the bundled SemafoVAE, and how many samples are of their class."""
    fidelity, trained = record["fidelity"], record["provenance"]
    rows = [
        [*_fidelity("`fashion-semafo`", fidelity["anchors"]), f"{fidelity['anchors']['agreement']:.1%}"],
        [
            *_fidelity("the same, prior not truncated", fidelity["prior"]),
            f"{fidelity['prior']['agreement']:.1%}",
        ],
        [*_fidelity("`fashion-nvae`", nvae["fidelity"]["anchors"]), ""],
        [*_fidelity("real test images", fidelity["test"]), f"{record['classifier']['test_accuracy']:.1%}"],
    ]
    return captioned(
        markdown([*FIDELITY, "classified as their label"], rows),
        f"{trained['start']['images']:,} training images, then {trained['images']:,} for the priors alone; "
        f"{fidelity['anchors']['samples']:,} samples with labels drawn evenly.",
        provenance(record["run"]),
    )


@table("fashion-semafo.quality")
def semafo_classes(record: Record) -> str:
    """How many samples of each class are classified as such."""
    anchors = record["fidelity"]["anchors"]
    rows = [[name, f"{share:.1%}"] for name, share in anchors["agreement_by_class"].items()]
    return markdown(["drawn for", "classified as such"], rows)


@table("fashion-semafo.quality")
def semafo_levels(record: Record) -> str:
    """What each level of the bundled SemafoVAE does within a class."""
    return _resampled_levels(record)


@table("fashion-semafo.quality")
def semafo_memorisation(record: Record) -> str:
    """Distances of the bundled SemafoVAE's samples to the nearest training image."""
    return _memorisation(record)


@table("fashion-semafo")
def semafo_interventions(record: Record) -> str:
    """What do(y) makes of samples whose levels keep their values."""
    rows = []
    for row in record["interventions"]:
        rows.append([
            ", ".join(row["kept"]) or "none",
            {"all": "all", "garments": "garments"}[row["labels"]],
            f"{row['new_class']:.1%}",
            f"{row['old_class']:.1%}",
            f"{row['agreement']:.3f}",
            f"{row['agreement_fresh']:.3f}",
            f"{row['shape_kept']:.0%}",
        ])  # fmt: skip
    header = [
        "value kept", "labels", "seen as the new class", "as the old one", "silhouettes agree",
        "with a fresh draw", "share of shape kept",
    ]  # fmt: skip
    first, second = record["interventions"][:2]
    return captioned(
        markdown(header, rows),
        f"{first['pairs']:,} samples, each given one of the other labels; garments: the {second['pairs']:,} "
        "of them whose two labels are of T-shirt, pullover, dress, coat and shirt.",
        provenance(record),
    )


@table("fashion-semafo")
def semafo_labels(record: Record) -> str:
    """Accuracy of q(y | x) beside supervised classifiers."""
    labels = record["labels"]
    accuracy, training = labels["accuracy"], labels["supervised_training"]
    rows = [
        ["`classify` of `fashion-semafo`", f"{accuracy['semafo']:.1%}"],
        ["supervised, the same augmentation", f"{accuracy['supervised_augmented']:.1%}"],
        ["supervised, no augmentation", f"{accuracy['supervised']:.1%}"],
    ]
    return captioned(
        markdown(["labels by", "right about real test images"], rows),
        f"The same encoder, and the same {labels['with_label']} labels of {labels['images']:,} images; "
        f"{labels['test']:,} test images. Supervised: {training['steps']:,} steps of {training['batch']} "
        "images with labels; one seed.",
        provenance(record),
    )


def _resampled_levels(record: Record) -> str:
    """Return what remains when levels are drawn afresh, or moved."""
    levels = record["levels"]["table"]
    has_normal = "normal" in levels[0]
    rows = []
    for row in levels:
        normal = [f"{row['normal']['class_kept']:.1%}"] if has_normal else []
        rows.append([
            f"{row['level']} ({row['name']})",
            f"{row['resample']['class_kept']:.1%}",
            *normal,
            f"{row['resample']['pixel_change']:.3f}",
        ])  # fmt: skip
    header = [
        "level moved alone", "class kept, resampled", *(["class kept, N^t(0, 1, 2)"] if has_normal else []),
        "mean change of a pixel, resampled",
    ]  # fmt: skip
    return captioned(markdown(header, rows), f"Shares of {levels[0]['pairs']:,} pairs.")


def _fidelity(name: str, figures: Record) -> list[str]:
    """Return a row of FIDELITY."""
    return [
        name,
        f"{figures['confidence']:.3f}",
        f"{figures['entropy_of_mean_prediction']:.3f}",
        f"{figures['frechet_to_train']:.1f}",
        f"{figures['frechet_to_test']:.1f}" if "frechet_to_test" in figures else "",
    ]


@table("fashion-inverter")
def reconstruction(record: Record) -> str:
    """How well real test images come back from their latents, by how many levels are kept."""
    rows = []
    for key, name in (
        ("fashion", "`fashion`, its inverter"),
        ("fashion_nvae", "`fashion-nvae`, its encoder"),
    ):
        for row in record[key]:
            levels = "all" if row is record[key][0] else f"the first {row['levels']}"
            rows.append(_reconstructed(name, levels, row))
    for row in record["fashion_refined"][1:]:
        name = f"`fashion`, its inverter and {row['steps']} steps of optimization"
        rows.append(_reconstructed(name, "all", row))
    components = record["components"]
    name = f"{components['components']} principal components of the training images"
    rows.append(_reconstructed(name, "", components))
    first, last = record["fashion_refined"][0], record["fashion_refined"][-1]
    return captioned(
        markdown(RECONSTRUCTION, rows),
        f"{record['fashion'][0]['images']:,} real test images; errors are over the 28×28 real pixels.",
        f"The steps of optimization: the first {last['images']:,} of them, whose error without is "
        f"{first['mse']:.4f}, and whose class is kept for {first['class_kept']:.1%}; "
        f"{last['encoding_ms']:.0f} ms an image, the inverter alone "
        f"{record['fashion'][0]['encoding_ms']:.1f} ms.",
        f"The classifier is right about {record['classifier']['right']:.1%} of the images themselves.",
        provenance(record),
    )


@table("fashion-diffusion-encoding")
def diffusion_encoding(record: Record) -> str:
    """How well real test images come back from the noises that the bundled diffusion model gives them."""
    rows = []
    for row in record["rows"]:
        levels = "all" if row is record["rows"][0] else f"the first {row['levels']}"
        rows.append(_reconstructed("`fashion-diffusion`, `encode`", levels, row))
    return captioned(
        markdown(RECONSTRUCTION, rows),
        f"{record['rows'][0]['images']:,} real test images; errors are over the 28×28 real pixels; other "
        "levels are drawn afresh.",
        f"The classifier is right about {record['classifier']['right']:.1%} of the images themselves.",
        provenance(record),
    )


def _reconstructed(name: str, levels: str, row: Record) -> list[str]:
    return [
        name,
        levels,
        f"{row['mse']:.4f}",
        f"{row['psnr']:.1f} dB",
        f"{row['class_kept']:.1%}",
        f"{row['right']:.1%}",
    ]
