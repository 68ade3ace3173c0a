"""Damaged weights files of every layout, ours included: each ends in a whole generator, or in one line.

``python tests/fuzz.py --count 10000 --seed 0`` writes small files of all layouts, changes them (bits, counts,
integers, floats, parts of other files, entries of archives, settings), and loads each under a limit of time
and memory, while an audit hook looks out for anything that is executed or written. It prints counts and every
finding, and fails if there is one. A finding is made again by ``--only`` its number, with the same seed.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import dataclasses
import io
import json
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks" / "parity"), str(ROOT)]

from conftest import stylegan3_golden  # noqa: E402
from fill import fill, iterated  # noqa: E402
from test_checkpoints import Discriminator, EasyDict, Generator, Network, Plain, pickled, saved  # noqa: E402

import mlviews  # noqa: E402
from mlviews.generators.film import FilmConfig, FilmGenerator  # noqa: E402
from mlviews.generators.nvae import NVAE, NVAEConfig  # noqa: E402
from mlviews.generators.nvae.reading import source_shapes  # noqa: E402
from mlviews.perturb import Walker  # noqa: E402
from mlviews.weights import checkpoints, configs, write_safetensors  # noqa: E402

SECONDS = 5.0  # of the processor's time, for one file
MEMORY = 500 << 20  # bytes above those of the interpreter with torch
LONGEST = 1000  # letters of a message

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A good file of a layout."""

    name: str  # of the file
    content: bytes
    load: Callable[[Path], nn.Module]


# -- good files ----------------------------------------------------------------------------------------------


def golden(name: str) -> dict[str, Any]:
    """Return what a golden says of the network that it was made with."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        return {key: json.loads(str(file[key])) for key in ("facts", "shapes") if key in file} | {
            "seed": int(file["seed"]) if "seed" in file else 0
        }


def filled(shapes: dict[str, Any], seed: int = 0) -> Tensors:
    """Return weights of these shapes."""
    return fill({name: tuple(shape) for name, shape in shapes.items()}, seed)


def generator(name: str, **options: Any) -> Callable[[Path], nn.Module]:
    """Return what loads a generator by its name."""
    return lambda path: mlviews.load_generator(name, weights=path, **options)


def biggan() -> Iterator[Sample]:
    """Yield files of BigGAN, BigBiGAN, StudioGAN and BigGAN-deep."""
    for case, name, zipped in (
        ("biggan-tiny-32", "biggan", True),
        ("biggan-small-128", "bigbigan", False),
        ("biggan-studiogan-32", "biggan", True),
        ("deep-biggan-tiny-16", "biggan-deep", True),
    ):
        record = golden(case)
        tensors = iterated(filled(record.get("shapes") or record["facts"]["shapes"]))
        for key, value in tensors.items():
            if key.endswith(("_var", "_vars")):
                tensors[key] = value.abs() + 0.1
        yield Sample(f"{case}.pth", saved(tensors, zipped), generator(name))


def vdvae() -> Iterator[Sample]:
    """Yield VDVAE's file."""
    record = golden("vdvae-tiny-8")
    blocks = {key: record["facts"][key] for key in ("dec_blocks", "enc_blocks")}
    content = saved(filled(record["shapes"]))
    yield Sample("vdvae.th", content, generator("vdvae", hps="cifar10", **blocks))


def nvae() -> Iterator[Sample]:
    """Yield the files of both NVAE projects."""
    for case, layout in (("nvlabs-mnist-tiny", "nvae-nvlabs"), ("serezd-tiny", "nvae-serezd")):
        with np.load(ROOT / "tests" / "golden" / f"nvae-{case}.npz") as file:
            facts = json.loads(str(file["facts"]))
        tensors = fill(source_shapes(layout, facts), 0)
        if layout == "nvae-serezd":
            content: dict[str, Any] = {"configuration": facts, "state_dict": tensors}
        else:
            args = argparse.Namespace(
                **{key: value for key, value in facts.items() if key != "arch_instance"}
            )
            content = {"args": args, "arch_instance": facts["arch_instance"], "state_dict": tensors}
        yield Sample(f"{layout}.pt", saved(content, layout == "nvae-nvlabs"), generator("nvae"))


def stylegan2() -> Iterator[Sample]:
    """Yield StyleGAN2's files, of three projects."""
    for case in ("ada-16px-tiny", "tf-16px-tiny", "rosinality-16px-tiny"):
        said = golden(f"stylegan2-{case}")
        tensors = filled(said["shapes"])
        axis = torch.tensor([1.0, 3, 3, 1])
        for key in tensors:
            if key.endswith("resample_filter"):
                tensors[key] = torch.outer(axis, axis) / 64
            if key.endswith("kernel"):
                tensors[key] = torch.outer(axis, axis) / 16
        kind = case.partition("-")[0]
        if kind == "ada":
            g = Generator(tensors, **said["facts"]) if said["facts"] else Generator(tensors)
            content = pickled({"G": None, "D": Discriminator({"b4.bias": torch.zeros(2)}), "G_ema": g})
        elif kind == "tf":
            variables = [(key, value.numpy()) for key, value in tensors.items()]
            facts = EasyDict(said["facts"])
            g_s = Network(
                version=5, name="Gs", static_kwargs=facts, components=EasyDict(), variables=variables
            )
            content = pickled((Network(variables=[]), Network(variables=[]), g_s), 2)
        else:
            content = saved({"g_ema": tensors, "latent_avg": tensors.pop("latent_avg", torch.zeros(1))})
        suffix = "pt" if kind == "rosinality" else "pkl"
        yield Sample(f"stylegan2-{kind}.{suffix}", content, generator("stylegan2", groups=4))


def stylegan3() -> Iterator[Sample]:
    """Yield StyleGAN3's and StyleGAN-XL's files."""
    for case in ("r-16px-tiny", "xl-stem-16px-tiny"):
        tensors, metadata, _ = stylegan3_golden(case)
        # As many features as fit into a small file.
        tensors = {
            name: value[:, :4] if "embed" in name and value.ndim > 1 else value
            for name, value in tensors.items()
        }
        if "mapping.embed.weight" in tensors:
            tensors["mapping.embed.weight"] = tensors["mapping.embed.weight"][:8].clone()
        g = Generator(tensors)
        for module, attributes in json.loads(metadata["facts"])["modules"].items():
            for key, value in attributes.items():
                setattr(g.get_submodule(module), key, np.array(value) if key == "size" else value)
        layout = metadata["layout"]
        yield Sample(
            f"{layout}.pkl", pickled({"G": None, "D": None, "G_ema": g}), generator(layout, groups=4)
        )


def own(folder: Path) -> Iterator[Sample]:
    """Yield files of mlviews' own formats, and the research code's walkers."""
    film = FilmGenerator(FilmConfig(dims=(2, 3), channels=(8, 4), groups=2))
    metadata = configs.metadata(film.FORMAT, film.config)
    write_safetensors(folder / "film.safetensors", film.state_dict(), metadata)
    config = NVAEConfig(groups=(1, 1), latents=(2, 2), encoder=(4, 4, 8), decoder=(4, 4, 8))
    small = NVAE(config)
    write_safetensors(folder / "nvae.safetensors", small.state_dict(), small.metadata())
    Walker(4, {"steps": 3}).save(folder / "walker.safetensors")
    loads = {"film": generator("fashion"), "nvae": generator("fashion-nvae"), "walker": Walker.load}
    for name, load in loads.items():
        file = folder / f"{name}.safetensors"
        yield Sample(file.name, file.read_bytes(), load)
    tensors = {f"walker.{key.removeprefix('net.')}": value for key, value in Walker(4).state_dict().items()}
    yield Sample("walker-module.pth", saved({"nn_walker": Plain(tensors)}, False), Walker.load)
    yield Sample("walker.pth", saved({"nn_walker": dict(tensors)}), Walker.load)


def samples(folder: Path) -> list[Sample]:
    """Return a good file of each layout, and one that was converted."""
    files = [*biggan(), *nvae(), *vdvae(), *stylegan2(), *stylegan3(), *own(folder)]
    source = next(sample for sample in files if sample.name == "stylegan2-ada.pkl")
    (folder / source.name).write_bytes(source.content)
    checkpoints.convert(folder / source.name, folder / "converted.safetensors")
    content = (folder / "converted.safetensors").read_bytes()
    return [*files, Sample("converted.safetensors", content, source.load)]


# -- what happens to them ------------------------------------------------------------------------------------

INTEGERS = (
    0,
    1,
    2,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
FLOATS = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0)
VALUES = (None, True, -1, 0, 1 << 40, 1e300, "", "\x1b[31m\n", "x" * 5000, [], [1] * 5000, {}, {"a": [{}]})
Change = Callable[[bytes, random.Random, list[Sample]], bytes]


def position(data: bytes, rng: random.Random) -> int:
    """Return a place in a file; half of them near its ends, where the structure is."""
    if not data:
        return 0
    edge = min(len(data), 4096)
    return rng.choice(
        (
            rng.randrange(len(data)),
            rng.randrange(edge),
            len(data) - 1 - rng.randrange(edge),
            rng.randrange(len(data)),
        )
    )


def flip(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Flip some bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[position(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Cut the end off, or the beginning."""
    place = position(data, rng)
    return data[:place] if rng.random() < 0.8 else data[place:]


def insert(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Put bytes in between."""
    place = position(data, rng)
    extra = rng.choice(
        (rng.randbytes(rng.choice((1, 4, 100))), bytes([rng.randrange(256)]) * rng.choice((1, 9, 5000)))
    )
    return data[:place] + extra + data[place:]


def remove(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Take bytes out."""
    place = position(data, rng)
    return data[:place] + data[place + rng.choice((1, 2, 4, 8, 100, 4096)) :]


def repeat(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Repeat a part."""
    place = position(data, rng)
    part = data[place : place + rng.choice((1, 8, 64, 4096))]
    return data[:place] + part * rng.choice((2, 3, 200)) + data[place:]


def splice(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Replace a part by one of another file."""
    other = rng.choice(files).content
    start, place, length = position(other, rng), position(data, rng), rng.choice((4, 64, 4096, 1 << 20))
    return data[:place] + other[start : start + length] + data[place + length :]


def number(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Write an integer over some bytes, as a length would be."""
    place, width = position(data, rng), rng.choice((1, 2, 4, 8))
    value = rng.choice((*INTEGERS, len(data), rng.randrange(1 << 16))) & ((1 << 8 * width) - 1)
    return data[:place] + value.to_bytes(width, "little") + data[place + width :]


def value(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Write a float over a weight."""
    place = position(data, rng) // 4 * 4
    return data[:place] + struct.pack("<f", rng.choice(FLOATS)) + data[place + 4 :]


def digits(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Change a number that is written in digits, as in names, settings and shapes."""
    matches = list(re.finditer(rb"\d+", data[: 1 << 16]))
    if not matches:
        return data
    match = rng.choice(matches)
    text = str(rng.choice((*INTEGERS, -1, "1e999", "", rng.randrange(100)))).encode()
    return data[: match.start()] + text + data[match.end() :]


def opcode(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Write an operation of pickle over a byte."""
    place = position(data, rng)
    return (
        data[:place]
        + rng.choice([b"R", b"c", b"\x93", b"\x81", b"b", b"Q", b"u", b"s", b"q\0", b"h\0", b"("])
        + data[place + 1 :]
    )


PLAIN: tuple[Change, ...] = (flip, truncate, insert, remove, repeat, splice, number, value, digits, opcode)


def entries(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Change an entry of an archive, whose checksums are right again afterwards."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        contents = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    pickles = [index for index, (name, _) in enumerate(contents) if name.endswith("data.pkl")]
    index = rng.choice([*pickles, rng.randrange(len(contents))])
    name, content = contents[index]
    what = rng.randrange(6)
    if what == 0:  # twice, with another content
        contents.insert(rng.randrange(len(contents) + 1), (name, rng.choice(PLAIN)(content, rng, files)))
    elif what == 1:
        contents[index] = (rng.choice(contents)[0] + rng.choice(("", "x", "/../x")), content)
    elif what == 2:
        del contents[index]
    else:
        contents[index] = (name, rng.choice(PLAIN)(content, rng, files))
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in contents:
            archive.writestr(name, content)
    return file.getvalue()


def header(data: bytes, rng: random.Random, files: list[Sample]) -> bytes:
    """Change a value in the header of a safetensors file, whose length is right again afterwards."""
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in table if key != "__metadata__"])
    what = rng.randrange(4)
    if what == 0:
        table[rng.choice((name + "x", "\x1b[31m\n", "x" * 2000))] = table.pop(name)
    elif what == 1:
        table[name]["dtype"] = rng.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "X\n"))
    elif what == 2:
        table[name]["shape"] = rng.choice(([], [0], [1 << 62, 4], [1] * 200, table[name]["shape"][::-1]))
    else:
        metadata = table["__metadata__"]
        key = rng.choice(list(metadata))
        metadata[key] = settings(metadata[key], rng)
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def settings(text: str, rng: random.Random) -> str:
    """Change a setting in a JSON text, or the text."""
    try:
        table = json.loads(text)
    except ValueError:
        table = None
    if not isinstance(table, dict) or not table or rng.random() < 0.1:
        return rng.choice(("", "{", "[]", "null", "9" * 5000, "[" * 100_000, text * 2, "\x1b[2J\n"))
    key = rng.choice(list(table))
    if isinstance(table[key], list) and rng.random() < 0.6:
        table[key] = rng.choice((table[key] * 1000, table[key][1:], [*table[key], rng.choice(VALUES)]))
    else:
        table[rng.choice((key, key, key, "x" * 3000))] = rng.choice(VALUES)
    return json.dumps(table)


def changed(sample: Sample, rng: random.Random, files: list[Sample]) -> tuple[bytes, str]:
    """Return a file's content with one to three changes, and what they were."""
    data, names = sample.content, []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(PLAIN)
        if rng.random() < 0.5 and data[:2] == b"PK":
            change = entries
        elif rng.random() < 0.5 and data[8:9] == b"{":
            change = header
        try:
            data = change(data, rng, files)
        except Exception:  # an earlier change left no structure to change
            continue
        names.append(change.__name__)
    return data, "+".join(names)


# -- what may come of it -------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A file took more than its time."""


class Watch:
    """Notes what is executed or written while it is on."""

    FORBIDDEN = (
        *("exec", "compile", "import", "pickle.find_class", "ctypes.dlopen", "builtins.input"),
        *("os.system", "os.posix_spawn", "os.fork", "os.putenv", "os.chmod"),
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir"),
    )

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (
            writes
            or event in self.FORBIDDEN
            or event.startswith(("os.exec", "shutil.", "socket.", "subprocess."))
        ):
            self.events.append(f"{event} {str(arguments)[:200]}")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block if it takes more of the processor's time."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(sample: Sample, path: Path, watch: Watch) -> tuple[str, str]:
    """Return what came of loading a file: "loaded", "refused", or a finding; and what it says."""
    watch.events.clear()
    try:
        with limited(SECONDS):
            watch.on = True
            try:
                module = sample.load(path)
            finally:
                watch.on = False
    except TooSlow:
        return "too slow", ""
    except ValueError as error:
        message = str(error)
        kind = "refused" if is_clear(message) else "unclear message"
    except BaseException as error:
        kind, message = "another error", f"{type(error).__name__}: {error}"
    else:
        weights = [*module.parameters(), *module.buffers()]
        kind = "loaded" if all(bool(weight.isfinite().all()) for weight in weights) else "not finite"
        message = ""
    if watch.events:
        return "executed or written", "; ".join(watch.events[:3])
    return kind, message


def is_clear(message: str) -> bool:
    """Is it one printable line, that says something else than that memory ran out?"""
    return (
        message.isprintable()
        and 0 < len(message) < LONGEST
        and "MemoryError" not in message
        and "alloc" not in message
    )


def main() -> int:
    """Run, and return the number of findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one number to try again, and show")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        return run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> int:
    """Load the files of the numbers asked for, and print what came of them."""
    files = samples(folder)
    # A text operation of pickle imports its codec, which is always this one, before it is refused.
    codecs.lookup("raw-unicode-escape")
    watch = Watch()
    # The good files load; what is imported for that, and for errors, is imported now.
    for sample in files:
        path = folder / sample.name
        path.write_bytes(sample.content)
        sample.load(path)
        for content in (b"", sample.content[: len(sample.content) // 2], sample.content[:-9]):
            path.write_bytes(content)
            outcome(sample, path, watch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)

    counts: dict[str, collections.Counter[str]] = {sample.name: collections.Counter() for sample in files}
    findings, slowest, begin = [], (0.0, 0), time.monotonic()
    numbers = range(arguments.count) if arguments.only is None else [arguments.only]
    for index in numbers:
        rng = random.Random(f"{arguments.seed}/{index}")
        sample = files[index % len(files)]
        content, changes = changed(sample, rng, files)
        path = folder / sample.name
        path.write_bytes(content)
        start = time.process_time()
        kind, message = outcome(sample, path, watch)
        slowest = max(slowest, (time.process_time() - start, index))
        counts[sample.name][kind] += 1
        if kind not in ("loaded", "refused"):
            findings.append(f"{index} ({sample.name}, {changes}): {kind}: {message[:300]!r}")
        if arguments.only is not None:
            print(f"{sample.name}, {changes}, {len(content):,} bytes: {kind}: {message}")

    for name, counter in counts.items():
        print(f"{name:24}", ", ".join(f"{count} {kind}" for kind, count in sorted(counter.items())))
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    print("all".ljust(24), ", ".join(f"{count} {kind}" for kind, count in sorted(total.items())))
    took, which = slowest
    seconds = time.monotonic() - begin
    print(f"{len(findings)} findings; slowest {took:.2f} s of CPU (number {which}); {seconds:.0f} s in all")
    print(*findings, sep="\n", end="\n" if findings else "")
    return len(findings)


if __name__ == "__main__":
    sys.exit(bool(main()))
