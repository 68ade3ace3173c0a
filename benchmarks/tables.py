"""Write the documents' tables from the committed records: ``python benchmarks/tables.py``; ``--check`` only compares.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``, and is what the function NAME below makes of JSON.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, SCORES, shown

ROOT = Path(__file__).parents[1]
PARTS = ("benchmarks", "mlviews/zoo", "mlviews/generators", "mlviews/impact", "integrations/lightly", "integrations/solo_learn")
DOCUMENTS = (ROOT / "README.md", *(ROOT / part / "README.md" for part in PARTS))
ZOO = ROOT / "mlviews" / "zoo"


def read(path: Path) -> Any:
    """A record."""
    return json.loads(path.read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns of numbers are aligned to the right."""
    numbers = [all(re.match(r"([≥+-] ?)?\d|$", cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["---:" if number and column else "---" for column, number in enumerate(numbers)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def spread(values: Sequence[float]) -> str:
    """Mean and range over seeds."""
    mean = statistics.mean(values)
    return f"{mean:.1f}" if max(values) - min(values) < 0.05 else f"{mean:.1f} ({min(values):.1f}–{max(values):.1f})"


def probe() -> str:
    """Linear probes and kNN of the demo's encoder, over seeds."""
    runs = [read(path) for path in sorted((RESULTS / "probe").glob("full-seed*.json"))]
    names, shares = runs[0]["scores"], runs[0]["scores"]["raw pixels"]["linear"]
    rows = [
        [
            name,
            *(spread([run["scores"][name]["linear"][share] for run in runs]) for share in shares),
            spread([run["scores"][name]["knn"] for run in runs]),
        ]
        for name in names
    ]
    first, training, demo = runs[0], runs[0]["training"], read(RESULTS / "probe" / "demo-slice-seed0.json")
    seconds = [run["seconds"]["training"] for run in runs]
    short = [demo["scores"][name] for name in ("encoder trained on views", "untrained encoder")]
    table = markdown(["features", *(f"linear, {float(share):.0%} of labels" for share in shares), "kNN"], rows)
    return (
        f"{table}\n\nTop-1 in percent on {first['test_images']:,} real Fashion-MNIST test images, mean (range) of {len(runs)} seeds; "
        f"{first['probe_images']:,} labelled training images for the probes. "
        f"{training['method']}, preset `{first['preset']}`, {training['steps']:,} steps of {training['batch_size']} pairs, "
        f"{first['encoder_parameters'] / 1e6:.1f} M-parameter encoder; {min(seconds):.0f}–{max(seconds):.0f} s of training with "
        f"{first['machine']['threads']} thread(s) on {first['machine']['processor']}. The generator learned from the 60,000 training "
        f"images, without labels; the encoder saw none of them. Command: `{first['command']}`. `{demo['command']}`, with the bundled slice "
        f"({demo['probe_images']:,} images to fit, {demo['test_images']:,} to test) and {demo['machine']['threads']} threads: linear "
        f"{short[0]['linear']['1']:.1f}, kNN {short[0]['knn']:.1f}, untrained {short[1]['linear']['1']:.1f} and {short[1]['knn']:.1f}, "
        f"after {demo['seconds']['all']:.0f} s."
    )


def _views(groups: Sequence[str], methods: Sequence[str] = ("simclr",), also: Sequence[str] = (), folder: Path = RESULTS) -> str:
    """Scores of the sources of some groups, and of others by name."""
    rows = [
        ([f"`{row['method']}`"] if len(methods) > 1 else [])
        + [row["source"], row["transform"], *(shown(row["scores"][key]) for key in SCORES), str(row["scores"]["kNN"]["seeds"])]
        for row in read(folder / "probe.json")["summary"]["rows"]
        if row["method"] in methods and (row["group"] in groups or row["source"] in also)
    ]
    return markdown([*(["method"] if len(methods) > 1 else []), "views", "T_x", *SCORES, "seeds"], rows)


def views() -> str:
    """The paper's tables 2 and 3: SimCLR on every source."""
    record = read(RESULTS / "probe.json")
    hours = sum(sum(cell["seconds"].values()) for cell in record["cells"]) / 3600
    return (
        f"{_views(('untrained', 'sources'))}\n\nTop-1 in percent on {record['test_images']:,} real Fashion-MNIST test images, mean ± half "
        f"of the 95 % interval over seeds (Student's t); {record['probe_images']:,} labelled training images for the probes. "
        f'SimCLR, {record["steps"]:,} steps of {record["batch_size"]} pairs; T_x "crop": crop and flip, "full": brightness and contrast '
        f"too. All {len(record['cells'])} cells of this and the following tables: {hours:.1f} hours of single threads of "
        f"{record['machine']['processor']}. Command: `{record['command']}` (without `--collect` it measures)."
    )


def views_telling() -> str:
    """The four telling sources, for every method."""
    record = read(RESULTS / "probe.json")
    found = {(row["method"], row["source"]): row["scores"] for row in record["summary"]["rows"]}
    methods, keys = {"simclr": "SimCLR", "simsiam": "SimSiam", "byol": "BYOL"}, ("linear 100%", "kNN")
    names = {
        "raw pixels": "no encoder: raw pixels", "untrained encoder": "none: untrained encoder",
        "real, gentle": "real images", "none, gentle": "generated, no latent moved",
        "single random, gentle": "single-latent random", "ML random, gentle": "**multi-level random**",
    }  # fmt: skip
    rows = []
    for name, label in names.items():
        scores = [found.get((method, name), found["simclr", name]) for method in methods]  # without training it is the same for all
        rows.append([label, *(shown(score[key]) for score in scores for key in keys)])
    seeds = {score["kNN"]["seeds"] for (_, name), score in found.items() if name in names}
    header = ["views", *(f"{title}, {key.split()[0]}" for title in methods.values() for key in keys)]
    return (
        f"{markdown(header, rows)}\n\nTop-1 in percent on {record['test_images']:,} real Fashion-MNIST test images, mean ± half of the "
        f"95 % interval over {min(seeds)} seeds; {record['steps']:,} steps of {record['batch_size']} pairs; one T_x for all (crops of 60 % "
        f"of the area and more, flip, brightness, contrast); {record['probe_images']:,} labelled images for the probes. "
        f"Command: `{record['command']}`."
    )


def views_of_others() -> str:
    """SimSiam and BYOL on the four telling sources."""
    return _views(("transforms",), ("simsiam", "byol"))


def views_transforms() -> str:
    """The paper's appendix E."""
    return _views(("transforms",), also=("real, crop and flip", "real", "none", "single random", "ML random"))


def views_magnitudes() -> str:
    """How far to move."""
    return _views(("magnitudes",), also=("single random, no T_x", "ML random, no T_x"))


def views_learned() -> str:
    """Learned views against random ones with the same T_x."""
    also = ("single random, gentle", "ML random, gentle", "ML random, no T_x", "ML random", "ML learned")
    extents = (f"`{name}` {value:.2f}" for name, value in read(RESULTS / "probe.json")["extents"].items())
    return (
        f"{_views(('learned',), also=also)}\n\nMean L2 distance of a positive's pixels, in [0, 1], from its anchor's, before T_x: "
        f"{', '.join(extents)}."
    )


def views_quality() -> str:
    """How good the generator is."""
    poor, own = read(RESULTS / "fashion-poor.quality.json"), read(ZOO / "fashion.quality.json")
    distances, confidence = ([made["fidelity"]["anchors"][key] for made in (poor, own)] for key in ("frechet_to_train", "confidence"))
    return (
        f"{_views(('quality',), also=('none, gentle', 'single random, no T_x', 'ML random, no T_x'))}\n\nFréchet distance to the training "
        f"images: {distances[0]:.1f} of the poor generator, {distances[1]:.1f} of `fashion`; mean confidence of the classifier: "
        f"{confidence[0]:.3f} and {confidence[1]:.3f}. Command: `{poor['run']['command']}`."
    )


def views_nvae() -> str:
    """The paper's table 4."""
    return _views(("nvae",))


def views_pools() -> str:
    """Sec. 3.3: fixed sets against the endless stream."""
    return _views(("pools",), also=("ML random", "ML random, no T_x"))


def views_pools_long() -> str:
    """The same in a longer training."""
    record = read(RESULTS / "long" / "probe.json")
    hours = sum(sum(cell["seconds"].values()) for cell in record["cells"]) / 3600
    return (
        f"{_views(('pools',), also=('ML random, no T_x',), folder=RESULTS / 'long')}\n\n{_differences(RESULTS / 'long')}\n\n"
        f"{record['steps']:,} steps of {record['batch_size']} pairs; {hours:.1f} hours of single threads of "
        f"{record['machine']['processor']}. Command: `{record['command']}` (without `--collect` it measures)."
    )


def _differences(folder: Path) -> str:
    """Paired differences."""
    rows = [
        [f"`{row['method']}`", f"{row['of']} − {row['less']}", *(shown(row["scores"][key], "+") for key in SCORES)]
        for row in read(folder / "probe.json")["summary"]["differences"]
    ]
    return f"{markdown(['method', 'difference at the same seed', *SCORES], rows)}\n\nPoints, mean ± half of the 95 % interval over seeds."


def views_differences() -> str:
    """Paired differences of the whole table."""
    return _differences(RESULTS)


def loaders() -> str:
    """The paper's figure 5."""
    record = read(RESULTS / "loaders.json")
    machine, rows = record["machine"], []
    for row in record["rows"]:
        ratio, parts = row["step_of_first"], (row["data_s"], row["training_s"])
        rows.append([
            f"{row['size']} px", str(row["batch_size"]), f"`{row['loader']}`",
            *(f"{1e3 * part['median']:.0f} ({1e3 * part['range'][0]:.0f}–{1e3 * part['range'][1]:.0f})" for part in parts),
            f"{row['data_share']:.0%}", f"{ratio['median']:.2f} ({ratio['range'][0]:.2f}–{ratio['range'][1]:.2f})",
            f"{row['samples_per_s']:.1f}", f"{row['samples_per_s_alone']:,.1f}", f"{row['epoch_s'] / 60:.0f}", _peak(row),
        ])  # fmt: skip
    header = ["images", "batch", "loader", "waiting, ms", "training, ms", "waiting", f"step / {record['first']}'s", "samples/s",
              "the loader alone, samples/s", "epoch, min", "peak, MiB"]  # fmt: skip
    energy = "in the record" if record["energy_not_measured"] is None else f"not measured: {record['energy_not_measured']}"
    return (
        f"{markdown(header, rows)}\n\nMean of a round's steps, median (range) of {record['rounds']} rounds, in which the loaders take "
        f"turns. An epoch has {record['epoch']:,} samples. {machine['device'].upper()}, {machine['threads']} threads of "
        f"{machine['processor']}, {record['workers']} workers; torchvision {record['versions']['torchvision']}, FFCV "
        f"{record['versions'].get('ffcv', 'not installed')}. Energy and CO2 {energy}. Command: `{record['command']}`."
    )


def _peak(row: dict[str, Any]) -> str:
    """MiB of the host's memory, and of the device's where it has its own."""
    return " + ".join(f"{value:,.0f}" for value in row["peak"].values())


def loaders_short() -> str:
    """Figure 5 at the largest batch."""
    record = read(RESULTS / "loaders.json")
    largest = max(row["batch_size"] for row in record["rows"])
    own = [row for row in record["rows"] if row["batch_size"] == largest]
    rows = [
        [
            f"{row['size']} px, `{row['loader']}`", f"{row['data_share']:.0%}", f"{row['step_of_first']['median']:.2f}",
            f"{row['samples_per_s']:.1f}", _peak(row), f"{disk['bytes'] / 1e6:,.1f}", f"{found['different'] / found['images']:.0%}",
        ]
        for row, disk, found in zip(own, record["disk"], record["unique"], strict=True)
    ]  # fmt: skip
    header = ["images, loader", "of a step spent waiting", f"step / {record['first']}'s", "samples/s", "peak, MiB", "on disk, MB",
              "of the images of two epochs, distinct"]  # fmt: skip
    return (
        f"{markdown(header, rows)}\n\nSimCLR with a ResNet-18, batches of {largest}, {record['images']:,} files; "
        f"{record['machine']['device'].upper()}, {record['machine']['threads']} threads of {record['machine']['processor']}. "
        f"Command: `{record['command']}`."
    )


def loaders_storage() -> str:
    """Bytes on disk, and how many images differ."""
    record = read(RESULTS / "loaders.json")
    rows = [
        [f"{disk['size']} px", f"`{disk['loader']}`", f"{disk['bytes'] / 1e6:,.1f}", f"{found['different']:,} of {found['images']:,}"]
        for disk, found in zip(record["disk"], record["unique"], strict=True)
    ]
    header = ["images", "loader", f"MB for {record['images']:,} images", "different images in two epochs, looked at"]
    return markdown(header, rows)


def lightly() -> str:
    """The lightly example's three methods, scored by lightly's own classifiers."""
    runs = [read(RESULTS / f"lightly-{method}.json") for method in ("simclr", "simsiam", "byol")]
    keys, first, training = ("knn", "linear"), runs[0], runs[0]["training"]
    rows = [["untrained", *(spread([run["scores"]["untrained"][key] for run in runs]) for key in keys), ""]]
    for run in runs:
        scores = [f"{run['scores']['trained'][key]:.1f}" for key in keys]
        rows.append([f"`{run['training']['method']}`", *scores, f"{run['seconds']['training']:.0f}"])
    machine = first["machine"]
    return (
        f"{markdown(['backbone', 'kNN', 'linear', 'training, s'], rows)}\n\nTop-1 in percent on {first['test_images']:,} real "
        f"Fashion-MNIST test images; {first['probe_images']:,} labelled training images for the classifiers. Preset `{first['preset']}`, "
        f"{training['steps']} steps of {training['batch_size']} pairs, {first['backbone_parameters'] / 1e6:.1f} M-parameter backbone, seed "
        f"{training['seed']}; lightly {first['versions']['lightly']}, {machine['threads']} thread(s) of {machine['processor']}, beside "
        f"other processes. Command: `{first['command']}`; the others with their own `--method`."
    )


def solo_learn() -> str:
    """SimCLR, SimSiam and BYOL from an unmodified checkout, scored by solo-learn's main_knn.py."""
    record = read(RESULTS / "solo-learn.json")
    rows = []
    for method, run in record["runs"].items():
        losses = [f"{loss:.3f}" for _, loss in (run["loss"][0], run["loss"][-1])]
        knn = [f"{run['knn'][name]:.1f}" for name in ("untrained", "trained")]
        steps = max(step for step, _ in run["loss"]) + 1
        rows.append([f"`{method}`", f"{steps:,}", *losses, f"{run['not_finite']} of {run['logged']}", *knn, f"{run['seconds']:.0f}"])
    first, machine = record["runs"]["simclr"], record["machine"]
    header = ["method", "steps", "loss, first", "last", "logged values not finite", "kNN, untrained", "kNN, trained", "seconds"]
    return (
        f"{markdown(header, rows)}\n\nThe ready configurations `fashion`, steps of {first['batch_size']} pairs; kNN is "
        f"top-1 in percent of main_knn.py on {record['test_images']:,} real Fashion-MNIST test images, with "
        f"{record['labelled_images']:,} labelled ones (k = 20, cosine). {record['solo_learn']}; "
        f"{machine['threads']} thread(s) of {machine['processor']}, beside other processes. "
        f"Command: `{record['command']}`."
    )


def overhead() -> str:
    """Parts of a step."""
    record = read(RESULTS / "overhead.json")
    base = record["median_ms"]["generator"]
    rows = [[name, f"{value:.2f}", f"{value / base:.1%}"] for name, value in record["median_ms"].items()]
    machine = record["machine"]
    return (
        f"{markdown(['part of a step', 'median, ms', 'of the generator'], rows)}\n\n"
        f"All but the generator and T_x: **{record['overhead_of_generator']:.1%}** of the generator's forward pass; "
        f"T_x: {record['t_x_of_generator']:.1%}. "
        f"Preset `{record['preset']}`, batch {record['batch_size']}, {record['steps']} steps, "
        f"{machine['threads']} thread(s) of {machine['processor']}. "
        f"Command: `{record['command']}`."
    )


def generator() -> str:
    """Fidelity of the bundled generator beside the trial recipe and real images."""
    own, trial = read(ZOO / "fashion.quality.json"), read(RESULTS / "fashion-trial.quality.json")

    def row(name: str, figures: dict[str, Any]) -> list[str]:
        distance = figures.get("frechet_to_test")
        return [
            name,
            f"{figures['confidence']:.3f}",
            f"{figures['entropy_of_mean_prediction']:.3f}",
            f"{figures['frechet_to_train']:.1f}",
            "" if distance is None else f"{distance:.1f}",
        ]

    rows = [
        row(f"`fashion`, {own['provenance']['images']:,} images", own["fidelity"]["anchors"]),
        row("the same, prior not truncated", own["fidelity"]["prior"]),
        row(f"trial recipe, {trial['provenance']['images']:,} images", trial["fidelity"]["anchors"]),
        row("real test images", own["fidelity"]["test"]),
    ]
    floor = own["frechet_floor"]
    ratio = own["fidelity"]["anchors"]["frechet_to_train"] / trial["fidelity"]["anchors"]["frechet_to_train"]
    return (
        f"{markdown(['samples', 'confidence', 'class entropy / log 10', 'Fréchet to train', 'to test'], rows)}\n\n"
        f"By a classifier of {own['classifier']['test_accuracy']:.1%} accuracy on real test images, "
        f"{own['fidelity']['anchors']['samples']:,} samples. "
        f"The Fréchet distance is {ratio:.2f} times the trial recipe's; its floor, real images against real images, is "
        f"{floor['train_to_test']:.1f} with {floor['images_per_side']:,} a side and "
        f"{own['fidelity']['test']['frechet_to_train']:.1f} with all. Command: `{own['run']['command']}`."
    )


def levels() -> str:
    """What each level of the bundled generator does."""
    own, trial = read(ZOO / "fashion.quality.json")["levels"]["table"], read(RESULTS / "fashion-trial.quality.json")["levels"]["table"]
    rows = [
        [
            f"{row['level']} ({row['name']})",
            f"{row['normal']['class_kept']:.1%}",
            f"{row['resample']['class_kept']:.1%}",
            f"{row['normal']['pixel_change']:.3f}",
            f"{other['normal']['class_kept']:.1%}",
        ]
        for row, other in zip(own, trial, strict=True)
    ]
    header = [
        "level moved alone",
        "class kept, N^t(0, 1, 2)",
        "class kept, resampled",
        "mean change of a pixel",
        "trial recipe: class kept, N^t(0, 1, 2)",
    ]
    return f"{markdown(header, rows)}\n\nShares of {own[0]['pairs']:,} pairs."


def classes() -> str:
    """Confidence by class."""
    fidelity = read(ZOO / "fashion.quality.json")["fidelity"]
    own, real = fidelity["anchors"], fidelity["test"]
    rows = [
        [name, f"{own['confidence_by_class'][name]:.3f}", f"{real['confidence_by_class'][name]:.3f}", f"{share:.1%}"]
        for name, share in own["classes"].items()
    ]
    return markdown(["classified as", "confidence on samples", "on real test images", "share of samples"], rows)


def memorisation() -> str:
    """Distances to the nearest training image."""
    record = read(ZOO / "fashion.quality.json")["memorisation"]
    keys = {"mean": "mean", "quantile_01": "1 %", "quantile_05": "5 %", "median": "median"}
    rows = [[name, *(f"{record[part][key]:.2f}" for key in keys)] for name, part in (("samples", "samples"), ("real test images", "test"))]
    return (
        f"{markdown(['L2 distance to the nearest training image', *keys.values()], rows)}\n\n"
        f"{record['queries']:,} images each, against all {record['training_images']:,}."
    )


def nvae() -> str:
    """Fidelity and likelihood of the bundled NVAE."""
    own = read(ZOO / "fashion-nvae.quality.json")
    rows = [
        [
            name,
            f"{own['fidelity'][key]['confidence']:.3f}",
            f"{own['fidelity'][key]['entropy_of_mean_prediction']:.3f}",
            f"{own['fidelity'][key]['frechet_to_train']:.1f}",
            f"{own['fidelity'][key]['frechet_to_test']:.1f}" if "frechet_to_test" in own["fidelity"][key] else "",
        ]
        for name, key in (("`fashion-nvae`", "anchors"), ("the same, prior truncated at 2", "truncated"), ("real test images", "test"))
    ]
    found = own["likelihood"]
    counts, rates, start = own["provenance"]["recipe"]["model"]["groups"], [], 0
    for count in counts:
        rates.append(sum(found["nats"]["rate_of_each_group"][start : start + count]))
        start += count
    shown = ", ".join(f"{rate:.0f}" for rate in rates)
    return (
        f"{markdown(['samples', 'confidence', 'class entropy / log 10', 'Fréchet to train', 'to test'], rows)}\n\n"
        f"{own['provenance']['images']:,} training images, temperature {own['temperature']:g}; "
        f"{own['fidelity']['anchors']['samples']:,} samples, classifier of {own['classifier']['test_accuracy']:.1%} accuracy.\n\n"
        f"Real test images ({found['images']:,}): evidence lower bound **{found['bits_per_dimension']:.2f} bits per dimension** "
        f"({found['nats']['distortion']:.0f} nats for the pixels, {shown} for the scales, coarse to fine; every nat counts, those of the "
        f"padding too, over the {found['dimensions']} real pixels). Reconstruction: mean squared error "
        f"**{found['reconstruction']['mse']:.5f}** ({found['reconstruction']['psnr']:.1f} dB) over the real pixels. "
        f"Command: `{own['run']['command']}`."
    )


def nvae_levels() -> str:
    """What each scale of the bundled NVAE does."""
    table = read(ZOO / "fashion-nvae.quality.json")["levels"]["table"]
    rows = [
        [
            f"{row['level']} ({row['name']})",
            f"{row['resample']['class_kept']:.1%}",
            f"{row['normal']['class_kept']:.1%}",
            f"{row['resample']['pixel_change']:.3f}",
        ]
        for row in table
    ]
    header = ["level moved alone", "class kept, resampled", "class kept, N^t(0, 1, 2)", "mean change of a pixel, resampled"]
    return f"{markdown(header, rows)}\n\nShares of {table[0]['pairs']:,} pairs."


def nvae_parity() -> str:
    """Ours beside the official NVAE codes."""
    record = read(RESULTS / "parity-nvae.json")
    keys = ("decode", "decode_0.6", "decode_scales", "reconstruct")
    rows = []
    for layout, name in (("nvlabs", "NVlabs/NVAE"), ("serezd", "SerezD/NVAE-from-scratch")):
        cases = [case for case in record["cases"] if case["case"].startswith(layout)]
        sizes = sorted({case["image"][1] for case in cases})
        faster = [case["speedup"] for case in cases if "speedup" in case]
        rows.append(
            [
                name,
                f"{len(cases)}",
                f"{sizes[0]}–{sizes[-1]} px",
                f"{max(case[key] for case in cases for key in keys[:-1]):.1e}",
                f"{max(case['reconstruct'] for case in cases):.1e}",
                spread(faster),
            ]
        )
    header = ["official code", "networks", "images", "largest difference, decoding", "encoding and decoding", "times as fast"]
    machine, batch = record["machine"], next(case["batch"] for case in record["cases"] if "batch" in case)
    return (
        f"{markdown(header, rows)}\n\nOf images in [0, 1], random weights, float32. Speed: decoding {batch} images in turns, mean (range) "
        f"over networks, {machine['threads']} thread(s) of {machine['processor']}. "
        f"Command: `{record['command']}`."
    )


def parity() -> str:
    """Largest differences from the official code, over all networks and ways to compute them."""
    rows, commands = [], []
    for name, keys in (
        ("biggan", ("max", "max_with_graph")),
        ("stylegan2", ("decode", "with_gradients", "crop", "crop_and_average")),
        ("nvae", ("decode", "reconstruct")),
    ):
        record = read(RESULTS / f"parity-{name}.json")
        cases = record["cases"]
        cases = list(cases.values()) if isinstance(cases, dict) else cases
        worst = max(case[key] for case in cases for key in keys if key in case)
        sizes = [case["resolution"] if "resolution" in case else case["image"][1] for case in cases]
        rows.append([name, str(len(cases)), f"{min(sizes)}–{max(sizes)} px", f"{worst:.1e}"])
        commands.append(f"`{record['command']}`")
    return (
        f"{markdown(['architecture', 'networks', 'images', 'largest difference of a pixel in [0, 1]'], rows)}\n\n"
        f"float32. Commands: {', '.join(commands)}."
    )


def speed() -> str:
    """Ours beside the research code and the official code, in turns."""
    gans, styles = read(RESULTS / "biggan-speed.json"), read(RESULTS / "stylegan2-speed.json")
    rows = []
    for name, parts in gans["steps"].items():
        times = parts["step"]
        low, high = times["cpu"]["ratio"]["quartiles"]
        rows.append([
            f"BigBiGAN, {gans['pairs']} pairs, {name} moved",
            f"{times['wall']['research']['median']:.2f} s",
            f"{times['wall']['ours']['median']:.2f} s",
            f"{times['wall']['ratio']['median']:.2f}",
            f"{times['cpu']['ratio']['median']:.2f} ({low:.2f}–{high:.2f})",
        ])  # fmt: skip
    for case in styles["cases"]:
        low, high = case["ratio_quartiles"]
        rows.append([
            f"StyleGAN2, {case['images']} images, {case['case']}",
            f"{case['official']['wall']['median']:.2f} s",
            f"{case['ours']['wall']['median']:.2f} s",
            f"{case['ratio_wall']:.2f}",
            f"{case['ratio']:.2f} ({low:.2f}–{high:.2f})",
        ])  # fmt: skip
    memory = gans["memory_mib"]
    machine = gans["machine"]
    kinds = ["research code", "ours", "ours, micro_batch_size=4"]
    table = markdown(["work", "original", "ours", "times as fast, wall", "by CPU time (quartiles)"], rows)
    needs = [memory[name] for name in ("research", "ours", "ours, micro_batch_size=4")]
    space = markdown(
        ["BigBiGAN, 16 pairs, MiB", *kinds],
        [
            ["weights and program, before the step", *(f"{need['resident_before_step']:.0f}" for need in needs)],
            ["working memory: growth of the resident set in the step", *(f"{need['resident_peak_in_step']:.0f}" for need in needs)],
            ["working memory: peak of torch's allocations", *(f"{need['allocated_peak_in_step']:.0f}" for need in needs)],
        ],
    )
    return (
        f"{table}\n\nBigBiGAN: the whole step (latents, both views, crop and flip to 112 px) against the research code's `BatchManager` "
        'and generator. StyleGAN2: config-f channels, against stylegan2-ada-pytorch\'s generator; "last group" is an anchor and a '
        "positive that differ in "
        f"the last of four groups. Both sides in turns, {machine['threads']} thread(s) of {machine['processor']}, random weights. "
        f"Commands: `{gans['command']}`, `{styles['command']}`.\n\n{space}"
    )


def precision() -> str:
    """Options of the source, measured on BigBiGAN."""
    record = read(RESULTS / "biggan-speed.json")
    rows = [
        [name, f"{times['wall']['median']:.2f} s", f"{times['cpu_of_float32']['median']:.2f}"] for name, times in record["options"].items()
    ]
    machine = record["machine"]
    return (
        f"{markdown(['option', 'median step', 'CPU time, of float32'], rows)}\n\nBigBiGAN, {record['pairs']} pairs, levels 2-6 moved, "
        f"{machine['threads']} thread(s) of {machine['processor']}; compilation itself is not counted. Command: `{record['command']}`."
    )


def mutual_information() -> str:
    """The estimate beside the truth, where that is known."""
    record = read(RESULTS / "mi.json")
    rows = []
    for row in record["rows"]:
        values, truth = [run["nats"] for run in row["runs"]], row["truth"]
        mean = statistics.mean(values)
        excess = max((run["nats"] - truth) / run["stderr"] for run in row["runs"])
        rows.append([
            row["case"] + ("" if row["required"] else " (limit)"),
            f"{truth:g}",
            f"{mean:.3f} ({min(values):.3f}–{max(values):.3f})",
            f"{max(run['stderr'] for run in row['runs']):.3f}",
            f"{mean / truth - 1:+.1%}",
            f"{excess:+.1f}",
        ])  # fmt: skip
    truths = [(run["nats"], row["truth"]) for row in record["rows"] for run in row["runs"]]
    near = sum(abs(value / truth - 1) <= 0.1 for value, truth in truths)
    spent = [run["cpu_seconds"] for row in record["rows"] for run in row["runs"]]
    header = ["pairs", "truth, nats", "estimate, nats", "standard error", "error of the mean", "largest excess, standard errors"]
    return (
        f"{markdown(header, rows)}\n\n{record['pairs']:,} pairs (the generator's images: as many again to evaluate on); mean (range) of "
        f"{len(record['seeds'])} seeds, the largest of their standard errors. Mean within 10% of the truth, and no seed above it by more "
        f"than two standard errors: {sum(row['met'] for row in record['rows'])} of {len(record['rows'])} rows; single estimates within 10%:"
        f" {near} of {len(truths)}. Rows marked (limit) were set apart after trials missed there. "
        f"{min(spent):.0f}–{max(spent):.0f} s of one core each, on {record['machine']['processor']}. "
        f"Command: `{record['command']}`."
    )


def impact() -> str:
    """Table 1 of the paper for the bundled generators, by both methods."""
    record = read(RESULTS / "impact.json")
    rows = []
    for name, method, cells in _cells(record):
        for same in zip(*(cell["rows"] for cell in cells), strict=True):
            least = "≥ " if any(row["status"] == "under-used" for row in same) else ""
            kept = [row["class_kept"] for row in same]
            sigmas = [row["sigma"] for row in same if row["sigma"] is not None]
            rows.append([
                f"`{name}`, {method}, {same[0]['level']} ({same[0]['name']})",
                _range([row["loss_nats"] for row in same]),
                least + _range([row["distance_mean"] for row in same]),
                _range([row["distance_std"] for row in same]),
                least + _range([row["distance_relative"] for row in same]),
                _range(sigmas) if sigmas else "",
                f"{statistics.mean(kept):.0%} ({min(kept):.0%}–{max(kept):.0%})",
                ", ".join(dict.fromkeys(row["verdict"] for row in same)),
            ])  # fmt: skip
    header = ["level", "loss, nats", "distance", "its std", "of two draws' distance", "σ", "class kept", "verdict"]
    first = record["cells"][0]
    seeds = ", ".join(f"`{name}`, {method}: {len(cells)}" for name, method, cells in _cells(record))
    return (
        f"{markdown(header, rows)}\n\nMean (range) over seeds ({seeds}). Target "
        f"{first['target_loss']:g} nats (1.00 on the scale of the paper's code), K = {first['pairs']}, "
        f"{first['options']['monte_carlo']:,} anchors for the distances. Class kept: share of 2,000 pairs, by a classifier trained on real "
        f"images. ≥: the target was not reached. {record['machine']['processor']}. Command: `{record['command']}`; its cells were "
        "measured by the same command without `--collect`, a process for each method."
    )


def impact_fashion() -> str:
    """Table 1 in short, for one generator."""
    record = read(RESULTS / "impact.json")
    cells = {method: found for name, method, found in _cells(record) if name == "fashion"}
    swept, walked = (list(zip(*(cell["rows"] for cell in cells[method]), strict=True)) for method in ("sweep", "walker"))
    rows = [
        [
            f"{one[0]['level']} ({one[0]['name']})",
            _range([row["distance_mean"] for row in one]),
            _range([row["distance_relative"] for row in one]),
            f"{statistics.mean(row['class_kept'] for row in one):.0%}",
            ", ".join(dict.fromkeys(row["verdict"] for row in one)),
            _range([row["distance_mean"] for row in other]),
        ]
        for one, other in zip(swept, walked, strict=True)
    ]
    header = ["level of `fashion`", "distance for 0.7 nats, sweep", "of two draws' distance", "class kept", "verdict", "distance, walkers"]
    ends = [statistics.mean(row["loss_nats"] for row in level) for level in walked]
    return (
        f"{markdown(header, rows)}\n\nMean (range) over {len(cells['sweep'])} seeds. Walkers end at lower losses, {min(ends):.2f} to "
        f"{max(ends):.2f} nats on fresh pairs. Command: `{record['command']}`."
    )


def impact_agreement() -> str:
    """How far the two methods agree, and what they cost."""
    record, alone = read(RESULTS / "impact.json"), read(RESULTS / "fashion-sweep.json")
    rows = []
    for name, found in record["agreement"].items():
        times = {}
        for other, method, cells in _cells(record):
            if other == name:
                times[method] = [cell["seconds"] / 60 for cell in cells]
        rows.append(
            [f"`{name}`", *(f"{found[key]:.2f}" for key in ("between methods", "sweep with the level", "walker with the level"))]
            + [spread(times[method]) for method in ("sweep", "walker")]
        )
    header = ["generator", "rank correlation of the methods", "sweep with the level", "walker with the level", "sweep, min", "walker, min"]
    return (
        f"{markdown(header, rows)}\n\nSpearman's, of the levels' mean distances, averaged over seeds; levels that never reached the "
        "target rank as the farthest, and equal. Minutes of wall time for all levels, mean (range) over seeds, with one thread, beside "
        "one to four other busy processes on a shared machine of two cores. Alone, with "
        f"{alone['environment']['machine']['threads']} threads: the sweep of `{alone['generator']}` in **{alone['seconds'] / 60:.1f} min** "
        "(`mlviews impact fashion`)."
    )


def impact_remedies() -> str:
    """Walkers of one level with and without what keeps their directions apart and their positives in the prior."""
    plain, remedies = read(RESULTS / "impact.json"), read(RESULTS / "impact-remedies.json")
    names = {
        "walker": "as in the paper", "walker-2-processes": "as in the paper, 2 processes", "walker-diverse": "directions=4",
        "walker-norm": "keep_norm=True", "walker-diverse-norm": "both", "walker-joint": "both, levels 1–3 together",
    }  # fmt: skip
    rows = []
    found = {cell["method"]: cell for cell in [*remedies["cells"], *plain["cells"]] if cell["generator"] == "fashion" and not cell["seed"]}
    for cell in (found[name] for name in names):
        row = next(row for row in cell["rows"] if row["level"] != "0" and row["level"] in ("1", "1:4"))
        rows.append([
            names[cell["method"]],
            f"{row['loss_nats']:.2f} ± {row['loss_stderr']:.2f}",
            f"{row['distance_mean']:.2f} ± {row['distance_std']:.2f}",
            f"{row['distance_relative']:.2f}",
            f"{1 - row['diversity']:.2f}",
            f"{row['directions']:.1f}",
            f"{row['norm_ratio']:.2f}",
            f"{row['class_kept']:.0%}",
        ])  # fmt: skip
    header = ["walker", "loss, nats", "distance", "of two draws'", "length of the mean direction", "directions", "norm ratio", "class kept"]
    return f"{markdown(header, rows)}\n\n`fashion`, level 1, seed 0. Command: `{remedies['command']}`."


def _cells(record: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The cells of each generator and method."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in record["cells"]:
        found.setdefault((cell["generator"], cell["method"]), []).append(cell)
    return [(*key, cells) for key, cells in found.items()]


def _range(values: Sequence[float]) -> str:
    """Mean and range over seeds, to three digits."""
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return f"{statistics.mean(values):.3g}" if low == high else f"{statistics.mean(values):.3g} ({low}–{high})"


def render(text: str) -> str:
    """The document with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{globals()[match[1]]()}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- /table -->", table, text, flags=re.DOTALL)


def main(check: bool) -> None:
    """Write the documents, or (``check``) exit with 1 if one is out of date."""
    for path in DOCUMENTS:
        text = path.read_text()
        made = render(text)
        if check and made != text:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date: run python benchmarks/tables.py")
        path.write_text(made)


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
