"""T_x: pixel augmentation of whole batches on the device, sample by sample a function of the sample's index.

The operators are kornia's functional ones. Their parameters come from the counter streams of
:mod:`mlviews.sampling` and not from kornia's samplers, which draw from the global CPU generator once per
batch: the augmentation of a view depends on ``(seed, epoch, global sample index, view)`` and on nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mlviews import checks, sampling
from mlviews.checks import is_number
from mlviews.errors import did_you_mean, listing

__all__ = ["IMAGENET", "Augmentation", "byol", "gray", "simclr"]

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Means and standard deviations, one of each per channel or one for all."""

IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Means and standard deviations of ImageNet's channels."""

# One stream of uniforms per operation, so that switching one on or off leaves the others' parameters as they
# are. The numbers are part of what a seed means: never reorder them.
_CROP, _FLIP, _JITTER, _GRAYSCALE, _BLUR, _SOLARIZE, _EQUALIZE = range(7)
_ATTEMPTS = 10  # the attempts at a box that fits, as many as torchvision makes
_UNIFORMS = {  # of a sample
    _CROP: 2 * _ATTEMPTS + 2,  # area and ratio of each attempt, top and left
    _FLIP: 1,
    _JITTER: 5,  # whether to apply it, and the four amounts
    _GRAYSCALE: 1,
    _BLUR: 2,  # whether to apply it, and its sigma
    _SOLARIZE: 1,
    _EQUALIZE: 1,
}
_PROBABILITIES = ("flip", "jitter_p", "grayscale", "blur", "solarize", "equalize")


class Parameters(NamedTuple):
    """What an :class:`Augmentation` does to each sample of a batch; ``None`` for an operation that is off."""

    boxes: Tensor | None = None  # int64 [B, 4]: top, left, height, width, in pixels of working_shape
    flip: Tensor | None = None  # bool [B]
    brightness: Tensor | None = None  # float32 [B], a factor; 1 where the jitter is not applied
    contrast: Tensor | None = None  # the same
    saturation: Tensor | None = None  # the same
    hue: Tensor | None = None  # float32 [B], in turns from -0.5 to 0.5; 0 where the jitter is not applied
    grayscale: Tensor | None = None  # bool [B]
    sigma: Tensor | None = None  # float32 [B], of the blur, in output pixels; 0 where it is not applied
    solarize: Tensor | None = None  # bool [B]
    equalize: Tensor | None = None  # bool [B]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """One pipeline T_x (paper, sec. 3.2 and app. D).

    It crops, resizes and flips in one resampling; then come color, blur, solarization and equalization.

    The operations equal torchvision's tensor ones for the same parameters, with three differences: the crop
    is resized without antialiasing; the color operations run in the fixed order brightness, contrast,
    saturation, hue (``ColorJitter`` permutes them at every call); and gray is weighted 0.299, 0.587, 0.114
    (torchvision: 0.2989). Boxes are distributed as those of ``RandomResizedCrop``. On 1-channel images
    saturation, hue and grayscale change nothing and are skipped; they are repeated to 3 channels at the very
    end.

    Resampling is bilinear without antialiasing, so an image of at least twice the output's side is first
    shrunk by the whole factor that leaves it just as large as the output or larger (512 to 128 for 112), with
    antialiasing.

    Args:
        size: side of the square output in pixels, at least 1.
        scale: smallest and largest area of the crop as a share of the image's, in (0, 1]; ``None`` resizes
            the whole image instead, with antialiasing.
        ratio: smallest and largest width / height of the crop, above 0.
        flip: probability of a horizontal flip. All probabilities are in [0, 1]; 0 skips the operation.
        jitter: strengths of brightness, contrast, saturation (factors are uniform in ``[max(0, 1 - s), 1 +
            s]``) and hue (uniform in ``[-s, s]`` turns, at most 0.5), as of ``ColorJitter``.
        jitter_p: probability of the jitter, all four together.
        grayscale: probability of losing the color.
        blur: probability of a Gaussian blur. Its kernel is odd and about a tenth of ``size``, at least 3.
        blur_sigma: smallest and largest standard deviation of the blur in output pixels, above 0.
        solarize: probability of inverting what is at or above ``threshold``.
        threshold: the pixel value that solarization starts at, in [0, 1].
        equalize: probability of equalizing each channel's histogram, of 256 levels.
        channels: the output's channels: 3 (1-channel images are repeated), 1, or ``None`` for as many as the
            images have.
        normalize: means and standard deviations of the three channels, or one of each for all; ``None``
            leaves images in [0, 1]. A 1-channel output takes their averages.

    Raises:
        ValueError: for a value outside the range given here.

    Examples:
        >>> augment = Augmentation(size=28, scale=(0.2, 1.0))
        >>> augment(torch.rand(8, 1, 32, 32), range(8), seed=0, epoch=0, view=1).shape
        torch.Size([8, 3, 28, 28])
    """

    size: int
    scale: tuple[float, float] | None = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.8
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    threshold: float = 0.5
    equalize: float = 0.0
    channels: int | None = 3
    normalize: Normalization | None = IMAGENET

    def __post_init__(self) -> None:
        # Sequences become tuples, also when a configuration file gave lists: the pipeline stays hashable.
        self._set("size", checks.integer("size", self.size, 1))
        if self.scale is not None:
            self._set(
                "scale",
                _numbers("scale", self.scale, "(smallest, largest) share of the area, or None for no crop"),
            )
            _check_ascending("scale", self.scale, most=1)
        self._set("ratio", _numbers("ratio", self.ratio, "(smallest, largest) width / height of the crop"))
        _check_ascending("ratio", self.ratio)
        self._set(
            "blur_sigma",
            _numbers("blur_sigma", self.blur_sigma, "(smallest, largest) standard deviation in pixels"),
        )
        _check_ascending("blur_sigma", self.blur_sigma)
        self._set(
            "jitter",
            _numbers("jitter", self.jitter, "strengths of brightness, contrast, saturation and hue", 4),
        )
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                f"Invalid jitter={self.jitter!r}: strengths are 0 (off) or more, and that of hue, the last, "
                "is at most 0.5."
            )
        for name in _PROBABILITIES:
            _check_share(name, getattr(self, name), "a probability")
        _check_share("threshold", self.threshold, "a pixel value")
        if self.blur and self.size < 2:
            raise ValueError(
                f"Invalid blur={self.blur!r} with size={self.size}: a blur needs a size of at least 2; set "
                "blur=0."
            )
        if isinstance(self.channels, bool) or self.channels not in (1, 3, None):
            raise ValueError(
                f"Invalid channels={self.channels!r}: the output has 1 or 3 channels, or None for as many as "
                "the images."
            )
        if self.normalize is not None:
            self._set("normalize", _as_normalization(self.normalize))

    def __call__(
        self, images: Tensor, indices: Iterable[int] | Tensor, *, seed: int, epoch: int, view: int
    ) -> Tensor:
        """Augment a batch; the same as :meth:`apply` with :meth:`parameters`.

        Args:
            images: floating point ``[B, C, H, W]`` in [0, 1] with 1 or 3 channels.
            indices: ``B`` global sample indices in ``[0, 2**32)``. An int64 tensor on the images' device is
                taken as it is, without a look at its values, which would make the host wait.
            seed: integer in ``[0, 2**64)``.
            epoch: integer in ``[0, 2**32)``.
            view: integer in ``[0, 4096)``; each view of a sample is augmented on its own.

        Returns:
            A new, contiguous float32 tensor ``[B, channels, size, size]`` on the images' device.

        Raises:
            ValueError: for images or indices of the wrong shape, type or range, or for a seed, epoch or view
                out of range.
        """
        self._check(images)
        rows = indices
        on_device = isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.device == images.device
        if not on_device:
            rows = sampling.as_indices(indices, images.device)
        assert isinstance(rows, Tensor)
        if rows.shape != images.shape[:1]:
            raise ValueError(
                f"Got indices of shape {tuple(rows.shape)} for {len(images)} images: "
                "give one global sample index per image."
            )
        parameters = self.parameters(rows, tuple(images.shape[-2:]), seed=seed, epoch=epoch, view=view)
        return self.apply(images, parameters)

    def working_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that images are shrunk to before the crop.

        Images below twice ``size`` are not shrunk.
        """
        if self.scale is None:
            return self.size, self.size
        factor = max(1, min(height, width) // self.size)
        return height // factor, width // factor

    def parameters(
        self, indices: Tensor, image_shape: tuple[int, ...], *, seed: int, epoch: int, view: int
    ) -> Parameters:
        """Return what is done to each sample, drawn on the device of ``indices``.

        An operation's parameters do not depend on which other operations are on.

        Args:
            indices: int64 ``[B]`` of global sample indices in ``[0, 2**32)``.
            image_shape: ``(H, W)`` of the images.
            seed: integer in ``[0, 2**64)``.
            epoch: integer in ``[0, 2**32)``.
            view: integer in ``[0, 4096)``.

        Returns:
            The parameters of ``B`` samples.

        Raises:
            ValueError: for an image shape, seed, epoch or view out of range.
        """
        if len(image_shape) != 2 or min(image_shape) < 1:
            raise ValueError(f"Invalid image_shape={image_shape!r}: give (height, width), both at least 1.")
        draw = self._plan(indices.device, view)
        uniform = draw(indices, seed, epoch)
        values: dict[str, Tensor] = {}
        if _CROP in uniform:
            values["boxes"] = self._boxes(uniform[_CROP], *self.working_shape(*image_shape))
        if _JITTER in uniform:
            values |= self._factors(uniform[_JITTER])
        if _BLUR in uniform:
            low, high = self.blur_sigma
            applied, amount = uniform[_BLUR].unbind(1)
            values["sigma"] = torch.where(applied < self.blur, low + (high - low) * amount, 0.0)
        switches = {
            "flip": (_FLIP, self.flip),
            "grayscale": (_GRAYSCALE, self.grayscale),
            "solarize": (_SOLARIZE, self.solarize),
            "equalize": (_EQUALIZE, self.equalize),
        }
        for name, (operation, probability) in switches.items():
            if operation in uniform:
                values[name] = uniform[operation][:, 0] < probability
        return Parameters(**values)

    def _factors(self, uniform: Tensor) -> dict[str, Tensor]:
        """Return the factors ``[B]`` of the jitter's operations that are on, from uniforms ``[B, 5]``."""
        applied, *amounts = uniform.unbind(1)
        names = ("brightness", "contrast", "saturation", "hue")
        factors = {}
        for name, strength, amount in zip(names, self.jitter, amounts, strict=True):
            if not strength:
                continue
            # Of hue the factor is an angle, around 0.
            neutral = 0.0 if name == "hue" else 1.0
            low = -strength if name == "hue" else max(0.0, 1 - strength)
            value = low + (neutral + strength - low) * amount
            factors[name] = torch.where(applied < self.jitter_p, value, neutral)
        return factors

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Do to each sample what its parameters say, whoever chose them.

        The result is differentiable with respect to the images.

        Args:
            images: floating point ``[B, C, H, W]`` in [0, 1] with 1 or 3 channels.
            parameters: what to do to the ``B`` samples, on the images' device.

        Returns:
            A new, contiguous float32 tensor ``[B, channels, size, size]`` on the images' device.

        Raises:
            ValueError: for images of the wrong shape or type.
        """
        self._check(images)
        # A training loop's autocast would run the blur in half precision.
        with torch.autocast(images.device.type, enabled=False):
            return self._apply(images, parameters)

    # -- the operations --------------------------------------------------------------------------------------

    def _apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        x = images.float()
        if parameters.boxes is not None:
            x = self._crop(_resize(x, self.working_shape(*x.shape[-2:])), parameters.boxes, parameters.flip)
        else:
            x = _resize(x, (self.size, self.size))
            if parameters.flip is not None:
                x = torch.where(_per_image(parameters.flip), x.flip(-1), x)
        x = self._color(x, parameters)
        # kornia 0.8, the last one for torch 2.4, neither blurs nor solarizes an empty batch.
        if parameters.sigma is not None and len(x):
            x = self._blur(x, parameters.sigma)
        if parameters.solarize is not None and len(x):
            from kornia.enhance import solarize

            x = solarize(x, torch.where(parameters.solarize, float(self.threshold), math.inf))
        if parameters.equalize is not None:
            x = torch.where(_per_image(parameters.equalize), _equalize(x), x)
        out = self._finish(x).contiguous()
        return out.clone() if out is images else out

    def _boxes(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """Return boxes ``[B, 4]`` as ``RandomResizedCrop`` chooses them, from uniforms ``[B, 22]``.

        A box is the first of ten that fits in the image, else the central one.
        """
        assert self.scale is not None
        areas, ratios, places = torch.split(uniform, [_ATTEMPTS, _ATTEMPTS, 2], dim=1)

        # The sides of all attempts, [B, 10].
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * areas)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + (high - low) * ratios)
        w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()

        # The first attempt that fits, [B]: of several maxima argmax takes the first.
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first, any_fits = fits.int().argmax(1, keepdim=True), fits.any(1)
        w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]

        # Where none fits: as much of the image's center as the ratios allow.
        central_w = min(width, round(height * self.ratio[1]))
        central_h = min(height, round(width / self.ratio[0]))
        w, h = torch.where(any_fits, w, float(central_w)), torch.where(any_fits, h, float(central_h))

        room_y, room_x = height - h, width - w
        top = torch.where(any_fits, (places[:, 0] * (room_y + 1)).floor(), (room_y / 2).floor())
        left = torch.where(any_fits, (places[:, 1] * (room_x + 1)).floor(), (room_x / 2).floor())
        return torch.stack((top, left, h, w), dim=1).to(torch.int64)

    def _crop(self, images: Tensor, boxes: Tensor, flip: Tensor | None) -> Tensor:
        """Crop, resize and flip in one bilinear resampling: ``[B, C, H, W] -> [B, C, size, size]``."""
        from kornia.geometry.transform import remap

        height, width = images.shape[-2:]
        top, left, h, w = boxes.float()[:, :, None].unbind(1)  # [B, 1] each
        # The centers of the output's pixels.
        y = x = torch.arange(self.size, device=images.device, dtype=torch.float32) + 0.5
        if flip is not None:
            x = torch.where(flip[:, None], self.size - x, x)
        # In the image, [B, size], between the centers of the box's outermost pixels: a resize of the crop
        # alone sees nothing beyond it.
        y = top + (y * (h / self.size) - 0.5).clamp_min(0).minimum(h - 1)
        x = left + (x * (w / self.size) - 0.5).clamp_min(0).minimum(w - 1)
        # Normalized here, to [-1, 1]: kornia would copy its factors from the host at every call.
        map_y = ((2 * y + 1) / height - 1)[:, :, None].expand(-1, -1, self.size)
        map_x = ((2 * x + 1) / width - 1)[:, None, :].expand(-1, self.size, -1)
        cropped: Tensor = remap(
            images, map_x, map_y, padding_mode="border", align_corners=False, normalized_coordinates=True
        )
        return cropped

    @staticmethod
    def _color(x: Tensor, parameters: Parameters) -> Tensor:
        """Apply brightness, contrast, saturation, hue and grayscale; samples left alone have neutral ones."""
        from kornia import enhance

        if parameters.brightness is not None:
            x = enhance.adjust_brightness_accumulative(x, parameters.brightness)
        if parameters.contrast is not None:
            mean = (_gray(x) if x.shape[1] == 3 else x).mean((-3, -2, -1), True)  # [B, 1, 1, 1]
            x = _blend(x, mean, parameters.contrast)
        if x.shape[1] == 1:
            return x
        if parameters.saturation is not None:
            x = _blend(x, _gray(x), parameters.saturation)
        if parameters.hue is not None:
            x = enhance.adjust_hue(x, parameters.hue * (2 * math.pi))
        if parameters.grayscale is not None:
            x = torch.where(_per_image(parameters.grayscale), _gray(x), x)
        return x

    def _blur(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Blur the samples whose sigma ``[B]`` is above 0."""
        # The parts of kornia's gaussian_blur2d, which itself reads sigma back to the host to check it.
        from kornia.filters import filter2d_separable
        from kornia.filters.kernels import gaussian

        applied = sigma > 0
        side = max(3, self.size // 10 | 1)  # odd
        # kornia 0.8 would copy the mean, its default, from the host at every call.
        mean = torch.full((1, 1), side // 2, device=x.device, dtype=torch.float32)
        kernel = gaussian(side, torch.where(applied, sigma, 1.0)[:, None], mean=mean)  # [B, side]
        return torch.where(_per_image(applied), filter2d_separable(x, kernel, kernel), x)

    def _finish(self, x: Tensor) -> Tensor:
        """Normalize, and repeat 1 channel to 3, in one pass."""
        count = self.channels or x.shape[1]
        if self.normalize is None:
            return x if x.shape[1] == count else x.expand(-1, count, -1, -1)
        shift, factor = self._normalization(x.device, count)
        return torch.addcmul(shift, x, factor)

    # -- what is made once per device ------------------------------------------------------------------------

    def _normalization(self, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
        """Return the shift and the factor ``[1, count, 1, 1]`` that normalize images of so many channels."""
        if (device, count) not in self._constants:
            assert self.normalize is not None
            means, stds = self.normalize
            if count == 1:
                means, stds = (sum(means) / len(means),), (sum(stds) / len(stds),)
            shifts = [-mean / std for mean, std in zip(means, stds, strict=True)]
            factors = [1 / std for std in stds]
            with torch.inference_mode(False):  # they outlive the mode they happen to be made in
                table = torch.tensor([shifts, factors], dtype=torch.float32, device=device)  # [2, 1 or 3]
                shift, factor = table[:, None, :, None, None].expand(-1, 1, count, 1, 1)
            self._constants[device, count] = shift, factor
        return self._constants[device, count]

    def _plan(self, device: torch.device, view: int) -> sampling.Draw:
        """Return the draw of the uniforms of all operations that are on."""
        if (device, view) not in self._plans:
            strengths = {
                _CROP: self.scale is not None,
                _FLIP: self.flip,
                _JITTER: self.jitter_p if any(self.jitter) else 0,
                _GRAYSCALE: self.grayscale,
                _BLUR: self.blur,
                _SOLARIZE: self.solarize,
                _EQUALIZE: self.equalize,
            }
            uniform = sampling.Uniform()
            fields: dict[sampling.Name, sampling.Field] = {
                operation: sampling.Field(_UNIFORMS[operation], sampling.AUGMENT, view, operation, uniform)
                for operation, strength in strengths.items()
                if strength
            }
            self._plans[device, view] = sampling.Draw(fields, device)
        return self._plans[device, view]

    @cached_property
    def _plans(self) -> dict[tuple[torch.device, int], sampling.Draw]:
        return {}

    @cached_property
    def _constants(self) -> dict[tuple[torch.device, int], tuple[Tensor, Tensor]]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # Device tensors stay behind when a pipeline is copied or sent to another process.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def check(self, channels: int) -> None:
        """Raise a ValueError if images of so many channels cannot be augmented."""
        if channels not in (1, 3):
            raise ValueError(f"Got images with {channels} channels: augmentation works on 1 or 3.")
        if self.channels == 1 and channels == 3:
            raise ValueError(
                "Got images with 3 channels for channels=1: use channels=3, or convert the images to gray "
                "first."
            )

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            kind = type(images).__name__
            if isinstance(images, Tensor):
                kind = f"images of shape {tuple(images.shape)} and dtype {images.dtype}"
            raise ValueError(
                f"Got {kind}: give a batch [B, C, H, W] of floats in [0, 1] (bytes: images.float() / 255)."
            )
        self.check(images.shape[1])


# -- ready-made pipelines ------------------------------------------------------------------------------------


def unnormalized(transform: Any) -> Any:
    """Return the pipeline without its normalization, whose pixels are not for eyes or files.

    Any other value is returned as it is.
    """
    return replace(transform, normalize=None) if isinstance(transform, Augmentation) else transform


def simclr(
    size: int, *, color: bool = True, channels: int | None = 3, normalize: Normalization | None = IMAGENET
) -> Augmentation:
    """Return the SimCLR set (Chen et al. 2020) as the paper uses it (app. D and E): crop, flip, color.

    The crop has 20 to 100 % of the area.

    Args:
        size: side of the output in pixels.
        color: whether to add color jitter (0.4, 0.4, 0.4, 0.1; p 0.8) and grayscale (p 0.2). The paper's ML
            views go without: it finds that they hurt there.
        channels: see :class:`Augmentation`.
        normalize: see :class:`Augmentation`.

    Raises:
        ValueError: for an invalid value.
    """
    if not checks.flag("color", color):
        return Augmentation(size=size, channels=channels, normalize=normalize)
    strengths = (0.4, 0.4, 0.4, 0.1)
    return Augmentation(size=size, jitter=strengths, grayscale=0.2, channels=channels, normalize=normalize)


def byol(
    size: int, *, channels: int | None = 3, normalize: Normalization | None = IMAGENET
) -> tuple[Augmentation, Augmentation]:
    """Return the two different pipelines of BYOL (Grill et al. 2020, table 6), one per view.

    Both: crop of 8 to 100 % of the area, flip, jitter (0.4, 0.4, 0.2, 0.1; p 0.8), grayscale (p 0.2). The
    first always blurs; the second blurs with p 0.1 and solarizes with p 0.2.

    Args:
        size: side of the output in pixels.
        channels: see :class:`Augmentation`.
        normalize: see :class:`Augmentation`.

    Raises:
        ValueError: for an invalid value.
    """

    def pipeline(blur: float, solarize: float) -> Augmentation:
        return Augmentation(
            size=size,
            scale=(0.08, 1.0),
            jitter=(0.4, 0.4, 0.2, 0.1),
            grayscale=0.2,
            blur=blur,
            solarize=solarize,
            channels=channels,
            normalize=normalize,
        )

    return pipeline(1.0, 0.0), pipeline(0.1, 0.2)


def gray(size: int, *, channels: int | None = 3, normalize: Normalization | None = IMAGENET) -> Augmentation:
    """Return a pipeline for 1-channel data, where color is brightness and contrast (0.4 each, p 0.8).

    Crop and flip are as in :func:`simclr`.

    Args:
        size: side of the output in pixels.
        channels: see :class:`Augmentation`.
        normalize: see :class:`Augmentation`.

    Raises:
        ValueError: for an invalid value.
    """
    return Augmentation(size=size, jitter=(0.4, 0.4, 0.0, 0.0), channels=channels, normalize=normalize)


_NAMES: dict[str, Callable[..., Augmentation | tuple[Augmentation, ...]]] = {
    "simclr": simclr,
    "byol": byol,
    "gray": gray,
    "custom": Augmentation,
}

FACTORIES = tuple(_NAMES.values())
"""What users may pass uncalled, by mistake."""


def build(spec: object) -> Augmentation | tuple[Augmentation | None, ...] | None:
    """Return T_x from a configuration.

    Args:
        spec: ``{"name": "simclr", "size": 28, "color": False}``, that is a name (simclr, byol, gray, or
            custom for an :class:`Augmentation`) and its arguments, where ``normalize`` may also be
            ``"imagenet"``; or an :class:`Augmentation`, or ``None`` for raw views; or a sequence of these,
            one per view.

    Returns:
        One pipeline for all views; or a tuple of them (and of ``None``), one per view, also for ``byol``; or
        ``None``.

    Raises:
        ValueError: for an unknown name or key, a missing one, or a value out of range.

    Examples:
        >>> build({"name": "simclr", "size": 28, "color": False}) == simclr(28, color=False)
        True
    """
    if spec is None or isinstance(spec, Augmentation):
        return spec
    if isinstance(spec, Mapping):
        return _build_named(spec)
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        raise ValueError(
            f"Invalid transform={spec!r}: give a mapping with a name ({listing(_NAMES)}) and its arguments, "
            "an Augmentation, a list of these (one per view), or None for raw views."
        )
    if not spec:
        raise ValueError("Invalid transform=[]: give one pipeline per view, or None for raw views.")
    views = []
    for view_spec in spec:
        view = build(view_spec)
        if isinstance(view, tuple):
            raise ValueError(
                f"Invalid transform for one view, {view_spec!r}: it makes a pipeline per view itself; "
                "give it without the list."
            )
        views.append(view)
    return tuple(views)


def _build_named(spec: Mapping[Any, Any]) -> Augmentation | tuple[Augmentation, ...]:
    """Return the pipeline or pipelines of a name and its arguments."""
    if "name" not in spec:
        raise ValueError(f"The transform {dict(spec)!r} has no name: the names are {listing(_NAMES)}.")
    arguments = dict(spec)
    name = arguments.pop("name")
    if not isinstance(name, str) or name not in _NAMES:
        raise ValueError(
            f"Unknown transform name {name!r}: the names are {listing(_NAMES)}.{did_you_mean(name, _NAMES)}"
        )
    keys = list(inspect.signature(_NAMES[name]).parameters)
    for key in arguments:
        if key not in keys:
            raise ValueError(
                f"Unknown key {key!r} of transform {name!r}: its keys are "
                f"{listing(keys)}.{did_you_mean(key, keys)}"
            )
    if "size" not in arguments:
        raise ValueError(
            f"The transform {name!r} needs a size, the side of its output in pixels: add it, e.g. size: 28."
        )
    if arguments.get("normalize") == "imagenet":
        arguments["normalize"] = IMAGENET
    return _NAMES[name](**arguments)


# -- small parts ---------------------------------------------------------------------------------------------


def _resize(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return whole images at another size, antialiased where they shrink."""
    # kornia's antialiasing is a blur before a plain resize; torch's own is the one of torchvision and Pillow.
    if tuple(images.shape[-2:]) == shape:
        return images
    return F.interpolate(images, shape, mode="bilinear", align_corners=False, antialias=True)


def _equalize(images: Tensor) -> Tensor:
    """Make each channel's histogram of 256 levels flat, by Pillow's rule."""
    # kornia's equalize runs image by image and waits for the device at each.
    levels = (images * 255).round().clamp(0, 255).long().flatten(2)  # [B, C, H * W]
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    # The pixels for each level of the output; those of the highest level there is are left out.
    step = (levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(0, 255)
    flat = torch.where(step > 0, table.gather(2, levels), levels)
    return (flat.float() / 255).view_as(images)


def _gray(x: Tensor) -> Tensor:
    """Return the luma of colored images, ``[B, 3, H, W] -> [B, 1, H, W]``.

    kornia 0.8 copies the weights from the host at every call.
    """
    red, green, blue = (torch.full((), weight, device=x.device) for weight in (0.299, 0.587, 0.114))
    luma = torch.addcmul(torch.addcmul(x[:, 0] * red, x[:, 1], green), x[:, 2], blue)
    return luma[:, None]


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return ``factor [B]`` of the images and the rest of others, cut to [0, 1].

    Of gray images kornia 0.8 would take the mean of the whole batch for contrast.
    """
    share = _per_image(factor)
    return (x * share + other * (1 - share)).clamp(0.0, 1.0)


def _per_image(values: Tensor) -> Tensor:
    """Return ``[B]`` as ``[B, 1, 1, 1]``."""
    return values[:, None, None, None]


def _numbers(name: str, value: object, meaning: str, count: int = 2) -> tuple[float, ...]:
    """Return the value as a tuple of so many finite numbers."""
    numbers = _sequence(value)
    if numbers is None or len(numbers) != count or not all(map(is_number, numbers)):
        raise ValueError(f"Invalid {name}={value!r}: give {count} numbers, {meaning}.")
    return numbers


def _check_ascending(name: str, value: tuple[float, float], most: float = math.inf) -> None:
    if not 0 < value[0] <= value[1] <= most:
        bound = "" if most == math.inf else f" <= {most}"
        raise ValueError(f"Invalid {name}={value!r}: it must hold 0 < smallest <= largest{bound}.")


def _check_share(name: str, value: object, kind: str) -> None:
    if not is_number(value) or not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"Invalid {name}={value!r}: it is {kind}, a number from 0 to 1.")


def _as_normalization(value: object) -> Normalization:
    """Return means and standard deviations as tuples."""
    parts = [_sequence(part) for part in _sequence(value) or ()]
    match parts:
        case [tuple(means), tuple(stds)] if len(means) == len(stds) in (1, 3) and all(
            map(is_number, means + stds)
        ):
            if min(stds) > 0:
                return means, stds
    raise ValueError(
        f"Invalid normalize={value!r}: give (means, standard deviations) of 3 channels or of 1, standard "
        "deviations above 0, or None; the default is IMAGENET."
    )


def _sequence(value: object) -> tuple[Any, ...] | None:
    """Return the value as a tuple if it is a sequence and no text."""
    return None if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
