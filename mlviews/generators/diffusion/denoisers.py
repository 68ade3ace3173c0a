"""The networks of diffusers as functions of a noisy sample, a time and a label."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Denoiser(nn.Module):
    """A network that predicts what is in a noisy sample: a ``UNet2DModel`` without classes.

    Args:
        network: the network of diffusers.
        channels: of a sample. If the network returns twice as many, the second half is about the variance.
        num_classes: of the labels; 0 for a network without. The label ``num_classes`` stands for no label,
            where there is guidance.
        guidance: how far the prediction goes from that without a label to that with the label, and beyond
            it; 1 asks for the label's alone.
    """

    def __init__(
        self, network: nn.Module, channels: int, num_classes: int = 0, guidance: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.channels = network, channels
        self.num_classes, self.guidance = num_classes, guidance

    def forward(self, x: Tensor, time: float, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the prediction, and what the network says of the variance, if anything.

        Args:
            x: ``[B, C, H, W]``, scaled as the network takes it.
            time: of all samples.
            labels: int64 ``[B]`` for a network with classes, else None.

        Returns:
            float32 ``[B, C, H, W]`` each.
        """
        rows = len(x)
        x = x.to(next(self.network.parameters()).dtype)
        is_guided = labels is not None and self.guidance != 1
        if is_guided:
            assert labels is not None
            x = torch.cat([x, x])  # [2 B, C, H, W]: with labels, and without
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        # Not a buffer, which .half() would round.
        times = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        output = self.network(x, times, return_dict=False, **self.conditions(labels))[0].float()
        prediction, variance = output, None
        if output.shape[1] == 2 * self.channels:
            prediction, variance = output.chunk(2, dim=1)  # [B, C, H, W] each
            variance = variance[:rows]
        if is_guided:
            labelled, unlabelled = prediction.chunk(2)
            prediction = torch.add(unlabelled, labelled - unlabelled, alpha=self.guidance)
        return prediction, variance

    def conditions(self, labels: Tensor | None) -> dict[str, Any]:
        """Return what else the network takes."""
        return {}


class ClassDenoiser(Denoiser):
    """A network with classes: a ``UNet2DModel`` with class embeddings, or a ``DiTTransformer2DModel``."""

    def conditions(self, labels: Tensor | None) -> dict[str, Any]:
        return {"class_labels": labels}


class TextDenoiser(Denoiser):
    """A ``UNet2DConditionModel``, whose labels pick one of a list of encoded prompts.

    Args:
        network: the network of diffusers.
        channels: of a sample.
        tokens: the encoded prompts ``[N + 1, length, D]``; the last one stands for no prompt.
        pooled: the pooled ones ``[N + 1, P]``, for SDXL; None for networks that take none.
        size: height and width of the image, which SDXL is told.
        guidance: as of :class:`Denoiser`.
        embedded_guidance: the guidance that the network is told, if it was distilled to take it (LCM); None
            for others.
    """

    def __init__(
        self,
        network: nn.Module,
        channels: int,
        tokens: Tensor,
        pooled: Tensor | None,
        size: tuple[int, int],
        guidance: float = 1.0,
        embedded_guidance: float | None = None,
    ) -> None:
        super().__init__(network, channels, len(tokens) - 1, guidance)
        config: Any = network.config
        self.register_buffer("tokens", tokens)
        self.register_buffer("pooled", pooled)
        self.register_buffer("sizes", torch.tensor([[*size, 0.0, 0.0, *size]]))  # original, crop, target
        guides = None
        if embedded_guidance is not None:
            guides = _guidance_embedding(embedded_guidance, config.time_cond_proj_dim)
        self.register_buffer("guides", guides)
        self.tokens: Tensor
        self.pooled: Tensor | None
        self.sizes: Tensor
        self.guides: Tensor | None

    def conditions(self, labels: Tensor | None) -> dict[str, Any]:
        assert labels is not None
        rows = len(labels)
        conditions: dict[str, Any] = {"encoder_hidden_states": self.tokens[labels]}  # [B, length, D]
        if self.pooled is not None:
            added = {"text_embeds": self.pooled[labels], "time_ids": self.sizes.expand(rows, -1)}
            conditions["added_cond_kwargs"] = added
        if self.guides is not None:
            conditions["timestep_cond"] = self.guides.expand(rows, -1)
        return conditions


def _guidance_embedding(guidance: float, dim: int) -> Tensor:
    """Return the guidance as sines and cosines ``[1, dim]``, as latent consistency models are told it."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = (guidance - 1) * 1000 * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()]), (0, dim % 2))[None]
