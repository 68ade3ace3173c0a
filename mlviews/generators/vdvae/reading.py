"""Files of openai/vdvae, translated for :mod:`mlviews.generators.vdvae.network`.

Such a file (``...-model.th``, or the running average ``...-model-ema.th``) is a state dict alone. The shapes
of its tensors do not say at which resolution a block is, nor how the images were normalized: the published
networks are told by the numbers of their blocks, for all others there are options.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlviews import checks
from mlviews.checks import is_number
from mlviews.errors import WeightsError
from mlviews.generators.assembly import assembled
from mlviews.generators.hierarchy import check_options
from mlviews.generators.vdvae.network import VDVAE, VDVAEConfig
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.reader import Reader

_MOST_BLOCKS = 1000
_MOST_PIXELS = 1024


class Published(NamedTuple):
    """What the settings of a published network say, in the terms of the project's hps.py."""

    dec_blocks: str
    enc_blocks: str
    normalization: tuple[float, float]  # mean and standard deviation of values from 0 to 255


HPS = {
    "cifar10": Published(
        "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
        "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
        (120.63838, 64.16736),
    ),
    "imagenet32": Published(
        "1x2,4m1,4x4,8m4,8x9,16m8,16x19,32m16,32x40",
        "32x15,32d2,16x9,16d2,8x8,8d2,4x6,4d4,1x6",
        (116.2373, 69.37404),
    ),
    "imagenet64": Published(
        "1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
        "64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
        (115.92961967, 69.37404),
    ),
    "ffhq256": Published(
        "1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x21,64m32,64x13,128m64,128x7,256m128",
        "256x3,256d2,128x8,128d2,64x12,64d2,32x17,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4",
        (112.8666757481, 69.84780273),
    ),
    "ffhq1024": Published(
        "1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x20,64m32,64x14,128m64,128x7,256m128,256x2,512m256,1024m512",
        "1024x1,1024d2,512x3,512d2,256x5,256d2,128x7,128d2,64x10,64d2,32x14,32d2,16x7,16d2,8x5,8d2,4x5,4d4,"
        "1x4",
        (0.4387 * 255, 0.2743 * 255),
    ),
}
"""The published networks, by the names of their settings (``--hps``)."""


def load(
    checkpoint: Checkpoint,
    *,
    temperature: float = 1.0,
    levels: str = "scale",
    hps: str | None = None,
    dec_blocks: str | None = None,
    enc_blocks: str | None = None,
    normalization: tuple[float, float] | None = None,
) -> VDVAE:
    """Return the generator of a file of openai/vdvae.

    Args:
        checkpoint: of layout "vdvae".
        temperature: see :class:`VDVAE`.
        levels: see :class:`VDVAE`.
        hps: the published settings of the network: "cifar10", "imagenet32", "imagenet64", "ffhq256" or
            "ffhq1024"; None to tell them by the number of the decoder's blocks.
        dec_blocks: the decoder's blocks, as in hps.py ("1x1,4m1,4x2,..."); None for those of the settings.
        enc_blocks: the encoder's, likewise ("32x11,32d2,...").
        normalization: mean and standard deviation of the training's images, of values from 0 to 255, which
            the encoder needs; None for those of the settings.

    Raises:
        ValueError: for options out of range, or blocks that make no network.
        mlviews.WeightsError: if the file has other blocks than its settings, or tensors that are missing,
            unknown or of another shape, or not finite.
    """
    check_options(temperature, levels, "block")
    reader = _Reader(checkpoint)
    config = _config(reader, _settings(reader, hps, dec_blocks, enc_blocks, normalization))

    def make() -> VDVAE:
        return VDVAE(config, temperature=temperature, levels=levels)

    with torch.device("meta"):
        expected = make().state_dict()
    tensors = {}
    for name, value in expected.items():
        if not name.startswith("head."):
            tensors[name] = reader.take(_source(name, config), *value.shape)
    return assembled(reader, make, tensors | _head(reader, config))


class _Reader(Reader):
    """A VDVAE file's tensors."""

    problem = "is no VDVAE of these blocks"

    def count(self, name: str) -> int:
        """Return the number of a half's blocks."""
        pattern = re.compile(rf"{re.escape(name)}\.(\d{{1,4}})\.")
        return len({match[1] for key in self.tensors if (match := pattern.match(key))})


# -- the settings


def _settings(
    reader: _Reader,
    hps: str | None,
    dec_blocks: str | None,
    enc_blocks: str | None,
    normalization: tuple[float, float] | None,
) -> Published:
    """Return the settings, from the options and the number of blocks in the file."""
    count = reader.count("decoder.dec_blocks")
    names = [name for name, settings in HPS.items() if sum(_decoder(settings.dec_blocks).values()) == count]
    complete = None not in (dec_blocks, enc_blocks, normalization)
    if hps is None and not names and not complete:
        raise WeightsError(
            f"{reader.path} has {count} decoder blocks, as no published VDVAE: pass dec_blocks, enc_blocks "
            "and normalization of its training, e.g. dec_blocks='1x1,4m1,4x2', enc_blocks='4x3,4d4,1x1', "
            "normalization=(mean, std) of values from 0 to 255."
        )
    if hps is not None:
        names = [checks.choice("hps", hps, HPS)]
    settings = HPS[names[0]] if names else Published("", "", (0.0, 1.0))
    return Published(
        settings.dec_blocks if dec_blocks is None else dec_blocks,
        settings.enc_blocks if enc_blocks is None else enc_blocks,
        settings.normalization if normalization is None else _normalization(normalization),
    )


def _normalization(value: Any) -> tuple[float, float]:
    """Return mean and standard deviation, or raise a ValueError."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    if not pair or value[1] <= 0:
        raise ValueError(
            f"Invalid normalization={value!r}: it must be (mean, std) of values from 0 to 255, std above 0."
        )
    return float(value[0]), float(value[1])


def _parts(name: str, text: Any) -> list[tuple[int, str, int]]:
    """Return a string of blocks as pixels, letter and number of each part, or raise a ValueError."""
    words = text.split(",") if isinstance(text, str) else []
    matches = [re.fullmatch(r"(\d{1,4})(?:([xmd])(\d{1,4}))?", word.strip()) for word in words]
    if not words or None in matches:
        raise ValueError(
            f"Invalid {name}={text!r}: it must be parts like '8x5' (five blocks at 8 pixels), "
            "'8m4' (one that begins from 4 pixels) and '8d2' (one that halves them), with commas between."
        )
    return [(int(match[1]), match[2] or "x", int(match[3] or 1)) for match in matches if match is not None]


def _decoder(text: Any) -> dict[int, int]:
    """Return the number of the decoder's blocks by pixels of one side, or raise a ValueError."""
    counts: dict[int, int] = {}
    for size, letter, number in _parts("dec_blocks", text):
        before = list(counts)
        begins = letter == "m" and bool(before) and size not in counts and number == before[-1]
        goes_on = letter == "x" and (not before or size == before[-1])
        if not begins and not goes_on:
            raise ValueError(
                f"Invalid dec_blocks={text!r}: every resolution but the first begins with one block "
                f"'{size}m{before[-1] if before else 1}', from the one before it."
            )
        counts[size] = counts.get(size, 0) + (number if goes_on else 1)
    return counts


def _encoder(text: Any) -> tuple[tuple[int, int], ...]:
    """Return the encoder's blocks: pixels of one side, and by how much these are divided."""
    blocks: list[tuple[int, int]] = []
    for size, letter, number in _parts("enc_blocks", text):
        if letter == "m" or number > _MOST_BLOCKS:
            raise ValueError(f"Invalid enc_blocks={text!r}: its parts are like '8x5' and '8d2'.")
        blocks += [(size, number)] if letter == "d" else [(size, 1)] * number
    return tuple(blocks)


# -- the architecture


def _config(reader: _Reader, settings: Published) -> VDVAEConfig:
    """Return the architecture, its sizes those of the tensors."""
    counts, encoder = _decoder(settings.dec_blocks), _encoder(settings.enc_blocks)
    mean, std = settings.normalization
    for half, name, number in (
        ("decoder", "decoder.dec_blocks", sum(counts.values())),
        ("encoder", "encoder.enc_blocks", len(encoder)),
    ):
        if reader.count(name) != number:
            raise reader.error(f"its {half} has {reader.count(name)} blocks, expected {number}")
    if max(counts) > _MOST_PIXELS:
        raise reader.error(f"it has images of {max(counts)} pixels, at most {_MOST_PIXELS} are known")
    # Channels, from the first block of each resolution.
    widths, inner = {}, {}
    first = 0
    for size, count in counts.items():
        name = f"decoder.dec_blocks.{first}"
        widths[size], latent = reader.shape(f"{name}.z_proj.weight", None, None, 1, 1)[:2]
        inner[size] = reader.shape(f"{name}.resnet.c1.weight", None, widths[size], 1, 1)[0]
        first += count
    # The constants are those of the coarsest resolutions, of which the first always has a constant.
    biases = [size for index, size in enumerate(counts) if f"decoder.bias_xs.{index}" in reader.tensors]
    if not biases:
        raise reader.missing("decoder.bias_xs.0")
    outputs = reader.shape("decoder.out_net.out_conv.weight", None, widths[max(counts)], 1, 1)[0]
    try:
        return VDVAEConfig(
            counts=counts,
            encoder=encoder,
            widths=widths,
            inner=inner,
            biases=max(biases),
            latent=latent,
            mixtures=outputs // 10,
            mean=mean / 255,
            std=std / 255,
        )
    except ValueError as error:
        raise reader.error(
            f"dec_blocks={settings.dec_blocks!r} and enc_blocks={settings.enc_blocks!r} make no network"
        ) from error


def _source(name: str, config: VDVAEConfig) -> str:
    """Return what the file calls one of our tensors."""
    if not name.startswith("groups."):
        return name
    _, index, rest = name.split(".", 2)
    if rest != "start":
        return f"decoder.dec_blocks.{index}.{rest}"
    firsts = [sum(list(config.counts.values())[:place]) for place in range(len(config.counts))]
    return f"decoder.bias_xs.{firsts.index(int(index))}"


def _head(reader: _Reader, config: VDVAEConfig) -> dict[str, Tensor]:
    """Return the output's convolution, with the affine map before it, without the scales of the mixture."""
    mixtures, width = config.mixtures, config.widths[config.image_size]
    weight = reader.take("decoder.out_net.out_conv.weight", 10 * mixtures, width, 1, 1)
    bias = reader.take("decoder.out_net.out_conv.bias", 10 * mixtures)
    gain = reader.take("decoder.gain", 1, width, 1, 1)
    shift = reader.take("decoder.bias", 1, width, 1, 1)
    bias = bias + weight.flatten(1) @ shift.flatten()
    weight = weight * gain
    # The file has logits, and for each color means, scales and coefficients; we have all means first.
    rest = torch.arange(mixtures, 10 * mixtures).view(3, 3, mixtures)  # [color, kind, component]
    places = torch.cat([torch.arange(mixtures), rest[:, 0].flatten(), rest[:, 2].flatten()])
    return {"head.conv.weight": weight[places], "head.conv.bias": bias[places]}
