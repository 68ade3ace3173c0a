"""The samplers' update rules: what a step makes of the network's output, as numbers that are made once.

Every sampler here is a chain of steps. A step gets the noisy sample x and the network's output F, and returns
the mean of the next sample, to which noise of a fixed scale is then added:

    x0 = clip(a x + b F),  mean = p x0 + q x + r F,  next x = mean + scale z.

The numbers follow from the noise schedule alone, so that a step asks neither the schedule nor the host for
anything. They agree with the schedulers of diffusers, which only lend their schedules: the noise levels, and
the times of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlviews.errors import listing

SMALLEST = 1e-20
"""The least variance that a predicted one is interpolated from, as in diffusers."""


class Combination(NamedTuple):
    """``sample * x + output * F``, of the noisy sample x and the network's output F."""

    sample: float
    output: float

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        if self.sample == 0:
            return output * self.output
        return torch.add(x * self.sample, output, alpha=self.output)


@dataclass(frozen=True)
class Step:
    """One pass of the network, and the noise that is added after it."""

    name: str  # of the noise in what the step begins with
    time: float  # what the network is told
    input_scale: float  # of what the network gets
    image: Combination  # x0, the image that the network predicts
    weight: float  # of x0 in the mean
    rest: Combination  # what is added to it
    signal: float  # of an image that is noised to where this step begins: signal * x0 + noise * z
    noise: float  # likewise
    scale: float  # of the noise that is added after the step; 0 for none
    clip: float | None = None  # x0 is cut to [-clip, clip]
    quantile: tuple[float, float] | None = None  # dynamic thresholding: which quantile, and its upper limit
    log_variance: tuple[float, float] | None = None  # the ends that a predicted variance lies between

    @property
    def adds_noise(self) -> bool:
        """Whether noise is added after the step."""
        return self.scale > 0 or self.log_variance is not None

    def mean(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the mean of the next sample.

        Args:
            x: the noisy sample, ``[B, C, H, W]``.
            output: the network's output for it, of the same shape.
        """
        image = self.image(x, output)
        if self.quantile is not None:
            image = _thresholded(image, *self.quantile)
        elif self.clip is not None:
            image = image.clamp(-self.clip, self.clip)
        mean = image * self.weight
        if self.rest.sample:
            mean = torch.add(mean, x, alpha=self.rest.sample)
        if self.rest.output:
            mean = torch.add(mean, output, alpha=self.rest.output)
        return mean

    def scales(self, variance: Tensor) -> Tensor:
        """Return the noise's scale for every pixel from the network's second half, in [-1, 1]."""
        assert self.log_variance is not None
        low, high = self.log_variance
        # (v + 1) / 2 is the place between the logarithms of the least and the largest variance.
        return ((variance + 1) * ((high - low) / 4) + low / 2).exp()

    def numbers(self) -> list[float]:
        """Return all numbers of the step, nested ones included."""
        values: list[float] = []
        for field in fields(self):
            value = getattr(self, field.name)
            values += value if isinstance(value, tuple) else [value]
        return [value for value in values if isinstance(value, float)]


def _thresholded(image: Tensor, quantile: float, most: float) -> Tensor:
    """Cut x0 to its own range, a quantile of its magnitudes, and bring that to [-1, 1] (Imagen, sec. 2.3)."""
    limit = torch.quantile(image.abs().flatten(1), quantile, dim=1).clamp(1, most)  # [B]
    limit = limit[:, None, None, None]
    return image.clamp(-limit, limit) / limit


class Chain(NamedTuple):
    """A sampler's steps, from noise to an image."""

    start: float  # the scale of the first noise
    steps: tuple[Step, ...]


# -- the samplers: each takes a scheduler of diffusers, the times of the steps, and eta ----------------------


def _ddpm(scheduler: Any, times: Sequence[float], eta: float) -> Chain:
    """DDPM (Ho et al. 2020, eq. 7) on a subset of the times; the variance is fixed, or predicted."""
    kind = scheduler.config.variance_type
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        raise ValueError(
            f"variance_type {kind!r} is not supported: it is fixed_small, fixed_small_log, fixed_large or "
            "learned_range"
        )
    steps = []
    for time, previous in zip(times, [*times[1:], -1], strict=True):
        alpha = _alpha(scheduler, time)
        alpha_previous = _alpha(scheduler, previous) if previous >= 0 else 1.0
        ratio = alpha / alpha_previous
        beta = 1 - ratio
        variance = (1 - alpha_previous) / (1 - alpha) * beta
        log_variance = None
        if kind == "fixed_large":
            variance = beta
        if kind == "learned_range" and time > 0:
            log_variance = (math.log(max(variance, SMALLEST)), math.log(beta))
        step = Step(
            name=f"t{time:g}",
            time=time,
            input_scale=1.0,
            image=_image(scheduler, alpha),
            weight=math.sqrt(alpha_previous) * beta / (1 - alpha),
            rest=Combination(math.sqrt(ratio) * (1 - alpha_previous) / (1 - alpha), 0.0),
            signal=math.sqrt(alpha),
            noise=math.sqrt(1 - alpha),
            scale=math.sqrt(variance) if time > 0 and log_variance is None else 0.0,
            log_variance=log_variance,
            **_limits(scheduler),
        )
        steps.append(step)
    return Chain(1.0, tuple(steps))


def _ddim(scheduler: Any, times: Sequence[float], eta: float) -> Chain:
    """DDIM with noise (Song et al. 2021, eq. 12 and 16)."""
    final = float(scheduler.final_alpha_cumprod)
    following = [*times[1:], -1.0]
    if scheduler.num_inference_steps:
        # diffusers goes a fixed stride back, which is not always the next of its own times.
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        following = [time - stride for time in times]
    steps = []
    for time, previous in zip(times, following, strict=True):
        alpha = _alpha(scheduler, time)
        alpha_previous = _alpha(scheduler, previous) if previous >= 0 else final
        variance = max((1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous), 0.0)
        scale = eta * math.sqrt(variance)
        direction = math.sqrt(max(1 - alpha_previous - scale**2, 0.0))
        step = Step(
            name=f"t{time:g}",
            time=time,
            input_scale=1.0,
            image=_image(scheduler, alpha),
            weight=math.sqrt(alpha_previous),
            rest=_times(_epsilon(scheduler, alpha), direction),
            signal=math.sqrt(alpha),
            noise=math.sqrt(1 - alpha),
            scale=scale,
            **_limits(scheduler),
        )
        steps.append(step)
    return Chain(1.0, tuple(steps))


def _ancestral(scheduler: Any, times: Sequence[float], eta: float) -> Chain:
    """Ancestral Euler steps on x0 + sigma z, as in k-diffusion."""
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {kind!r} is not supported: it is epsilon or v_prediction")
    alphas = scheduler.alphas_cumprod.double()
    table = ((1 - alphas) / alphas).sqrt().tolist()
    sigmas = [*(_interpolated(table, time) for time in times), 0.0]
    steps = []
    for time, sigma, target in zip(times, sigmas, sigmas[1:], strict=False):
        up = math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
        down = math.sqrt(target**2 - up**2)
        image = Combination(1.0, -sigma)
        if kind == "v_prediction":
            image = Combination(1 / (sigma**2 + 1), -sigma / math.sqrt(sigma**2 + 1))
        # mean = x + (x - x0) / sigma * (down - sigma)
        step = Step(
            name=f"t{time:g}",
            time=time,
            input_scale=1 / math.sqrt(sigma**2 + 1),
            image=image,
            weight=1 - down / sigma,
            rest=Combination(down / sigma, 0.0),
            signal=1.0,
            noise=sigma,
            scale=up,
        )
        steps.append(step)
    widest = max(sigmas)
    spreads = scheduler.config.timestep_spacing in ("linspace", "trailing")
    return Chain(widest if spreads else math.sqrt(widest**2 + 1), tuple(steps))


def _consistency(scheduler: Any, times: Sequence[float], eta: float) -> Chain:
    """Consistency models' multistep sampling (Song et al. 2023, algorithm 1)."""
    config = scheduler.config
    least, data = float(config.sigma_min), float(config.sigma_data)
    sigmas = scheduler.sigmas.double().tolist()
    steps: list[Step] = []
    for name, time, sigma, target in zip(_noise_names(sigmas[:-1]), times, sigmas, sigmas[1:], strict=False):
        spread = math.sqrt(sigma**2 + data**2)
        skip = data**2 / ((sigma - least) ** 2 + data**2)
        target = min(max(target, least), float(config.sigma_max))
        is_last = len(steps) == len(times) - 1
        step = Step(
            name=name,
            time=time,
            input_scale=1 / spread,
            image=Combination(skip, (sigma - least) * data / spread),
            weight=1.0,
            rest=Combination(0.0, 0.0),
            signal=1.0,
            noise=sigma,
            scale=0.0 if is_last else float(config.s_noise) * math.sqrt(target**2 - least**2),
            clip=1.0 if config.clip_denoised else None,
        )
        steps.append(step)
    return Chain(float(config.sigma_max), tuple(steps))


def _latent_consistency(scheduler: Any, times: Sequence[float], eta: float) -> Chain:
    """Latent consistency models' multistep sampling (Luo et al. 2023, algorithm 3)."""
    data = 0.5
    steps = []
    for time, previous in zip(times, [*times[1:], None], strict=True):
        alpha = _alpha(scheduler, time)
        alpha_previous = 1.0 if previous is None else _alpha(scheduler, previous)
        scaled = time * scheduler.config.timestep_scaling
        skip, out = data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)
        step = Step(
            name=f"t{time:g}",
            time=time,
            input_scale=1.0,
            image=_image(scheduler, alpha),
            weight=math.sqrt(alpha_previous) * out,
            rest=Combination(math.sqrt(alpha_previous) * skip, 0.0),
            signal=math.sqrt(alpha),
            noise=math.sqrt(1 - alpha),
            scale=math.sqrt(1 - alpha_previous),
            **_limits(scheduler),
        )
        steps.append(step)
    return Chain(1.0, tuple(steps))


def _trajectory(scheduler: Any, times: Sequence[float], eta: float) -> Chain:
    """Trajectory consistency distillation's strategic stochastic sampling (Zheng et al. 2024, eq. 32)."""
    steps = []
    for time, previous in zip(times, [*times[1:], None], strict=True):
        alpha = _alpha(scheduler, time)
        # The network jumps to an earlier time than the next, from where noise leads back. The product is
        # rounded to float32 as in diffusers, as it decides which whole number is next below.
        target = 0 if previous is None else int(torch.floor((1 - eta) * torch.tensor(int(previous))))
        alpha_target = _alpha(scheduler, target)
        ratio = 1.0 if previous is None else _alpha(scheduler, previous) / alpha_target
        step = Step(
            name=f"t{time:g}",
            time=time,
            input_scale=1.0,
            image=_image(scheduler, alpha),
            weight=math.sqrt(ratio * alpha_target),
            rest=_times(_epsilon(scheduler, alpha), math.sqrt(ratio * (1 - alpha_target))),
            signal=math.sqrt(alpha),
            noise=math.sqrt(1 - alpha),
            scale=math.sqrt(max(1 - ratio, 0.0)),
        )
        steps.append(step)
    return Chain(1.0, tuple(steps))


@dataclass(frozen=True)
class Sampler:
    """A sampler, and the scheduler of diffusers that lends its schedule."""

    scheduler: str
    chain: Callable[[Any, Sequence[float], float], Chain]
    eta: float | None = None  # the default; None for samplers that have no eta


SAMPLERS = {
    "ddpm": Sampler("DDPMScheduler", _ddpm),
    "ddim": Sampler("DDIMScheduler", _ddim, eta=1.0),
    "ancestral": Sampler("EulerAncestralDiscreteScheduler", _ancestral),
    "cm": Sampler("CMStochasticIterativeScheduler", _consistency),
    "lcm": Sampler("LCMScheduler", _latent_consistency),
    "tcd": Sampler("TCDScheduler", _trajectory, eta=0.3),
}
"""The samplers by name."""


def chain(name: str, scheduler: Any, steps: int, timesteps: Sequence[int] | None, eta: float) -> Chain:
    """Return the steps of a sampler.

    Args:
        name: one of ``SAMPLERS``.
        scheduler: that sampler's scheduler of diffusers; its steps are set here.
        steps: how many there are, spread as the scheduler does it.
        timesteps: the steps' times instead, descending: those of the noise schedule; of a consistency model,
            places on its ramp of noise levels.
        eta: the share of noise, for samplers that have one.

    Raises:
        ValueError: if the scheduler has no such steps, or a setting that is not supported.
    """
    if timesteps is None:
        scheduler.set_timesteps(steps)
        times = [float(time) for time in scheduler.timesteps]
    elif name == "cm":
        scheduler.set_timesteps(timesteps=list(timesteps))
        times = [float(time) for time in scheduler.timesteps]
    else:
        times = [float(time) for time in timesteps]
    if any(later >= earlier for earlier, later in pairwise(times)):
        raise ValueError(f"{len(times)} steps are more than the schedule has times for: {listing(times)}")
    if name != "cm":
        _check_schedule(scheduler.alphas_cumprod)
    try:
        result = SAMPLERS[name].chain(scheduler, times, eta)
    except ZeroDivisionError:
        raise ValueError("its first time leaves nothing of the image, which asks for v_prediction") from None
    numbers = [result.start, *(number for step in result.steps for number in step.numbers())]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("its noise schedule ends in numbers that are not finite")
    return result


def _check_schedule(alphas: Tensor) -> None:
    """Raise a ValueError unless the image's share falls from time to time, between 1 and 0."""
    if not alphas.isfinite().all() or alphas.max() >= 1 or alphas.min() < 0 or (alphas.diff() > 0).any():
        raise ValueError("its noise does not grow from time to time: see its betas")


# -- what the samplers share ---------------------------------------------------------------------------------


def _alpha(scheduler: Any, time: float) -> float:
    """Return the squared share of the image that is left at a time."""
    return float(scheduler.alphas_cumprod[int(time)])


def _image(scheduler: Any, alpha: float) -> Combination:
    """Return x0 in terms of x and the network's output, by what the network predicts."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return Combination(1 / math.sqrt(alpha), -math.sqrt(1 - alpha) / math.sqrt(alpha))
    if kind == "sample":
        return Combination(0.0, 1.0)
    if kind == "v_prediction":
        return Combination(math.sqrt(alpha), -math.sqrt(1 - alpha))
    raise ValueError(f"prediction_type {kind!r} is not supported: it is epsilon, sample or v_prediction")


def _epsilon(scheduler: Any, alpha: float) -> Combination:
    """Return the noise in x in terms of x and the network's output, by what the network predicts."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return Combination(1 / math.sqrt(1 - alpha), -math.sqrt(alpha) / math.sqrt(1 - alpha))
    if kind == "v_prediction":
        return Combination(math.sqrt(1 - alpha), math.sqrt(alpha))
    return Combination(0.0, 1.0)


def _noise_names(sigmas: Sequence[float]) -> list[str]:
    """Return the names of noises by their standard deviations, with as many digits as tell them apart."""
    for digits in range(3, 17):
        names = [f"noise{sigma:.{digits}g}" for sigma in sigmas]
        if len(set(names)) == len(names):
            break
    return names


def _times(combination: Combination, factor: float) -> Combination:
    return Combination(combination.sample * factor, combination.output * factor)


def _limits(scheduler: Any) -> dict[str, Any]:
    """Return how x0 is limited."""
    config = scheduler.config
    if config.thresholding:
        return {"quantile": (float(config.dynamic_thresholding_ratio), float(config.sample_max_value))}
    return {"clip": float(config.clip_sample_range) if config.clip_sample else None}


def _interpolated(table: Sequence[float], place: float) -> float:
    """Return a table's value between two of its places."""
    low = min(int(place), len(table) - 1)
    high = min(low + 1, len(table) - 1)
    return table[low] + (place - low) * (table[high] - table[low])
