"""Networks of random weights for ``benchmarks/gpu.py``: each architecture at a published size, and tiny.

What a generator costs follows from the sizes of its weights, not from their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mlviews import MLVGM, load_generator
from mlviews.generators.biggan.deep import BigGANDeep, BigGANDeepConfig
from mlviews.generators.biggan.network import BigGAN, BigGANConfig
from mlviews.generators.nvae.config import NVAEConfig
from mlviews.generators.nvae.network import NVAE
from mlviews.generators.stylegan.filters import Resampling
from mlviews.generators.stylegan.stylegan2 import StyleGAN2, StyleGAN2Config
from mlviews.generators.stylegan.stylegan3 import LayerConfig, StyleGAN3, StyleGAN3Config
from mlviews.generators.vdvae.network import VDVAE, VDVAEConfig


class Network(NamedTuple):
    """An architecture, at two sizes."""

    published: Callable[[], MLVGM]
    tiny: Callable[[], MLVGM]
    batch: int  # pairs of a step, at the published size
    needs: str = ""  # a package that the base install lacks

    def make(self, device: torch.device, tiny: bool) -> MLVGM:
        """Return the generator with the same random weights in every call, on every device."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator = (self.tiny if tiny else self.published)()
        return generator.freeze().to(device)


# -- StyleGAN3 -----------------------------------------------------------------------------------------------

FIRST_CUTOFF, FIRST_STOPBAND = 2.0, 2**2.1  # of the first layer, in cycles per image
LAST_STOPBAND = 2**0.3  # of the last layers, in units of their cutoff
CRITICAL, MARGIN, TAPS = 2, 10, 6  # layers at the end without a filter's margin; pixels around; of a filter


def stylegan3(
    side: int, layers: int = 14, base: int = 32768, most: int = 512, dim: int = 512
) -> StyleGAN3Config:
    """Return configuration t of the paper for images of this side (Karras et al. 2021, sec. 3.2, appendix C).

    Cutoffs and stopbands rise geometrically up to the image's, which the last layers have.

    Args:
        side: pixels of the image.
        layers: between the Fourier features and the image.
        base: channels in inverse proportion to the cutoff.
        most: channels at most.
        dim: of z and w.
    """
    places = [min(layer / (layers - CRITICAL), 1) for layer in range(layers + 1)]
    last = side / 2
    cutoffs = [FIRST_CUTOFF * (last / FIRST_CUTOFF) ** place for place in places]
    stopbands = [FIRST_STOPBAND * (last * LAST_STOPBAND / FIRST_STOPBAND) ** place for place in places]
    rates = [2 ** math.ceil(math.log2(min(2 * stopband, side))) for stopband in stopbands]
    sizes = [rate + 2 * MARGIN for rate in rates[:-2]] + [side, side]
    channels = [round(min(base / 2 / cutoff, most)) for cutoff in cutoffs]
    return StyleGAN3Config(
        size=(sizes[0], sizes[0]),
        sampling_rate=rates[0],
        bandwidth=cutoffs[0],
        channels=channels[0],
        layers=tuple(
            LayerConfig(
                channels[layer],
                3,
                _resampling(
                    rates[max(layer - 1, 0)], rates[layer], sizes[max(layer - 1, 0)], sizes[layer], kernel=3
                ),
            )
            for layer in range(layers)
        ),
        z_dim=dim,
        w_dim=dim,
        mapping=(dim, dim),
    )


def _resampling(rate_in: int, rate: int, size_in: int, size: int, kernel: int) -> Resampling:
    """Return how a layer's activation is resampled: at twice the larger rate."""
    between = 2 * max(rate_in, rate)
    up, down = between // rate_in, between // rate
    up_taps, down_taps = TAPS * up, TAPS * down if down > 1 else 1
    zeros = (size - 1) * down + 1 - (size_in + kernel - 1) * up + up_taps + down_taps - 2
    before = (zeros + up) // 2
    return Resampling(up, down, up_taps, down_taps, False, ((before, zeros - before),) * 2)


# -- others --------------------------------------------------------------------------------------------------


def vdvae(counts: dict[int, int], downs: Sequence[tuple[int, int]], width: int) -> VDVAE:
    """Return a VDVAE of equal width, whose encoder has a block and then a halving at each resolution."""
    widths = dict.fromkeys(counts, width)
    return VDVAE(VDVAEConfig(counts, tuple(downs), widths, dict.fromkeys(counts, width // 4)))


CELLS = {
    **dict.fromkeys(("pre", "down_pre", "enc", "down_enc"), ("res_bnswish", "res_bnswish")),
    **dict.fromkeys(("dec", "up_dec"), ("mconv_e6k5g0",)),
    **dict.fromkeys(("post", "up_post"), ("mconv_e3k5g0",)),
}
"""The operations of NVAE's cells, as NVlabs trains them on CIFAR-10."""


def nvae() -> NVAE:
    """Return NVlabs' NVAE for CIFAR-10: one scale of 30 groups (Vahdat and Kautz 2020, table 6)."""
    widths = (128, 256)
    counts = {"pre_cells": 2, "enc_cells": 2, "dec_cells": 2, "post_cells": 2}
    return NVAE(
        NVAEConfig(3, 32, (30,), (20,), widths, widths, CELLS, **counts, gated=True, flows=1, flow_elus=2)
    )


def diffusion(channels: Sequence[int], layers: int, groups: int) -> MLVGM:
    """Return a UNet of diffusers' with attention at its second resolution, and four steps of DDIM."""
    import diffusers

    from mlviews.generators.diffusion.denoisers import Denoiser
    from mlviews.generators.diffusion.network import DiffusionGenerator
    from mlviews.generators.diffusion.samplers import chain

    plain = ["DownBlock2D"] * len(channels)
    plain[1] = "AttnDownBlock2D"
    up = [name.replace("Down", "Up") for name in reversed(plain)]
    network = diffusers.UNet2DModel(
        sample_size=32,
        down_block_types=tuple(plain),
        up_block_types=tuple(up),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        attention_head_dim=None,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=True)
    return DiffusionGenerator(
        Denoiser(network, 3), chain("ddim", scheduler, 4, None, 1.0), (3, 32, 32), (3, 32, 32)
    )


STYLEGAN2_CARS = StyleGAN2Config(channels=(512,) * 5 + (256, 128, 64))
VDVAE_CIFAR = ({1: 1, 4: 3, 8: 6, 16: 11, 32: 22}, [(32, 1)] * 11 + [(32, 2)] + [(16, 1)] * 6 + [(16, 2)])
VDVAE_REST = [(8, 1)] * 6 + [(8, 2)] + [(4, 1)] * 3 + [(4, 4)] + [(1, 1)] * 3
SMALL: dict[str, Any] = {"z_dim": 8, "w_dim": 8, "mapping": (8, 8)}

NETWORKS = {
    "fashion, 32 px": Network(lambda: load_generator("fashion"), lambda: load_generator("fashion"), 256),
    "bigbigan, 128 px": Network(BigGAN, lambda: BigGAN(BigGANConfig((16, 16, 8), 4, {16: (2, 4)})), 64),
    "stylegan2 cars, 512 px cropped to 128": Network(
        lambda: StyleGAN2(STYLEGAN2_CARS, groups=4, crop=(384, 512), size=(96, 128)),
        lambda: StyleGAN2(StyleGAN2Config((8, 8), **SMALL), groups=2),
        32,
    ),
    "biggan-deep, 128 px": Network(
        lambda: BigGANDeep(groups="scale"),
        lambda: BigGANDeep(BigGANDeepConfig((8, 8, 4), (False, True), {}, 4, 4, 3), groups="scale"),
        32,
    ),
    "stylegan3 t, 256 px": Network(
        lambda: StyleGAN3(stylegan3(256, base=16384), groups=4),
        lambda: StyleGAN3(stylegan3(16, layers=6, base=256, most=8, dim=8), groups=2),
        16,
    ),
    "nvae, CIFAR-10": Network(nvae, NVAE, 64),
    "vdvae, CIFAR-10": Network(lambda: vdvae(VDVAE_CIFAR[0], VDVAE_CIFAR[1] + VDVAE_REST, 384), VDVAE, 64),
    "diffusion UNet, 32 px, 4 steps": Network(
        lambda: diffusion((128, 256, 256, 256), 2, 32),
        lambda: diffusion((8, 8), 1, 4),
        64,
        needs="diffusers",
    ),
}
"""By name, in the order in which they are measured."""
