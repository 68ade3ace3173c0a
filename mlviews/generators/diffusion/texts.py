"""Prompts as classes: texts are encoded once, when a model is loaded, and a label picks one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlviews.errors import WeightsError, listing
from mlviews.generators.diffusion.folder import CONFIG, Folder, arguments
from mlviews.weights import fit
from mlviews.weights.checkpoints import read_tensors
from mlviews.weights.files import check_finite, printable, to_float32
from mlviews.weights.tables import read_table

MOST_PROMPTS = 100_000
_PREFIX = "text_model."
_BATCH = 32  # prompts that are encoded at once
_LONGEST_FILE = 64 << 20  # bytes of a file of prompts

EMBEDDINGS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
"""The tensors of a file of encoded prompts, named as diffusers' pipelines name them."""


@dataclass(frozen=True)
class Texts:
    """Encoded prompts; the last one stands for no prompt."""

    tokens: Tensor  # float32 [N + 1, length, D]
    pooled: Tensor | None  # float32 [N + 1, P], for networks that take it


def read_texts(prompts: Any, folder: Folder, needs_empty: bool) -> Texts:
    """Return prompts as the folder's text encoders understand them, or as a file has them already.

    Args:
        prompts: a list of texts; the path of a text file with one on each line; or that of a safetensors file
            with the tensors of ``EMBEDDINGS``, of which the first is needed.
        folder: the model's.
        needs_empty: whether an encoding of no prompt is needed, for guidance.

    Raises:
        ValueError: if it is none of these.
        FileNotFoundError: if there is no such file.
        mlviews.WeightsError: if the file of encoded prompts, or a text encoder, is damaged.
        ModuleNotFoundError: without the package transformers, if prompts are to be encoded.
    """
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        if path.suffix == ".safetensors":
            return _stored(path, needs_empty)
        prompts = lines(path)
    is_list = isinstance(prompts, Sequence) and all(isinstance(prompt, str) for prompt in prompts)
    if not is_list or not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ValueError(
            f"Invalid prompts={printable(repr(prompts), 80)}: give 1 to {MOST_PROMPTS:,} texts, a text file "
            "with one on each line, or a .safetensors file of encoded ones."
        )
    return _encoded(list(prompts), folder)


def lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"No file of prompts {path}.")
    try:
        text = path.read_text("utf-8") if path.stat().st_size <= _LONGEST_FILE else ""
    except (UnicodeDecodeError, OSError):
        text = ""
    stripped = [line.strip() for line in text.splitlines() if line.strip()]
    if not stripped:
        raise ValueError(f"{path} is no file of prompts: it has one prompt on each line, in UTF-8.")
    return stripped


def _stored(path: Path, needs_empty: bool) -> Texts:
    """Return the prompts of a file of encoded ones."""
    tensors = read_tensors(path)
    unknown = sorted(tensors.keys() - set(EMBEDDINGS))
    if unknown or EMBEDDINGS[0] not in tensors:
        raise WeightsError(
            f"{path} is no file of encoded prompts: it may hold {listing(EMBEDDINGS)}, the first in any case."
        )
    values = {name: to_float32(tensor, name, path) for name, tensor in tensors.items()}
    for name, value in values.items():
        check_finite(value, name, path)
    if needs_empty and EMBEDDINGS[1] not in values:
        raise WeightsError(f"{path} has no {EMBEDDINGS[1]}, which guidance needs: add it, or guidance=1.")
    tokens, pooled = (
        _with_empty(values.get(EMBEDDINGS[place]), values.get(EMBEDDINGS[place + 1]), 3 - place // 2, path)
        for place in (0, 2)
    )
    if tokens is None or (pooled is not None and len(pooled) != len(tokens)):
        raise WeightsError(f"{path} does not have as many pooled prompts as prompts.")
    return Texts(tokens, pooled)


def _with_empty(prompts: Tensor | None, empty: Tensor | None, axes: int, path: Path) -> Tensor | None:
    """Return encoded prompts, and after them that of no prompt; zeros if there is none."""
    if prompts is None:
        return None
    if empty is None:
        empty = torch.zeros(1, *prompts.shape[1:])
    fits = prompts.ndim == empty.ndim == axes and prompts.shape[1:] == empty.shape[1:]
    if not fits or 0 in (len(prompts), len(empty)):
        raise WeightsError(
            f"{path} holds encoded prompts of shape {tuple(prompts.shape)}, and for no prompt "
            f"{tuple(empty.shape)}: they are [N, length, D] and [1, length, D]; pooled, [N, P] and [1, P]."
        )
    return torch.cat([prompts, empty[:1]])


# -- encoding ------------------------------------------------------------------------------------------------


def _encoded(prompts: list[str], folder: Folder) -> Texts:
    """Return prompts as the folder's text encoders understand them; the encoders are dropped afterwards."""
    transformers = _transformers()
    names = [name for name in ("text_encoder", "text_encoder_2") if (folder.path / name / CONFIG).is_file()]
    if not names:
        raise WeightsError(
            f"{folder.path} has no text_encoder/{CONFIG}: download the whole folder, or pass encoded prompts."
        )
    all_tokens, pooled = [], None
    for name in names:
        tokenizer = _tokenizer(folder.path / name.replace("text_encoder", "tokenizer"), transformers)
        encoder = _encoder(folder, name, transformers)
        try:
            tokens, encoder_pooled = _run(encoder, tokenizer, [*prompts, ""], penultimate=len(names) > 1)
        except (IndexError, RuntimeError) as error:
            raise WeightsError(
                f"{folder.path / name} does not go with its tokenizer ({printable(error, 120)}); download "
                "the whole folder again."
            ) from error
        all_tokens.append(tokens)
        pooled = encoder_pooled if encoder_pooled is not None else pooled
    joint = torch.cat(all_tokens, dim=-1)  # [N + 1, length, D]
    if folder.zeros_for_empty:
        joint[-1] = 0
        pooled = pooled if pooled is None else torch.cat([pooled[:-1], torch.zeros_like(pooled[:1])])
    return Texts(joint, pooled)


def _transformers() -> ModuleType:
    """Return the package transformers, which is imported only where it is needed.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Encoding prompts needs the package transformers: pip install transformers, or pass a "
            ".safetensors file of encoded prompts."
        ) from error
    module: ModuleType = transformers
    return module


def _tokenizer(place: Path, transformers: ModuleType) -> Any:
    """Return a CLIP tokenizer of its word list and its merges, which are data."""
    files = [place / "vocab.json", place / "merges.txt"]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file} is missing; download the whole folder, or pass encoded prompts.")
    words = read_table(files[0], most_values=1_000_000)
    settings = place / "tokenizer_config.json"
    table = read_table(settings) if settings.is_file() else {}
    padding = table.get("pad_token", "<|endoftext|>")
    padding = padding.get("content") if isinstance(padding, dict) else padding
    length = table.get("model_max_length", 77)
    if not isinstance(padding, str) or padding not in words or not isinstance(length, int) or length > 1000:
        raise WeightsError(
            f"{settings} has no valid configuration: pad_token {printable(padding, 40)!r}, model_max_length "
            f"{printable(length, 40)}."
        )
    try:
        return transformers.CLIPTokenizer(*map(str, files), pad_token=padding, model_max_length=length)
    except Exception as error:  # a damaged file can raise anything
        raise WeightsError(
            f"{place} is damaged ({printable(repr(error), 160)}); download it again."
        ) from error


def _encoder(folder: Folder, name: str, transformers: ModuleType) -> Any:
    """Return a text encoder with its weights."""
    place = folder.path / name
    settings = read_table(place / CONFIG)
    kinds = settings.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise WeightsError(
            f"{place / CONFIG} is of class {printable(kind, 80)!r}: mlviews reads CLIPTextModel and "
            "CLIPTextModelWithProjection; pass encoded prompts instead."
        )
    tensors = folder.tensors(name, "model")
    options = arguments(transformers.CLIPTextConfig, settings)
    make = getattr(transformers, kind)
    # Files have a prefix that some versions of transformers have, and once had the numbers of the places.
    small = transformers.CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with torch.device("meta"):
        has_prefix = any(name.startswith(_PREFIX) for name in make(small).state_dict())
    expected = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(_PREFIX)
        is_head = bare.startswith("text_projection")
        if bare != "embeddings.position_ids":
            expected[_PREFIX + bare if has_prefix and not is_head else bare] = tensor
    return fit(lambda: make(transformers.CLIPTextConfig(**options)), expected, place)


@torch.no_grad()
def _run(encoder: Any, tokenizer: Any, prompts: list[str], penultimate: bool) -> tuple[Tensor, Tensor | None]:
    """Return the encodings ``[N, length, D]`` and, of an encoder with a projection, ``[N, P]``.

    Args:
        encoder: of transformers.
        tokenizer: of transformers.
        prompts: texts; what is too long is cut off.
        penultimate: whether to take the layer before the last, as SDXL does.
    """
    tokens, pooled = [], []
    encoder.eval()
    for start in range(0, len(prompts), _BATCH):
        batch = tokenizer(
            prompts[start : start + _BATCH],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        outputs = encoder(batch.input_ids, output_hidden_states=penultimate)
        tokens.append(outputs.hidden_states[-2] if penultimate else outputs.last_hidden_state)
        if hasattr(outputs, "text_embeds"):
            pooled.append(outputs.text_embeds)
    return torch.cat(tokens), torch.cat(pooled) if pooled else None
