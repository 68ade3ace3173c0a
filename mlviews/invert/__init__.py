"""Training an inverter: an encoder for a generator that has none.

The first part learns from endless pairs, latents z and the image G(z) that the generator makes of them,
without any data. The second part, if there are real images, learns to reconstruct them too, and pulls their
latents to the prior. Every step's samples follow from the seed and the step, so that a resumed run continues
the interrupted one to the bit, and several processes train what one would.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlviews import checks
from mlviews.checks import output_folder
from mlviews.generators.base import MLVGM
from mlviews.generators.inverter import Inverter, InverterConfig
from mlviews.invert.images import Images, checked_images
from mlviews.invert.options import InverterOptions
from mlviews.invert.training import InverterRun, Training
from mlviews.runs.processes import launch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Inverter", "InverterConfig", "InverterOptions", "InverterRun", "train_inverter"]


@torch.inference_mode(False)  # whatever the caller's modes are
@torch.enable_grad()
def train_inverter(
    generator: MLVGM,
    images: str | Path | Tensor | Images | None = None,
    out: str | Path | None = None,
    *,
    start: Inverter | None = None,
    device: str | torch.device | None = None,
    devices: int = 1,
    fabric: Fabric | None = None,
    **options: Any,
) -> Inverter:
    """Train an encoder for a generator that has none: a network from images to the latents of every level.

    Args:
        generator: an MLVGM; its weights do not change.
        images: real images to reconstruct: a folder, or a tensor, uint8 or float in [0, 1], ``[N, C, H, W]``
            of the generator's image shape, or an object with the methods of :class:`Images`; N at least 10.
            None: it learns from the generator's own images alone. Some are held out for the evaluations.
        out: folder for ``checkpoint.pt``, ``inverter.safetensors`` and ``history.csv``; None keeps nothing on
            disk.
        start: an inverter of this generator to start from, e.g. to refine it on other images; None: a new
            one.
        device: the kind of device; None: where the generator is.
        devices: processes on this machine, one device each, as for :func:`mlviews.train_walker`.
        fabric: a launched Fabric, in place of device and devices.
        **options: fields of :class:`InverterOptions`, by keyword:

            - batch (64): images of a step, over all processes.
            - steps (20,000): at most.
            - pair_steps (5,000): of them on pairs alone, before real images join; without images all are.
            - pairs (None): of a batch that stay pairs once real images have joined; None: a quarter.
            - lr (2e-3): AdamW's largest rate, which rises over the first 100 steps.
            - decay_from (0.4): share of the steps after which the rate falls along a line.
            - average (0.995): share of the moving average of the weights that a step keeps. The inverter that
              is evaluated and returned is the average.
            - latent (0.1): weight of the mean squared error of pairs' latents, levels weighted by how much an
              image changes when they are drawn anew.
            - image (1.0): weight of the mean squared error of the reconstructed images, in units of the
              variance of the generator's pixels.
            - feature (0.1): weight of the same in the features of a fixed random network.
            - pull (0.005): weight of the pull of real images' latents to a mean square of 1, the prior's.
            - width (48): channels of the inverter at 16 pixels. It, blocks and hidden are those of ``start``
              where there is one.
            - blocks (1): residual blocks of the inverter at each resolution.
            - hidden (256): scalars that the inverter's heads read.
            - dtype (None): "bfloat16" or "float16" for autocast; None for float32.
            - anchor (None): law of the pairs; None: N(0, 1) truncated as the generator prefers.
            - held_out (1,000): real images to evaluate on, at most a fifth of them.
            - evaluation (512): pairs to evaluate on.
            - evaluate_every (250): steps between evaluations, at which the checkpoint is replaced too.
            - patience (20): evaluations without a better one after which the run ends.
            - tolerance (0.002): share by which an evaluation has to be lower to count as a better one.
            - seed (0): of the pairs, the order of the images and the first weights.
            - resume (True): go on from ``out``'s checkpoint. The result is that of a run that was never
              stopped.
            - progress (True): show a bar.

    Returns:
        The best inverter of the run by its evaluations, in eval mode and frozen, on the generator's device.
        Its ``run`` is an :class:`InverterRun`. ``generator.inverter = inverter`` makes ``generator.encode``
        use it.

    Raises:
        ValueError: for an unknown option, a value out of range, images that do not fit, real images with a
            class-conditional generator (whose labels nobody knows), or a checkpoint of a run with other
            settings.
    """
    checks.options("train_inverter", options, [item.name for item in dataclasses.fields(InverterOptions)])
    if not isinstance(generator, MLVGM):
        raise ValueError(
            f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM."
        )
    chosen = InverterOptions(**options)
    real = checked_images(images, generator)
    if start is not None:
        if not isinstance(start, Inverter):
            raise ValueError(
                f"Invalid start of type {type(start).__name__}: it must be an Inverter, or None."
            )
        start.check(generator)
    if fabric is None:
        fabric = launch(generator.freeze(), device or generator.device, devices)
    training = Training(generator, real, output_folder(out), start, chosen, fabric)
    training.run()
    return training.finish()
