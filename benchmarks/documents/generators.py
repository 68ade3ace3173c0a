"""Our networks beside the official ones: records of ``parity/`` and of the two speed benchmarks."""

from __future__ import annotations

from documents.common import Record, captioned, markdown, provenance, table, threads, with_range

IMAGE_KEYS = {  # differences of images, over all ways to compute them
    "biggan": ("max", "max_with_graph"),
    "biggan-deep": ("max", "max_with_graph", "max_by_scale"),
    "stylegan2": ("decode", "with_gradients", "crop", "crop_and_average"),
    "stylegan3": ("decode", "with_gradients", "crop_and_average"),
    "psp": ("decode", "reconstruct"),
    "nvae": ("decode", "reconstruct"),
    "vdvae": ("decode", "decode_0.6", "decode_scales", "reconstruct"),
    "diffusion": ("max",),
}
MEMORY = {  # rows of the record and what they are called
    "resident_before_step": "weights and program, before the step",
    "resident_peak_in_step": "working memory: growth of the resident set in the step",
    "allocated_peak_in_step": "working memory: peak of torch's allocations",
}
TIMES = ["work", "original", "ours", "times as fast, wall", "by CPU time (quartiles)"]
SIDES = {"research": "research code", "ours": "ours", "ours, micro_batch_size=4": "ours, micro_batch_size=4"}


@table("parity-nvae")
def nvae_parity(record: Record) -> str:
    """Ours beside the official NVAE codes."""
    rows = []
    for layout, name in (("nvlabs", "NVlabs/NVAE"), ("serezd", "SerezD/NVAE-from-scratch")):
        cases = [case for case in record["cases"] if case["case"].startswith(layout)]
        decoding = max(case[key] for case in cases for key in ("decode", "decode_0.6", "decode_scales"))
        speedups = [case["speedup"] for case in cases if "speedup" in case]
        rows.append([
            name,
            f"{len(cases)}",
            _sizes(cases),
            f"{decoding:.1e}",
            f"{max(case['reconstruct'] for case in cases):.1e}",
            with_range(speedups, ".1f"),
        ])  # fmt: skip
    header = [
        "official code", "networks", "images", "largest difference, decoding", "encoding and decoding",
        "times as fast",
    ]  # fmt: skip
    batch = next(case["batch"] for case in record["cases"] if "batch" in case)
    return captioned(
        markdown(header, rows),
        "Of images in [0, 1], random weights, float32.",
        f"Speed: decoding {batch} images in turns, mean (range) over networks, {threads(record)}.",
        provenance(record),
    )


@table(*(f"parity-{name}" for name in IMAGE_KEYS))
def parity(*records: Record) -> str:
    """Largest differences from the official code, over all networks and ways to compute them."""
    rows = []
    for name, record in zip(IMAGE_KEYS, records, strict=True):
        cases = record["cases"]
        if isinstance(cases, dict):
            cases = list(cases.values())
        worst = max(case[key] for case in cases for key in IMAGE_KEYS[name] if key in case)
        rows.append([name, str(len(cases)), _sizes(cases), f"{worst:.1e}"])
    header = ["architecture", "networks", "images", "largest difference of a pixel in [0, 1]"]
    return captioned(markdown(header, rows), "float32.", provenance(*records))


@table("biggan-deep-speed")
def deep_speed(record: Record) -> str:
    """BigGAN-deep beside the original, in turns."""
    return _in_turns(record, "BigGAN-deep", "pytorch-pretrained-BigGAN", "last two resolutions")


@table("vdvae-speed")
def vdvae_speed(record: Record) -> str:
    """VDVAE beside the official code, in turns."""
    return _in_turns(record, "VDVAE", "openai/vdvae", "last scale")


def _in_turns(record: Record, name: str, original: str, moved: str) -> str:
    """Return the times of an architecture and of its original code, and what pairs differ in."""
    shared = "The machine was shared with other work meanwhile." if record["machine_was_shared"] else ""
    return captioned(
        markdown(TIMES, stylegan2_times(record, name)),
        f"Channels of the published networks, random weights, against {original}; pairs are an anchor and a "
        f"positive that differ in the {moved} only.",
        f"Both sides in turns, {threads(record)}. {shared}".strip(),
        provenance(record),
    )


DIFFUSION_CASES = {  # how the names of the cases begin, and what they are
    "ddpm": "DDPM",
    "ddim": "DDIM with noise",
    "ancestral": "ancestral Euler",
    "consistency": "consistency models",
    "lcm": "LCM",
    "tcd": "TCD",
    "dit": "DiT's pipeline",
    "text": "text-to-image, in a loop",
    "stable": "Stable Diffusion's pipeline",
    "sdxl": "SDXL's pipeline",
    "latent": "LCM's pipeline",
}


@table("parity-diffusion")
def diffusion(record: Record) -> str:
    """Our samplers beside diffusers', and the time for pairs of views."""
    rows = []
    for begin, title in DIFFUSION_CASES.items():
        cases = [case for case in record["cases"] if case["case"].startswith(begin)]
        rows.append([title, str(len(cases)), f"{max(case['max'] for case in cases):.1e}"])
    times = [
        f"{case['case']}, {case['ours']:.2f} s instead of {case['diffusers']:.2f} s, {case['ratio']:.2f} "
        f"times as fast ({case['quartiles'][0]:.2f}–{case['quartiles'][1]:.2f})"
        for case in record["seconds"]
    ]
    first = record["seconds"][0]
    return captioned(
        markdown(["sampler", "cases", "largest difference of a pixel in [0, 1]"], rows),
        f"Against diffusers {record['diffusers']}, given the same noises; tiny networks, random weights, "
        "float32.",
        f"Processor time for {first['pairs']} pairs of {first['steps']} steps at {first['image'][1]} px, "
        f"both in turns, {threads(record)}, median (quartiles): {'; '.join(times)}.",
        provenance(record),
    )


@table("biggan-speed", "stylegan2-speed", "stylegan3-speed")
def speed(biggan: Record, stylegan2: Record, stylegan3: Record) -> str:
    """Ours beside the research code and the official code, in turns."""
    rows = [
        *biggan_times(biggan),
        *stylegan2_times(stylegan2),
        *stylegan2_times(stylegan3, "StyleGAN3"),
    ]
    times = captioned(
        markdown(TIMES, rows),
        "BigBiGAN: the whole step (latents, both views, crop and flip to 112 px) against the research code's "
        "`BatchManager` and generator.",
        'StyleGAN2: config-f channels, against stylegan2-ada-pytorch\'s generator; "last group" is an '
        "anchor and a positive that differ in the last of four groups.",
        "StyleGAN3: configurations t and r, and StyleGAN-XL with two stages, of "
        f"1/{32768 // stylegan3['base']} of the published networks' channels, against the official "
        "generators' reference operations.",
        f"Both sides in turns, {threads(biggan)} ({threads(stylegan3)} for StyleGAN3), random weights.",
        provenance(biggan, stylegan2, stylegan3),
    )
    return f"{times}\n\n{biggan_memory(biggan)}\n\n{stylegan3_memory(stylegan3)}"


def biggan_times(record: Record, part: str = "step") -> list[list[str]]:
    """Return rows of TIMES for our steps and the research code's (``part``: step or generator)."""
    rows = []
    for name, parts in record["steps"].items():
        wall, cpu = parts[part]["wall"], parts[part]["cpu"]
        low, high = cpu["ratio"]["quartiles"]
        rows.append([
            f"BigBiGAN, {record['pairs']} pairs, {name} moved",
            f"{wall['research']['median']:.2f} s",
            f"{wall['ours']['median']:.2f} s",
            f"{wall['ratio']['median']:.2f}",
            f"{cpu['ratio']['median']:.2f} ({low:.2f}–{high:.2f})",
        ])  # fmt: skip
    return rows


def stylegan2_times(record: Record, name: str = "StyleGAN2") -> list[list[str]]:
    """Return rows of TIMES for our images and the official generator's."""
    rows = []
    for case in record["cases"]:
        low, high = case["ratio_quartiles"]
        rows.append([
            f"{name}, {case['images']} images, {case['case']}",
            f"{case['official']['wall']['median']:.2f} s",
            f"{case['ours']['wall']['median']:.2f} s",
            f"{case['ratio_wall']:.2f}",
            f"{case['ratio']:.2f} ({low:.2f}–{high:.2f})",
        ])  # fmt: skip
    return rows


def biggan_memory(record: Record) -> str:
    """Return the working memory of a step."""
    memory = record["memory_mib"]
    rows = [[title, *(f"{memory[side][key]:.0f}" for side in SIDES)] for key, title in MEMORY.items()]
    pairs = record.get("memory_pairs", record["pairs"])
    return markdown([f"BigBiGAN, {pairs} pairs, MiB", *SIDES.values()], rows)


def stylegan3_memory(record: Record) -> str:
    """Return the memory of the images of both sides, one column a case: official, ours."""
    titles = {
        "resident_peak": "peak of the resident set, weights and all",
        "allocated_peak": "peak of torch's allocations for the images",
    }
    rows = []
    for key, title in titles.items():
        pairs = [[case["memory_mib"][side][key] for side in ("official", "ours")] for case in record["cases"]]
        rows.append([title, *(f"{official:.0f} / {ours:.0f}" for official, ours in pairs)])
    return markdown(["StyleGAN3, MiB, original / ours", *(case["case"] for case in record["cases"])], rows)


@table("biggan-speed")
def precision(record: Record) -> str:
    """Options of the source, measured on BigBiGAN."""
    rows = []
    for name, times in record["options"].items():
        if "error" in times:  # no compiler, no instructions for it
            rows.append([name, times["error"], ""])
        else:
            rows.append(
                [name, f"{times['wall']['median']:.2f} s", f"{times['cpu_of_float32']['median']:.2f}"]
            )
    return captioned(
        markdown(["option", "median step", "CPU time, of float32"], rows),
        f"BigBiGAN, {record['pairs']} pairs, levels 2-6 moved, {threads(record)}; compilation itself is "
        "not counted.",
        provenance(record),
    )


def _sizes(cases: list[Record]) -> str:
    """Return the smallest and the largest side of the cases' images."""
    sides = [case["resolution"] if "resolution" in case else case["image"][1] for case in cases]
    return f"{min(sides)}–{max(sides)} px"
