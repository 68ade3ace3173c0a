"""The encoder of NVAE: the bottom-up half, and the posterior of each latent group."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.nvae.cells import Cell
from mlviews.generators.nvae.config import NVAEConfig


class Encoder(nn.Module):
    """The bottom-up half: a stem, pre-processing blocks, and a tower with one step per latent group."""

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        widths = config.encoder
        self.stem = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)

        # Pre-processing blocks halve the size down to that of the finest scale.
        pre: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[: len(widths) - config.scales + 1]):
            pre += [Cell(config, "pre", before, before) for _ in range(config.pre_cells - 1)]
            pre.append(Cell(config, "down_pre", before, after))
        self.pre = nn.Sequential(*pre)

        # The tower has a step for each group, fine to coarse.
        self.tower = nn.ModuleList()
        for scale in reversed(range(config.scales)):
            width = widths[-1 - scale]
            for index in range(config.groups[scale]):
                cells = [Cell(config, "enc", width, width) for _ in range(config.enc_cells)]
                if scale < config.scales - 1 and index == 0:
                    cells.insert(0, Cell(config, "down_enc", widths[-2 - scale], width))
                self.tower.append(nn.Sequential(*cells))
        self.top = nn.Conv2d(widths[-1], widths[-1], 1)

        # Each group mixes the decoder's features in (all but the first), and has a sampler, and flows.
        self.mix = nn.ModuleList()
        for scale, _ in config.group_scales[1:]:
            self.mix.append(nn.Conv2d(config.decoder[-1 - scale], widths[-1 - scale], 1))
        self.samplers = nn.ModuleList()
        for scale, _ in config.group_scales:
            sampler = nn.Conv2d(widths[-1 - scale], 2 * config.latents[scale], 3, padding=1)
            self.samplers.append(sampler)
        self.flows = nn.ModuleList()
        for scale, _ in config.group_scales:
            flows = (Flow(config.latents[scale], config.flow_elus) for _ in range(2 * config.flows))
            self.flows.append(nn.Sequential(*flows))

        # The step after which the tower's features meet each group.
        self.meets = []
        for scale, index in config.group_scales:
            step = config.groups[scale] - 1 - index if config.mirrored else index
            finer = sum(config.groups[scale + 1 :])
            self.meets.append(finer + step)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return features ``[B, C, h, w]`` for each group, coarse to fine.

        Args:
            images: ``[B, C, H, W]`` in [0, 1].
        """
        x = self.pre(self.stem(2 * images - 1))
        steps = []
        for step in self.tower:
            x = step(x)
            steps.append(x)
        # The first group takes the top of the tower, and the others the steps that they meet.
        top = F.elu(self.top(F.elu(x)))
        return [top, *(steps[meets] for meets in self.meets[1:])]

    def parameters_of(self, index: int, features: list[Tensor], decoder: Tensor) -> Tensor:
        """Return the raw parameters ``[B, 2c, h, w]`` of a group's posterior.

        Args:
            index: the group.
            features: what :meth:`forward` returned.
            decoder: the decoder's features ``[B, C, h, w]`` before this group.
        """
        x = features[index]
        if index > 0:
            x = x + self.mix[index - 1](decoder)
        parameters: Tensor = self.samplers[index](x)
        return parameters


class Flow(nn.Module):
    """One autoregressive cell ``z - f(z)``, ``[B, c, h, w] -> [B, c, h, w]`` (paper, sec. 3.2).

    Its Jacobian determinant is 1; its masks are in the weights.
    """

    def __init__(self, latent: int, elus: int) -> None:
        super().__init__()
        hidden = 6 * latent
        self.expand = nn.Conv2d(latent, hidden, 3, padding=1)
        self.filter = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.contract = nn.Conv2d(hidden, latent, 1)
        self.elus = elus

    def forward(self, z: Tensor) -> Tensor:
        x = self.filter(F.elu(self.expand(z)))
        for _ in range(self.elus):
            x = F.elu(x)
        shift: Tensor = self.contract(x)
        return z - shift
