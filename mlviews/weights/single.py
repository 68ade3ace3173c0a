"""Generators that have one latent, and so no levels: what they are, and how to wrap them.

They are those of pytorch-pretrained-gans' ``make_gan`` that no architecture of mlviews reads. Each is told
from its tensors' names, and the sizes in the call that wraps it are those of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def hint(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what a state dict holds and the call that makes a generator of it; None for any other.

    Args:
        tensors: by their names, without a wrapper's prefix; may hold anything.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for kind in (_self_conditioned, _studiogan, _cips):
        text = kind(shapes)
        if text is not None:
            return text
    return None


def _wrapped(kind: str, image: str, z: int, side: int, classes: int = 0, remark: str = "") -> str:
    """Return the sentence.

    Args:
        kind: of the generator.
        image: an expression of images in [-1, 1], of ``z`` and ``y``.
        z: values of its latent.
        side: pixels of its images.
        classes: number of its classes; 0 for none.
        remark: more that has to be known.
    """
    arguments, more = ("z, y", f", num_classes={classes}") if classes else ("z", "")
    call = (
        f'mlviews.wrap_generator(lambda {arguments}: ({image} + 1) / 2, levels=[("z", ({z},))], '
        f"image_shape=(3, {side}, {side}){more})"
    )
    return f"{kind}, which has a single latent{remark}: with the make_gan object G, use {call}."


def _self_conditioned(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Recognize the self-conditioned GAN (Liu et al. 2020): a ResNet without norms."""
    linear, image = shapes.get("fc.weight", ()), shapes.get("conv_img.weight", ())
    if len(linear) != 2 or len(image) != 4 or "resnet_0_0.conv_0.weight" not in shapes:
        return None
    embedding = shapes.get("get_latent.embedding.weight", (1, 0))
    # 16 filters of the image's convolution each for every pixel of the first features, a 32nd of a side.
    side = 32 * math.isqrt(linear[0] // max(16 * image[1], 1))
    z = linear[1] - embedding[-1]
    return _wrapped("a self-conditioned GAN", "G(z[0], y)", z, side, embedding[0])


def _studiogan(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Recognize StudioGAN's generators of SNGAN and SAGAN, where z enters the first layer only."""
    linear = shapes.get("linear0.weight_orig", shapes.get("linear0.weight", ()))
    output = any(name.startswith("conv2d5.") for name in shapes)
    if len(linear) != 2 or not output or "shared.weight" in shapes:
        return None
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.") and ".conv2d1." in name}
    classes = _classes(shapes)
    image = "G(z[0], y)" if classes else "G(z[0])"
    return _wrapped("an SNGAN or SAGAN of StudioGAN", image, linear[1], 4 << len(blocks), classes)


def _classes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the classes that set StudioGAN's norms, by embeddings in early versions, then a linear map."""
    for name, axis in (("embed0", 0), ("gain", 1)):
        for end in ("weight", "weight_orig"):
            shape = shapes.get(f"blocks.0.0.bn1.{name}.{end}", ())
            if len(shape) == 2:
                return shape[axis]
    return 0


def _cips(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Recognize CIPS (Anokhin et al. 2021), which makes each pixel of its coordinates and one style."""
    constant, style = shapes.get("emb.input", ()), shapes.get("style.1.weight", ())
    if len(constant) != 4 or len(style) != 2 or not any(name.startswith("lff.") for name in shapes):
        return None
    remark = " (and noise that every call draws anew)"
    return _wrapped("a CIPS", "G(G.G.style(z[0]))", style[1], constant[2], remark=remark)
