"""``benchmarks/paper``: the paper's claims beside ours, its experiments as commands, a long run on paper."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from paper.run import ALIASES, EXPERIMENTS, Claim, Experiment, load, on_record
from record import RESULTS, interval, with_interval

from documents.common import Record, captioned, markdown, read, table, with_range
from documents.loaders import at_largest_batch, name_of

PROBES = ("probe", "learned/probe", "table4/probe")  # records with cells of methods and sources
SCORES = {"linear 100%": "linear", "kNN": "kNN"}
VERDICTS = {(True, False): "yes", (False, True): "no", (False, False): "not clear", (True, True): "not clear"}

Ours = tuple[str, str]  # figures, and whether the claim holds


@table(also=(*PROBES, "impact", "loaders"))
def paper_claims() -> str:
    """The paper's claims, its figures, and ours."""
    rows = []
    for name in EXPERIMENTS:
        experiment = load(name)
        for claim in experiment.claims:
            options = dict(claim.ours)
            figures, verdict = KINDS[options.pop("kind")](**options)
            rows.append(
                [_title(name), f"{_capital(claim.claim)}.", _figures(experiment, claim), figures, verdict]
            )
    return captioned(
        markdown(["", "the paper says", "its figures", "ours, in miniature", "holds in ours"], rows),
        "Ours are top-1 in percent on real Fashion-MNIST images, and the difference at the same seed, ± half "
        "of its 95 % interval over seeds.",
        'Of such a claim, "yes": the interval of the linear probe or of kNN is above 0, and neither is '
        'below; "no": the reverse; "not clear": else; "one seed": nothing can be said.',
        '"A little slower" is taken as at most 1.3 times.',
        "Sources and T_x are named as in [the table of views](../README.md#views-compared).",
    )


@table()
def paper_commands() -> str:
    """What to run, and what was run."""
    rows = []
    for name in EXPERIMENTS:
        experiment = load(name)
        links = [
            _link(command.record) if on_record(command) else f"{command.record}: not run"
            for command in experiment.fashion.commands
        ]
        paper = experiment.paper
        needs = [", ".join(f"`{file}`" for file in paper.needs)]
        machine = [f"the paper took {paper.machine}"] if paper.machine else []
        rows.append([
            f"{_title(name)}: {experiment.title} ({experiment.section})",
            f"`run.py {name}`",
            ", ".join(links),
            "; ".join(filter(None, [*needs, *machine])),
            paper.missing,
        ])  # fmt: skip
    header = [
        "of the paper",
        "command",
        "records with `--scale fashion`",
        "`--scale paper` needs",
        "it leaves out",
    ]
    return markdown(header, rows)


def _title(name: str) -> str:
    """Return an experiment's name with its other one."""
    names = [name, *(alias for alias, target in ALIASES.items() if target == name)]
    return ", ".join(names).replace("table", "table ").replace("figure", "figure ").replace("-", " ")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _figures(experiment: Experiment, claim: Claim) -> str:
    """Return the paper's figures for a claim."""
    if not claim.of:
        return "bars, without numbers"
    values = experiment.figures[claim.of]
    return f"{claim.of}; {', '.join(f'{row}: {values[row]}' for row in claim.rows)}"


# -- ours, by the kind of a claim ----------------------------------------------------------------------------


def pair(method: str, of: str, less: str) -> Ours:
    """Return the scores of two sources, their paired difference, and whether the first is above."""
    records = [read(name) for name in PROBES if (RESULTS / f"{name}.json").exists()]
    cells = [cell for record in records for cell in record["cells"] if cell["method"] == method]
    scores = {(cell["source"], cell["seed"]): cell["scores"] for cell in cells}
    seeds = sorted({seed for source, seed in scores if source == of and (less, seed) in scores})
    if not seeds:
        return f"`{method}`, {of} against {less}", "not run"
    texts, above, below = [], False, False
    for key, label in SCORES.items():
        first, second = ([scores[source, seed][key] for seed in seeds] for source in (of, less))
        difference = interval([a - b for a, b in zip(first, second, strict=True)])
        half = math.inf if difference["half"] is None else difference["half"]
        above, below = above or difference["mean"] - half > 0, below or difference["mean"] + half < 0
        means = f"{statistics.mean(first):.1f} against {statistics.mean(second):.1f}"
        texts.append(f"{label} {means} ({with_interval(difference, sign='+')})")
    verdict = "one seed" if len(seeds) == 1 else VERDICTS[above, below]
    return f"`{method}`, {of} against {less}: {'; '.join(texts)}", verdict


def growth(generator: str, method: str) -> Ours:
    """Return the levels' distances for one loss, and whether each is larger than the one before."""
    record = read("impact")
    levels = _levels(record, generator, method)
    means = [statistics.mean(row["distance_mean"] for row in level) for level in levels]
    correlation = record["agreement"][generator][f"{method} with the level"]
    distances = ", ".join(
        f"{level[0]['level']} {mean:.3g}" for level, mean in zip(levels, means, strict=True)
    )
    steps = [a < b for a, b in itertools.pairwise(means)]
    figures = f"`{generator}`, {method}s, mean distance: {distances}; rank correlation {correlation:.2f}"
    return figures, f"{sum(steps)} of {len(steps)} steps"


def use(method: str, level: int, verdict: str) -> Ours:
    """Return a level's verdicts for the bundled generators, and how many are the claimed one."""
    record = read("impact")
    texts, votes = [], []
    for generator in record["agreement"]:
        rows = _levels(record, generator, method)[level]
        verdicts = [row["verdict"] for row in rows]
        loss = with_range([row["loss_nats"] for row in rows], ".2f")
        texts.append(f"`{generator}` {rows[0]['level']}: {', '.join(dict.fromkeys(verdicts))} at {loss} nats")
        votes += [text == verdict for text in verdicts]
    share = f"{sum(votes)} of {len(votes)} runs"
    return f"{method}s, {'; '.join(texts)}", share


def speed(than: str, between: tuple[float, float]) -> Ours:
    """Return how long a step takes as a multiple of another loader's, and where that is in a range."""
    rows = at_largest_batch(read("loaders"))
    steps = {(row["size"], name_of(row)): row["step_s"] for row in rows}
    ratios = {
        size: steps[size, "mlviews"]["median"] / steps[size, than]["median"]
        for size in dict.fromkeys(size for size, _ in steps)
    }
    texts = [f"{ratio:.2f} times a step of `{than}` at {size} px" for size, ratio in ratios.items()]
    count = sum(between[0] < ratio <= between[1] for ratio in ratios.values())
    return f"on a CPU, {', '.join(texts)}", f"at {count} of {len(ratios)} sizes"


KINDS: dict[str, Callable[..., Ours]] = {"pair": pair, "growth": growth, "use": use, "speed": speed}


def _levels(record: Record, generator: str, method: str) -> list[Sequence[Any]]:
    """Return the rows of each level, one a seed."""
    cells = [
        cell["rows"] for cell in record["cells"] if (cell["generator"], cell["method"]) == (generator, method)
    ]
    return list(zip(*cells, strict=True))


# -- a long run ----------------------------------------------------------------------------------------------

EPOCHS, IMAGES, BATCH, DEVICES = 100, 1_281_167, 1024, 4  # of table 2
LEVELS, WIDTH, MOVED = 6, 20, 5  # of BigBiGAN's latents, and the levels that positives draw noise for
CROP = 112  # pixels a side
RESNET50 = 23_508_032  # weights, without the classifier


@table("biggan-speed", "loaders", "overhead")
def paper_long_run(biggan: Record, loaders: Record, overhead: Record) -> str:
    """What table 2's run takes, on paper."""
    steps = EPOCHS * (IMAGES // BATCH)
    samples = steps * BATCH
    numbers = (LEVELS + MOVED) * WIDTH
    generator = biggan["steps"]["levels 2-6"]["step"]["wall"]["ours"]["median"] / biggan["pairs"]
    (step,) = (row for row in at_largest_batch(loaders) if (name_of(row), row["size"]) == ("mlviews", 128))
    waiting, training = (step[key]["median"] / step["batch_size"] for key in ("data_s", "training_s"))
    weights = next(
        row["bytes"] for row in loaders["disk"] if (row["loader"], row["size"]) == ("mlviews", 128)
    )
    views = 2 * 3 * CROP * CROP * 4
    gradients = 2 * (DEVICES - 1) / DEVICES * RESNET50 * 4  # of a ring's all-reduce, bytes a device and step

    def took(what: str, seconds: float, record: str) -> list[str]:
        return [what, f"{seconds:.3f} s", _years(seconds * samples), _link(record)]

    def moved(what: str, size: float) -> list[str]:
        return [what, f"{size / 1e3:.0f} kB", f"{size * samples / 1e12:.1f} TB", "arithmetic"]

    rows = [
        ["samples", "1", f"{samples / 1e6:,.1f} million, in {steps:,} steps", "arithmetic"],
        ["random numbers for latents", f"{numbers}", f"{numbers * samples / 1e9:,.1f} billion", "arithmetic"],
        ["images generated", "2", f"{2 * samples / 1e6:,.1f} million", "arithmetic"],
        took("BigBiGAN's two views, one CPU thread", generator, "biggan-speed"),
        took("the wait for them in a training, two threads", waiting, "loaders"),
        took("a ResNet-18's part of that step", training, "loaders"),
        ["views read from a disk, or copied to a device", "0 kB", "0 TB", "by design"],
        ["the generator's weights, once a device", "", f"{weights / 1e6:.0f} MB", _link("loaders")],
        moved("what a loader would copy to devices: two crops, float32", views),
        moved("gradients of a ResNet-50 between four devices, each", gradients / BATCH),
    ]
    share = waiting / (waiting + training)
    return captioned(
        markdown(["what", "a sample", f"{EPOCHS} epochs of {IMAGES:,}, batches of {BATCH:,}", "from"], rows),
        f"On two threads a step spends {share:.0%} of its time in the generator. All else that a source does "
        f"is {overhead['overhead_of_generator']:.1%} of the generator's time, and T_x "
        f"{overhead['t_x_of_generator']:.1%} ({_link('overhead')}, of the small generator `fashion`).",
        f"The first time is of {biggan['machine']['processor']}, the others of "
        f"{loaders['machine']['processor']}; no GPU was measured.",
    )


def _years(seconds: float) -> str:
    """Return seconds as days, or as years."""
    days = seconds / 86_400
    return f"{days:,.0f} days" if days < 730 else f"{days / 365.25:.1f} years"


def _link(name: str) -> str:
    """Return a record as a link from benchmarks/paper."""
    return f"[{name}](../results/{name}.json)"
