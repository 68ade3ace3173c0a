"""Compare our samplers with diffusers' own pipelines and schedulers on the same weights and noises.

    python benchmarks/parity/diffusion.py

The pipelines get a list of seeded generators of random numbers, one for each image; ours get the same numbers
as latents. Where diffusers has no pipeline for a network and a sampler, its scheduler is run in a plain loop.
The networks are tiny, with random weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import diffusers
import torch
import typer
from compare import SEED, Row, compare_all, conclude, largest
from fill import fill
from record import RESULTS
from torch import Tensor, nn

import mlviews
from mlviews.weights import write_safetensors

LIMIT = 1e-5
ROWS = 3  # images
LABELS = torch.tensor([1, 2, 0])
PROMPTS = 3  # encoded ones, which the labels pick


class Case(NamedTuple):
    """A model, and how to sample from it."""

    name: str
    build: Callable[[], Any]  # a pipeline of diffusers
    reference: Callable[..., Tensor]  # called as reference(pipeline, random, steps=, eta=, ...): the images
    options: dict[str, Any]  # of load_generator
    is_heavy: bool = False  # a pipeline that imports transformers, which takes longer than all else
    labels: Tensor | None = None


# -- networks ------------------------------------------------------------------------------------------------


def filled(network: nn.Module) -> Any:
    """Return the network with weights that follow from their names."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(fill(shapes, SEED))
    return network.eval()


def unet(**options: Any) -> Any:
    """Return a small network on pixels."""
    sizes: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8,
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return filled(diffusers.UNet2DModel(**(sizes | options)))


def dit() -> Any:
    """Return a small transformer with DiT's 1000 classes, and learned variances."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    return filled(transformer)


def text_unet(**options: Any) -> Any:
    """Return a small network that takes prompts."""
    sizes: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 8,
    }  # fmt: skip
    return filled(diffusers.UNet2DConditionModel(**(sizes | options)))


def vae(**options: Any) -> Any:
    """Return a small autoencoder."""
    sizes: dict[str, Any] = {
        "block_out_channels": (4, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "scaling_factor": 0.5,
    }  # fmt: skip
    return filled(diffusers.AutoencoderKL(**(sizes | options)))


def tiny_vae() -> Any:
    """Return a small tiny autoencoder."""
    sizes: dict[str, Any] = {
        "encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
    }  # fmt: skip
    return filled(diffusers.AutoencoderTiny(**sizes))


class Model(nn.Module):
    """A network and a scheduler without a pipeline, stored as a pipeline would be."""

    def __init__(self, scheduler: Any, **networks: Any) -> None:
        super().__init__()
        self.scheduler = scheduler
        for name, network in networks.items():
            self.add_module(name, network)

    def save_pretrained(self, folder: Path) -> None:
        """Write the folder."""
        self.scheduler.save_pretrained(folder / "scheduler")
        for name, network in self.named_children():
            network.save_pretrained(folder / name)


def encoded_prompts(pooled: bool) -> dict[str, Tensor]:
    """Return random numbers in the place of encoded prompts."""
    shapes = {"prompt_embeds": (PROMPTS, 5, 8), "negative_prompt_embeds": (1, 5, 8)}
    if pooled:
        shapes |= {"pooled_prompt_embeds": (PROMPTS, 6), "negative_pooled_prompt_embeds": (1, 6)}
    random = torch.Generator().manual_seed(SEED)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


# -- diffusers' images ---------------------------------------------------------------------------------------

Random = Sequence[torch.Generator]


def by_pipeline(pipeline: Any, random: Random, **options: Any) -> Tensor:
    """Return the images of a pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(generator=list(random), output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def by_scheduler(
    model: Any, random: Random, labels: Tensor | None = None, guidance: float = 1.0, **options: Any
) -> Tensor:
    """Return images by a scheduler's steps in a loop, as the pipelines have it.

    Args:
        model: a network and a scheduler, and perhaps an autoencoder.
        random: one generator for each image.
        labels: classes, or prompts.
        guidance: of a network with prompts.
        **options: ``steps`` or ``timesteps``, and ``eta``.
    """
    scheduler = model.scheduler
    if "timesteps" in options:
        scheduler.set_timesteps(timesteps=options["timesteps"])
    else:
        scheduler.set_timesteps(options["steps"])
    is_text = isinstance(model.unet, diffusers.UNet2DConditionModel)
    shape = (1, model.unet.config.in_channels, *[model.unet.config.sample_size] * 2)
    x = torch.cat([torch.randn(shape, generator=generator) for generator in random])
    x = x * scheduler.init_noise_sigma
    extra = {"eta": options["eta"]} if "eta" in options else {}
    for moment in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, moment)
        if is_text:
            texts = encoded_prompts(pooled=False)
            empty = texts["negative_prompt_embeds"].expand(ROWS, -1, -1)
            output = model.unet(scaled, moment, texts["prompt_embeds"][labels]).sample
            unguided = model.unet(scaled, moment, empty).sample
            output = unguided + guidance * (output - unguided)
        elif labels is None:
            output = model.unet(scaled, moment).sample
        else:
            output = model.unet(scaled, moment, class_labels=labels).sample
        x = scheduler.step(output, moment, x, generator=list(random), **extra).prev_sample
    if hasattr(model, "vae"):
        x = model.vae.decode(x / model.vae.config.scaling_factor).sample
    return (x / 2 + 0.5).clamp(0, 1)


def by_dit_pipeline(pipeline: Any, random: Random, labels: Tensor, **options: Any) -> Tensor:
    """Return the images of DiT's pipeline, which hands its scheduler neither the random numbers nor eta."""
    scheduler = pipeline.scheduler
    step = scheduler.step

    def with_noise(output: Tensor, moment: Any, sample: Tensor) -> Any:
        """Add the same noise with and without the label; the pipeline uses the first half of the samples."""
        halves = len(sample) // ROWS
        noise = torch.cat([torch.randn(1, *sample.shape[1:], generator=generator) for generator in random])
        return step(output, moment, sample, eta=1.0, variance_noise=noise.repeat(halves, 1, 1, 1))

    scheduler.step = with_noise
    return by_pipeline(pipeline, random, class_labels=labels.tolist(), **options)


def by_text_pipeline(pipeline: Any, random: Random, labels: Tensor, **options: Any) -> Tensor:
    """Return the images of a text-to-image pipeline for encoded prompts."""
    pooled = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    texts = encoded_prompts(pooled)
    texts = {
        name: value.expand(PROMPTS, *value.shape[1:])[labels].contiguous() for name, value in texts.items()
    }
    if isinstance(pipeline, diffusers.LatentConsistencyModelPipeline):
        del texts["negative_prompt_embeds"]
    return by_pipeline(pipeline, random, **texts, **options)


# -- the cases -----------------------------------------------------------------------------------------------

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # stable diffusion's


def _loop(name: str, scheduler: Callable[[], Any], **options: Any) -> Case:
    """Return a case of a network on pixels with a scheduler in a loop."""

    def build() -> Model:
        return Model(scheduler(), unet=unet())

    def reference(model: Any, random: Random, **_: Any) -> Tensor:
        return by_scheduler(model, random, **options)

    return Case(name, build, reference, dict(options))


def _ddpm(name: str, steps: int = 4, **options: Any) -> Case:
    return Case(
        f"ddpm {name}",
        lambda: diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(**options)),
        lambda pipeline, random, **_: by_pipeline(
            pipeline, random, batch_size=ROWS, num_inference_steps=steps
        ),
        {"steps": steps},
    )


def _ddim(name: str, eta: float = 1.0, steps: int = 4, **options: Any) -> Case:
    def reference(pipeline: Any, random: Random, **_: Any) -> Tensor:
        pipeline.scheduler = diffusers.DDIMScheduler(**options)  # the pipeline changes some of its settings
        return by_pipeline(pipeline, random, batch_size=ROWS, num_inference_steps=steps, eta=eta)

    def build() -> Any:
        pipeline = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
        pipeline.scheduler = diffusers.DDIMScheduler(**options)
        return pipeline

    return Case(f"ddim {name}", build, reference, {"steps": steps, "eta": eta})


def _consistency(name: str, classes: int | None, options: dict[str, Any], **settings: Any) -> Case:
    calls = {"num_inference_steps": options["steps"]} if "steps" in options else {
        "timesteps": options["timesteps"], "num_inference_steps": None,
    }  # fmt: skip
    return Case(
        f"consistency {name}",
        lambda: diffusers.ConsistencyModelPipeline(
            unet(num_class_embeds=classes), diffusers.CMStochasticIterativeScheduler(**settings)
        ),
        lambda pipeline, random, labels=None, **_: by_pipeline(
            pipeline, random, batch_size=ROWS, class_labels=labels, **calls
        ),
        options,
        labels=LABELS if classes else None,
    )


def _dit(guidance: float) -> Case:
    return Case(
        f"dit guidance {guidance:g}",
        lambda: diffusers.DiTPipeline(dit(), vae(), diffusers.DDIMScheduler(clip_sample=False)),
        lambda pipeline, random, labels, **_: by_dit_pipeline(
            pipeline, random, labels, guidance_scale=guidance, num_inference_steps=4
        ),
        {"guidance": guidance},
        labels=LABELS,
    )


def _text_loop(
    name: str, scheduler: Callable[[], Any], autoencoder: Callable[[], Any], guidance: float
) -> Case:
    return Case(
        f"text {name}",
        lambda: Model(scheduler(), unet=text_unet(), vae=autoencoder()),
        lambda model, random, labels, **_: by_scheduler(model, random, labels, guidance, steps=4),
        {"guidance": guidance},
        labels=LABELS,
    )


def _text_pipeline(name: str, build: Callable[[], Any], guidance: float, **options: Any) -> Case:
    return Case(
        name,
        build,
        lambda pipeline, random, labels, **_: by_text_pipeline(
            pipeline, random, labels, guidance_scale=guidance, num_inference_steps=4, **options
        ),
        {"guidance": guidance, **options},
        is_heavy=True,
        labels=LABELS,
    )


def _stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), unet=text_unet(), text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=diffusers.DDIMScheduler(
            **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
    )  # fmt: skip


def _turbo() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(force_upcast=True), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=text_unet(
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 + 6 * 4,
        ),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**_BETAS, timestep_spacing="trailing"),
    )  # fmt: skip


def _latent_consistency() -> Any:
    return diffusers.LatentConsistencyModelPipeline(
        vae=vae(), unet=text_unet(time_cond_proj_dim=6), text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        scheduler=diffusers.LCMScheduler(),
    )  # fmt: skip


CASES = [
    _ddpm("fixed_small"),
    _ddpm("20 steps", steps=20),
    _ddpm("noise that stays", variance_type="fixed_large", timestep_spacing="trailing"),
    _ddpm("fixed_small_log, cosine", variance_type="fixed_small_log", beta_schedule="squaredcos_cap_v2"),
    _ddpm("dynamic threshold", thresholding=True, sample_max_value=2.0),
    _ddpm("v", prediction_type="v_prediction", clip_sample=False),
    Case(
        "ddpm learned variance",
        lambda: Model(diffusers.DDPMScheduler(variance_type="learned_range"), unet=unet(out_channels=6)),
        lambda model, random, **_: by_scheduler(model, random, steps=4),
        {},
    ),
    _loop("ddpm times", diffusers.DDPMScheduler, timesteps=[900, 400, 50]),
    _ddim("eta 1"),
    _ddim("eta 0.5, noise that stays", eta=0.5, set_alpha_to_one=False),
    _ddim("linspace", timestep_spacing="linspace"),
    _ddim("x0", prediction_type="sample"),
    _ddim("v, no signal at first", eta=0.9, prediction_type="v_prediction", rescale_betas_zero_snr=True,
          timestep_spacing="trailing"),
    _loop("ancestral", lambda: diffusers.EulerAncestralDiscreteScheduler(**_BETAS), steps=4),
    _loop("ancestral trailing, v", lambda: diffusers.EulerAncestralDiscreteScheduler(
        timestep_spacing="trailing", prediction_type="v_prediction"), steps=4),
    _loop("ancestral leading", lambda: diffusers.EulerAncestralDiscreteScheduler(
        **_BETAS, timestep_spacing="leading", steps_offset=1), steps=5),
    _consistency("4 steps", None, {"steps": 4}),
    _consistency("times, classes", 10, {"timesteps": [22, 0]}),
    _consistency("201 times", 10, {"timesteps": [106, 0]}, num_train_timesteps=201),
    _loop("lcm", diffusers.LCMScheduler, steps=4),
    _loop("lcm times, x0", lambda: diffusers.LCMScheduler(
        prediction_type="sample", clip_sample=True), timesteps=[999, 499, 19]),
    _loop("tcd", diffusers.TCDScheduler, steps=4, eta=0.3),
    _loop("tcd eta 1", diffusers.TCDScheduler, steps=4, eta=1.0),
    _loop("tcd v", lambda: diffusers.TCDScheduler(prediction_type="v_prediction"), steps=5, eta=0.7),
    _dit(1.0),
    _dit(4.0),
    _text_loop("lcm, tiny autoencoder", diffusers.LCMScheduler, tiny_vae, 1.0),
    _text_loop("ancestral, guided", diffusers.EulerAncestralDiscreteScheduler, vae, 3.0),
    _text_pipeline("stable diffusion, ddim", _stable_diffusion, 5.0, eta=1.0),
    _text_pipeline("sdxl turbo", _turbo, 1.0),
    _text_pipeline("sdxl guided", _turbo, 4.0),
    _text_pipeline("latent consistency", _latent_consistency, 8.5),
]  # fmt: skip


# -- the comparison ------------------------------------------------------------------------------------------


def seeded() -> list[torch.Generator]:
    """Return a generator of random numbers for each image."""
    return [torch.Generator().manual_seed(SEED + row) for row in range(ROWS)]


@torch.no_grad()
def compare(case: Case, folder: Path) -> Row:
    """Sample with both codes.

    Args:
        case: the model.
        folder: an empty one, for the model's files.
    """
    model = case.build()
    model.save_pretrained(folder)
    options = dict(case.options)
    network = getattr(model, "unet", None)
    if isinstance(network, diffusers.UNet2DConditionModel):
        pooled = network.config.addition_embed_type is not None
        write_safetensors(folder / "prompts.safetensors", encoded_prompts(pooled), {})
        options["prompts"] = folder / "prompts.safetensors"
    ours = mlviews.load_generator("diffusion", weights=folder, **options)
    random = seeded()
    latents = [
        torch.cat([torch.randn(1, *level.shape, generator=generator) for generator in random])
        for level in ours.levels
    ]
    labels = {} if case.labels is None else {"labels": case.labels}
    expected = case.reference(model, seeded(), **labels)
    images = ours(latents, case.labels)
    return {
        "case": case.name,
        "image": list(ours.image_shape),
        "levels": len(ours.levels),
        "contrast": expected.std().item(),
        "max": largest(images, expected),
        "mean": (images - expected).abs().mean().item(),
    }


# -- the time it takes ---------------------------------------------------------------------------------------

PAIRS, STEPS, SIZE, REPEATS = 8, 4, 32, 9


@torch.no_grad()
def timing(folder: Path) -> list[Row]:
    """Return the processor time for pairs of images of 4 steps, ours and diffusers' loop, in turns.

    Args:
        folder: an empty one, for the model's files.
    """
    network = unet(sample_size=SIZE, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=2)
    model = Model(diffusers.DDPMScheduler(), unet=network)
    model.save_pretrained(folder)
    ours = mlviews.load_generator("diffusion", weights=folder, steps=STEPS)
    anchors = ours.sample_latents(range(PAIRS))
    fresh = ours.sample_latents(range(PAIRS), seed=1)
    rows = []
    for name, first in (("all levels moved", 0), ("last level moved", STEPS - 1)):
        views = [anchors, [*anchors[:first], *fresh[first:]]]
        random = [torch.Generator().manual_seed(row) for row in range(2 * PAIRS)]
        sides: dict[str, Callable[[], Any]] = {
            "diffusers": lambda random=random: by_scheduler(model, random, steps=STEPS),
            "ours": lambda views=views, first=first: ours.decode_views(views, first),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(REPEATS + 1):
            for side, sample in sides.items():
                begin = time.process_time()
                sample()
                if repeat:  # the first time is for warming up
                    seconds[side].append(time.process_time() - begin)
        ratios = [first / second for first, second in zip(seconds["diffusers"], seconds["ours"], strict=True)]
        row: Row = {"case": name, "pairs": PAIRS, "steps": STEPS, "image": [3, SIZE, SIZE]}
        row |= {side: statistics.median(values) for side, values in seconds.items()}
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(row | {"ratio": median, "quartiles": [low, high]})
    return rows


def _compare(case: Any) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        return compare(case, Path(folder))


def main(
    only: Annotated[str, typer.Option(help="Cases whose name has this in it; no JSON is written then.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "parity-diffusion.json",
) -> None:
    """Compare all cases."""
    torch.set_num_threads(threads)
    rows = compare_all(CASES, only, _compare)
    facts: Row = {"diffusers": diffusers.__version__}
    if not only:
        with tempfile.TemporaryDirectory() as folder:
            facts["seconds"] = timing(Path(folder))
    columns = ("case", "image", "levels", "contrast", "mean")
    arguments = ["--threads", str(threads)]
    conclude(rows, columns, ("max",), "diffusion.py", arguments, None if only else out, LIMIT, facts)


if __name__ == "__main__":
    typer.run(main)
