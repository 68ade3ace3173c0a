"""The networks of diffusers as functions of a noisy sample, a time and a label."""

from __future__ import annotations

from typing import Any

import torch
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
