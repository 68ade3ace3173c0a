"""Publishing a generator: its weights, settings, pictures and model card in one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mlviews.checks import flag, integer, path_of
from mlviews.errors import listing
from mlviews.generators import MLVGM, load_generator, published
from mlviews.generators.diffusion import texts
from mlviews.generators.diffusion.folder import needed_files
from mlviews.generators.inverter import Inverter
from mlviews.generators.published import DIFFUSERS, INVERTER, PROMPTS, WEIGHTS
from mlviews.generators.registry import BUNDLED, is_architecture, is_bundled
from mlviews.identity import generator_identity
from mlviews.impact import ImpactReport
from mlviews.perturb import Normal
from mlviews.runs.checkpoint import differences
from mlviews.runs.files import fingerprint, warn_of_other_weights, whole_folder
from mlviews.sharing import card
from mlviews.sharing.upload import client, upload
from mlviews.weights import checkpoints
from mlviews.weights.files import format_of

TRAINING = "training.json"
"""What a folder of :mod:`mlviews.zoo.train_diffusion` says of the training."""

_ROW, _VARIANTS = 8, 7  # samples in a row of the picture, and what is drawn anew of a level
_BATCH = 8  # images that are made at once
_BUNDLED_LICENSE, _LICENSE_FILE = "mit", "LICENSE-fashion-mnist"  # of the bundled weights' data


def publish(
    generator: MLVGM,
    folder: str | Path,
    *,
    report: ImpactReport | str | Path | None = None,
    license: str | None = None,
    trained_on: str | None = None,
    samples: int = 32,
    overwrite: bool = False,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Write a generator into a folder from which anybody loads it without trust; upload it if asked for.

    ``load_generator(FOLDER)``, or ``load_generator("owner/name")`` once it is uploaded, gives the same
    generator, to the bit, with its options and its inverter; that is tried before the folder appears. It
    holds ``config.json``, ``model.safetensors`` (a diffusion model: ``diffusers/``), ``inverter.safetensors``
    if the generator has one, ``impact.json`` if there is a report, pictures, and a model card. It is whole or
    not there.

    Args:
        generator: a generator of :func:`mlviews.load_generator`, as its weights file has it.
        folder: the folder to write.
        report: how much its levels matter: a report, or the folder of one; None for none.
        license: the name of the weights' license as Hugging Face has it, e.g. "mit"; None if it is not known.
        trained_on: what it was trained on, for the model card; None for what the weights file says.
        samples: images in the picture of samples; 0 for no pictures.
        overwrite: whether the folder of an earlier call is replaced.
        push: the Hugging Face repository (``owner/name``) that it is uploaded to; None for none. The token is
            huggingface_hub's business.
        private: whether a repository that is made for it is private.

    Returns:
        The folder.

    Raises:
        ValueError: for a generator that no name stands for, or whose weights have changed since they were
            read; for a folder that is there; for a report of another generator; or a bad value.
        FileNotFoundError: if the weights file is not there any more, or there is no such report.
        ModuleNotFoundError: if it is to be uploaded, and huggingface_hub is not installed.
        OSError: if the folder cannot be written, or the upload fails.
    """
    weights = _weights(generator)
    folder = path_of(folder, "folder").expanduser()
    if not folder.name or folder.is_symlink():
        raise ValueError(f"Invalid folder {str(folder)!r}: give the name of a new folder, which is no link.")
    samples = integer("samples", samples, 0, 1024)
    _check_license(license)
    _check_free(folder, flag("overwrite", overwrite))
    if push is not None:
        client(push)
    if report is not None:
        report = _checked_report(report, generator)
    if license is None:
        license = _known_license(weights)
    with whole_folder(folder) as part:
        names, options = _write_weights(generator, weights, part)
        settings = published.write(part, generator, options, license, names)
        _check_same(generator, part)
        notice = (BUNDLED if is_bundled(weights) else weights.parent) / _LICENSE_FILE
        if notice.is_file():
            shutil.copyfile(notice, part / _LICENSE_FILE)
        if samples:
            _draw(generator, part, samples)
        if report is not None:
            report.save_figures(part)
        text = card.card(
            generator,
            settings,
            push or folder.name,
            license=license,
            trained_on=trained_on,
            provenance=_provenance(generator, weights),
            report=report,
        )
        (part / "README.md").write_text(text, encoding="utf-8", newline="\n")
    if push is not None:
        upload(folder, push, private)
    return folder


# -- checks before the work ----------------------------------------------------------------------------------


def _weights(generator: Any) -> Path:
    """Return the file or folder that a generator was read from.

    Raises:
        ValueError: if it is no generator of the registry, or was not read from a file.
    """
    if not isinstance(generator, MLVGM):
        raise ValueError(
            f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM, as "
            "load_generator returns it."
        )
    if not is_architecture(generator.name):
        raise ValueError(
            f"Generator {generator.name!r} cannot be published: only the architectures of "
            "mlviews.list_generators() can be loaded without its code."
        )
    if generator.weights_file is None:
        raise ValueError(
            f"Generator {generator.name!r} was not read from a file: write its weights by "
            "mlviews.weights.checkpoints.convert(MODULE, 'FILE.safetensors'), and load it from there."
        )
    return generator.weights_file


def _check_license(license: Any) -> None:
    """Raise a ValueError if it is no name of a license."""
    if license is not None and not published.LICENSE_NAME.fullmatch(str(license)):
        raise ValueError(
            f"Invalid license={license!r}: give its name as Hugging Face has it, e.g. 'mit' or "
            "'cc-by-nc-4.0'."
        )


def _known_license(weights: Path) -> str | None:
    """Return the license of weights that are bundled or were published; None if it is not known."""
    if is_bundled(weights):
        return _BUNDLED_LICENSE
    try:
        return published.read(weights.parent).license
    except (OSError, ValueError):  # no published folder
        return None


def _check_free(folder: Path, overwrite: bool) -> None:
    """Raise a ValueError if something is there that must not be replaced."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if is_empty or not folder.exists():
        return
    if not overwrite:
        raise ValueError(
            f"The folder {folder} is there already: choose another, or overwrite it (overwrite=True, "
            "--overwrite)."
        )
    try:
        published.read(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is not overwritten, as it holds no published generator: choose another folder."
        ) from error


def _checked_report(report: ImpactReport | str | Path, generator: MLVGM) -> ImpactReport:
    """Return the report, once it is of this generator."""
    if not isinstance(report, ImpactReport):
        report = ImpactReport.load(report)
    levels = tuple((level.name, tuple(level.shape)) for level in generator.levels)
    options = _plain(generator.options)
    measured = _plain(report.options.get("generator", {}))
    if (report.generator, report.levels, measured) != (generator.name, levels, options):
        raise ValueError(
            f"The report is of generator {report.label!r} with {len(report.levels)} levels and options "
            f"{measured}, not of {generator.name!r} with {len(levels)} levels and options {options}: measure "
            "this one, by mlviews impact."
        )
    warn_of_other_weights("The report", report.options.get("weights"), generator, generator.name)
    return report


def _check_same(generator: MLVGM, folder: Path) -> None:
    """Raise a ValueError if the folder makes another generator: weights that changed since they were read."""
    copy = load_generator(folder, device=generator.device)
    original, other = (generator_identity(g) | {"options": {}} for g in (generator, copy))
    changed = differences(original, other)
    if _fingerprint(generator.inverter) != _fingerprint(copy.inverter):
        changed.append("the inverter")
    if changed:
        raise ValueError(
            f"Generator {generator.name!r} is not the one of its file {generator.weights_file} any more "
            f"({listing(changed[:3])}): load it again."
        )


def _fingerprint(module: nn.Module | None) -> str | None:
    return None if module is None else fingerprint(module)


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: tuples are lists."""
    return json.loads(json.dumps(value))


# -- what the folder holds -----------------------------------------------------------------------------------


def _write_weights(generator: MLVGM, weights: Path, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Write weights, inverter and prompts; return the files' paths, and the options to load them with.

    Raises:
        ValueError: for pickled files of a diffusion model, or an inverter that has no file format.
    """
    options = _plain(generator.options)
    if weights.is_dir():
        names = _copy_diffusers(weights, folder, options)
    elif (format_of(weights) or "").startswith("mlviews."):
        names = [_copy(weights, folder / WEIGHTS)]
    else:
        checkpoints.convert(weights, folder / WEIGHTS)
        names = [WEIGHTS]
    if isinstance(generator.inverter, Inverter):
        generator.inverter.save(folder / INVERTER)
        names.append(INVERTER)
    prompts = options.get("prompts")
    if isinstance(prompts, str):
        path = Path(prompts)
        if path.suffix == ".safetensors":
            names.append(_copy(path, folder / PROMPTS))
            options["prompts"] = PROMPTS
        else:
            options["prompts"] = texts.lines(path)
    return names, options


def _copy_diffusers(weights: Path, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """Copy those files of a diffusion model that are read; return their paths in the folder."""
    names = [file.relative_to(weights).as_posix() for file in weights.rglob("*") if file.is_file()]
    prompts = options.get("prompts")
    with_texts = prompts is not None and not str(prompts).endswith(".safetensors")
    needed = needed_files(names, options.get("variant"), with_texts)
    pickled = [name for name in needed if name.endswith(".bin")]
    if pickled:
        raise ValueError(
            f"{weights} has pickled weights ({listing(pickled[:3])}), which are not published: write it anew "
            "by diffusers' save_pretrained(FOLDER, safe_serialization=True)."
        )
    needed += [name for name in (TRAINING,) if name in names]
    for name in needed:
        (folder / DIFFUSERS / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights / name, folder / DIFFUSERS / name)
    return [f"{DIFFUSERS}/{name}" for name in needed]


def _copy(file: Path, target: Path) -> str:
    """Copy a file; return its new name."""
    shutil.copyfile(file, target)
    return target.name


def _provenance(generator: MLVGM, weights: Path) -> Mapping[str, Any]:
    """Return what the weights say of the training."""
    if (weights / TRAINING).is_file():
        return dict(json.loads((weights / TRAINING).read_text("utf-8")))
    return generator.provenance


# -- pictures ------------------------------------------------------------------------------------------------


def _draw(generator: MLVGM, folder: Path, count: int) -> None:
    """Draw samples, and below each other the first one with each level drawn anew."""
    images: list[Tensor] = []
    for start in range(0, count, _BATCH):
        indices = range(start, min(start + _BATCH, count))
        labels = generator.sample_labels(indices) if generator.num_classes else None
        images += generator(generator.sample_latents(indices), labels).cpu()
    _save([images[start : start + _ROW] for start in range(0, count, _ROW)], folder / card.SAMPLES)
    _save([_moved(generator, level) for level in range(len(generator.levels))], folder / card.LEVELS)


def _moved(generator: MLVGM, level: int) -> list[Tensor]:
    """Return the first sample, and the same with a level drawn anew, images ``[C, H, W]`` each."""
    law = Normal(1.0, generator.truncation)
    labels = generator.sample_labels(range(1)) if generator.num_classes else None
    anchor = generator.sample_latents(range(1))
    views = [anchor]
    for view in range(1, _VARIANTS + 1):
        (noise,) = generator.sample_noise(range(1), law, view=view, levels=[level])
        views.append([*anchor[:level], noise, *anchor[level + 1 :]])
    return [image[0].cpu() for image in generator.decode_views(views, level, labels)]


def _save(rows: list[list[Tensor]], path: Path) -> None:
    """Write rows of images as a PNG."""
    from mlviews.viz import mosaic  # matplotlib takes a second that errors need not wait for

    pixels = (mosaic(rows) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(path)
