"""The autoencoders of latent diffusion models, between the sampler's codes and images."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """An ``AutoencoderKL`` or ``AutoencoderTiny`` of diffusers.

    Args:
        network: the network of diffusers.
        gain: what a code is multiplied with before it is decoded, ``[C]``.
        offset: what is then added to it, ``[C]``.
        full_precision: whether it stays in float32, in which alone it does not overflow.
    """

    def __init__(self, network: nn.Module, gain: Tensor, offset: Tensor, full_precision: bool) -> None:
        super().__init__()
        self.network: Any = network
        self.full_precision = full_precision
        self.register_buffer("gain", gain[:, None, None])
        self.register_buffer("offset", offset[:, None, None])
        self.gain: Tensor
        self.offset: Tensor

    def decode(self, code: Tensor) -> Tensor:
        """Return images ``[B, C, H, W]`` in about [-1, 1] of the sampler's codes."""
        with self._precision(code):
            code = (code * self.gain + self.offset).to(self._dtype)
            images: Tensor = self.network.decode(code, return_dict=False)[0]
        return images

    def encode(self, images: Tensor) -> Tensor:
        """Return the sampler's codes, their distributions' modes, of images ``[B, C, H, W]`` in [-1, 1]."""
        with self._precision(images):
            encoded = self.network.encode(images.to(self._dtype))
            code: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
            return (code - self.offset) / self.gain

    @property
    def _dtype(self) -> torch.dtype:
        weight: Tensor = next(self.network.parameters())
        return weight.dtype

    def _precision(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """Return the mode to compute in: the caller's, unless that would overflow."""
        kind = tensor.device.type
        if self.full_precision and torch.amp.is_autocast_available(kind):
            return torch.autocast(kind, enabled=False)
        return nullcontext()

    def _apply(self, fn: Any, recurse: bool = True) -> Autoencoder:
        """Move the autoencoder, and keep its precision if no other will do."""

        def moved(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            return result.float() if self.full_precision and result.is_floating_point() else result

        applied: Autoencoder = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return applied
