"""A generator made of tensors that a reader has already folded: none is copied, and none is drawn first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from mlviews.generators.base import MLVGM
from mlviews.weights.reader import Reader

Generator = TypeVar("Generator", bound=MLVGM)


def assembled(reader: Reader, make: Callable[[], Generator], tensors: Mapping[str, Tensor]) -> Generator:
    """Return the generator that has these very tensors.

    Args:
        reader: of the file that they come from.
        make: builds the generator; it is called on the meta device.
        tensors: its state dict.

    Raises:
        mlviews.WeightsError: if a tensor of the file was not taken, or a product of its values is not finite.
    """
    reader.finish()
    for name, value in tensors.items():
        # Finite values may have products that are not.
        if not value.isfinite().all():
            raise reader.damaged(f"its values are so large that {name} holds a NaN or an infinity")
    with torch.device("meta"):
        generator = make()
    generator.load_state_dict(tensors, assign=True)
    # The one tensor that is in no state dict, and is still on the meta device. Module.to_empty would replace
    # it too, but costs seconds of imports.
    generator._place = torch.empty(0, dtype=torch.float32, device="cpu")
    return generator
