"""Every mistake gives one clear error that names the value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Toy, toy_source
from safetensors.torch import save_file

import mlviews
from mlviews import (
    MLVGM,
    Level,
    MLViewSource,
    WeightsError,
    load_generator,
    perturb,
    transforms,
    wrap_generator,
)
from mlviews.evaluation.data import load_fashion_mnist
from mlviews.evaluation.learner import train
from mlviews.evaluation.retrieval import retrieve
from mlviews.explorer.session import Session
from mlviews.explorer.state import Setting, State
from mlviews.generators.biggan.deep import BigGANDeep
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.generators.inverter import Inverter
from mlviews.generators.semafo import SemafoConfig
from mlviews.generators.stylegan import StyleGAN2, StyleGAN2Config
from mlviews.generators.vdvae import VDVAE
from mlviews.generators.vdvae.reading import load as load_vdvae
from mlviews.perturb import Normal, Walker
from mlviews.weights.checkpoints import Checkpoint
from mlviews.zoo import FOLDER
from mlviews.zoo.images import training_images
from mlviews.zoo.train_semafo import labelled_rows


def from_config(**values: Any) -> Callable[[], object]:
    return lambda: MLViewSource.from_config({"preset": "fashion-ml-random", **values})


def source(**values: Any) -> Callable[[], object]:
    return lambda: toy_source(**values)


def classes() -> MLVGM:
    """A class-conditional generator."""
    return wrap_generator(
        lambda z, labels: z[0].view(-1, 1, 2, 2), levels=[("z", (4,))], image_shape=(1, 2, 2), num_classes=10
    )


def styled(**options: Any) -> StyleGAN2:
    return StyleGAN2(StyleGAN2Config(channels=(4, 4), z_dim=4, w_dim=4, mapping=(4,), **options))


def wrapped(fn: Callable[[Any], Any]) -> Callable[[], object]:
    g = wrap_generator(fn, levels=[("z", (4,))], image_shape=(1, 2, 2))
    return lambda: g(g.sample_latents(range(2)))


class Nothing(perturb.Perturber):
    """Forgets to return."""

    def __call__(self, latents: Any, noise: Any) -> Any:
        return None


def latents_of(function: str, *arguments: Any, **options: Any) -> Callable[[], object]:
    """A function of mlviews.latents on two samples of the toy generator."""
    g = Toy()
    return lambda: getattr(mlviews.latents, function)(g, g.sample_latents(range(2)), *arguments, **options)


def recombined(coarse: int, fine: int, split: int) -> Callable[[], object]:
    z = Toy().sample_latents(range(2))
    return lambda: mlviews.latents.recombine(z[:coarse], z[:fine], split)


def purifier(**options: Any) -> Callable[[], Any]:
    g = Toy()
    g.inverter = Inverter.of(g, width=8, hidden=8)
    return lambda: mlviews.Purifier(g, **options)


def flat() -> MLVGM:
    """A generator without a derivative."""
    return wrap_generator(
        lambda z: z[0].detach().sigmoid().view(-1, 1, 2, 2), levels=[("z", (4,))], image_shape=(1, 2, 2)
    )


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # retrieval
    "an item of one source": (
        lambda: retrieve(torch.eye(3), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])),
        ValueError,
        "item 1 is of one source only; leave it out",
    ),
    "fewer items than features": (
        lambda: retrieve(torch.eye(3), torch.tensor([0, 0]), torch.tensor([0, 1, 1])),
        ValueError,
        r"Invalid features .* for 2 items and 3 sources: give \[N, D\]",
    ),
    # levels
    "offsets neither kept nor dropped": (
        lambda: perturb.Resample("draw"),
        ValueError,
        "Invalid offsets 'draw': there are keep, drop",
    ),
    "level out of range": (
        source(perturb={3: Normal(1.0)}),
        ValueError,
        r"Level 3 is out of range.*0 \(l0\), 1 \(l1\), 2 \(l2\)",
    ),
    "negative level out of range": (source(perturb={-4: Normal(1.0)}), ValueError, "-4 is out of range"),
    "range past the end": (source(perturb={"1:4": Normal(1.0)}), ValueError, "'1:4' is out of range"),
    "empty range": (source(perturb={"2:1": Normal(1.0)}), ValueError, "'2:1' is empty"),
    "stepped range": (source(perturb={"0:3:2": Normal(1.0)}), ValueError, "'start:stop'"),
    "unknown level name": (source(perturb={"l9": Normal(1.0)}), ValueError, r"Invalid level 'l9'.*l0"),
    "level key of another type": (source(perturb={1.5: Normal(1.0)}), ValueError, "Invalid level 1.5"),
    "boolean level": (source(perturb={True: Normal(1.0)}), ValueError, "Invalid level True"),
    "overlapping levels": (
        source(perturb={"0:2": Normal(1.0), 1: Normal(1.0)}),
        ValueError,
        "Level 1 .* twice, by '0:2' and by 1",
    ),
    "same level by name and index": (
        source(perturb={"l1": Normal(1.0), 1: Normal(1.0)}),
        ValueError,
        "twice",
    ),
    # perturbers
    "not a perturber": (source(perturb={0: 1.0}), ValueError, "Invalid perturber 1.0 for level 0"),
    "perturbers in a list": (source(perturb=[Normal(1.0)]), ValueError, "Invalid perturb="),
    "negative std": (lambda: Normal(-0.1), ValueError, "Invalid std=-0.1"),
    "std is not a number": (lambda: Normal("1"), ValueError, "Invalid std='1'"),  # type: ignore[arg-type]
    "infinite std": (lambda: Normal(float("inf")), ValueError, "finite"),
    "mean is NaN": (lambda: Normal(1.0, mean=float("nan")), ValueError, "Invalid mean=nan"),
    "rate above 1": (lambda: perturb.Mix(1.5), ValueError, "Invalid rate=1.5.*from 0"),
    "rate is not a number": (lambda: perturb.Mix("1"), ValueError, "Invalid rate='1'"),  # type: ignore[arg-type]
    "zero truncation": (lambda: Normal(1.0, 0.0), ValueError, "Invalid truncation=0.0"),
    "walker too narrow": (
        source(perturb={"1:": Walker(5)}),
        ValueError,
        "width 5 .* l1, l2 of sizes 6, 5: it needs 11",
    ),
    "walker without its noise": (
        lambda: Walker(3, noise=True)([torch.zeros(2, 3)]),
        ValueError,
        "Invalid noise=None: this walker draws",
    ),
    "walker of an unclear kind": (lambda: Walker(3, noise="yes"), ValueError, "Invalid noise='yes'"),  # type: ignore[arg-type]
    "walker of no width": (lambda: Walker(0), ValueError, "Invalid width=0"),
    "anchor of another type": (source(anchor=1.0), ValueError, "Invalid anchor=1.0"),
    # the user's own images
    "refinement without images": (source(refine=3), ValueError, "Invalid refine=3 without images"),
    "codes without images": (source(codes="runs"), ValueError, "Invalid codes='runs' without images"),
    "workers without images": (source(workers=2), ValueError, "Invalid workers=2 without images"),
    "images of another size for the recipes": (
        lambda: training_images(FOLDER, 48),
        ValueError,
        "Invalid size=48: the recipes are for images of 32 or 64 pixels",
    ),
    # sizes
    "batch of nothing": (source(batch_size=0), ValueError, "Invalid batch_size=0"),
    "fractional batch": (source(batch_size=8.0), ValueError, "Invalid batch_size=8.0"),
    "no samples": (source(num_samples=0), ValueError, "Invalid num_samples=0"),
    "too many samples": (source(num_samples=2**33), ValueError, "from 1 to 2\\*\\*32"),
    "empty epoch": (
        source(num_samples=7),
        ValueError,
        "num_samples=7 for batch_size=8 on world_size=1 needs at least 8",
    ),
    "empty epoch on many ranks": (source(rank=0, world_size=7), ValueError, "world_size=7 needs at least 56"),
    "empty epoch without drop_last": (
        source(num_samples=2, rank=0, world_size=4, drop_last=False),
        ValueError,
        "no batch",
    ),
    "no views": (source(num_views=0), ValueError, "Invalid num_views=0"),
    "micro-batch of nothing": (source(micro_batch_size=0), ValueError, "Invalid micro_batch_size=0"),
    # seeds, epochs, ranks, devices, layouts
    "negative seed": (source(seed=-1), ValueError, "Invalid seed=-1"),
    "seed too large": (source(seed=2**64), ValueError, "2\\*\\*64"),
    "seed of another type": (source(seed="0"), ValueError, "Invalid seed='0'"),
    "negative epoch": (lambda: toy_source().set_epoch(-1), ValueError, "Invalid epoch=-1"),
    "rank without world size": (source(rank=1), ValueError, "give both"),
    "rank beyond world size": (source(rank=2, world_size=2), ValueError, "rank=2, world_size=2"),
    "unknown device": (source(device="gpu"), ValueError, "Invalid device='gpu'"),
    "unavailable device": (source(device="xpu"), ValueError, "Invalid device='xpu'"),
    "unknown layout": (source(layout="pairs"), ValueError, "Invalid layout='pairs'.*Did you mean 'pair'"),
    "layout of another type": (source(layout=3), ValueError, "Invalid layout=3"),
    "empty epoch without drop_last, the remedy": (
        source(num_samples=2, rank=0, world_size=4, drop_last=False),
        ValueError,
        "needs at least 4, one for each rank. Raise num_samples",
    ),
    "drop_last is not a boolean": (source(drop_last="false"), ValueError, "Invalid drop_last='false'"),
    "more views than streams": (source(num_views=4097), ValueError, "from 1 to 4096"),
    "batch outside the epoch": (lambda: toy_source().batch(-4, 4), ValueError, "Invalid start=-4"),
    "device without storage": (source(device="meta"), ValueError, "Invalid device='meta'"),
    # states
    "no state": (lambda: toy_source().load_state_dict(None), ValueError, "Invalid state None"),  # type: ignore[arg-type]
    "incomplete state": (
        lambda: toy_source().load_state_dict({"epoch": 1}),
        ValueError,
        "lacks position, seed",
    ),
    "state of another seed": (
        lambda: toy_source().load_state_dict({"seed": 1, "epoch": 0, "position": 0}),
        ValueError,
        "seed=1.*seed=3",
    ),
    "state beyond the epoch": (
        lambda: toy_source().load_state_dict({"seed": 3, "epoch": 0, "position": 99}),
        ValueError,
        "position=99",
    ),
    # generators
    "not a generator": (lambda: MLViewSource(lambda z: z), ValueError, "wrap_generator"),  # type: ignore[arg-type]
    "unknown generator": (
        lambda: load_generator("fasion"),
        ValueError,
        "Unknown generator 'fasion'.*Did you mean 'fashion'",
    ),
    "generator on no device": (
        lambda: load_generator("fashion", device="gpu"),
        ValueError,
        "Invalid device='gpu'",
    ),
    "list of generators": (lambda: load_generator(["fashion"]), ValueError, "Unknown generator"),  # type: ignore[arg-type]
    "weights are no path": (
        lambda: load_generator("fashion", weights=3),
        ValueError,
        "Invalid weights file 3",
    ),  # type: ignore[arg-type]
    "no list of levels": (
        lambda: wrap_generator(sum, levels=3, image_shape=(1, 2, 2)),
        ValueError,
        "Invalid levels=3",
    ),  # type: ignore[arg-type]
    "level named like an index": (
        lambda: wrap_generator(sum, levels=[("1", (4,))], image_shape=(1, 2, 2)),
        ValueError,
        "name '1'",
    ),
    "fractional level": (
        lambda: wrap_generator(sum, levels=[("z", (4.5,))], image_shape=(1, 2, 2)),
        ValueError,
        "Invalid level",
    ),
    "negative prior truncation": (
        lambda: wrap_generator(sum, levels=[("z", (4,))], image_shape=(1, 2, 2), truncation=-1),
        ValueError,
        "truncation=-1",
    ),
    "blocks are no modules": (
        lambda: mlviews.MLVGM([3], [("z", (4,))], (1, 2, 2)),
        ValueError,
        "Invalid blocks",
    ),  # type: ignore[list-item]
    "images of another shape": (
        wrapped(lambda z: z[0].view(-1, 1, 1, 4)),
        ValueError,
        r"returned .*\(2, 1, 1, 4\).*\(2, 1, 2, 2\)",
    ),
    "images of bytes": (wrapped(lambda z: z[0].view(-1, 1, 2, 2).byte()), ValueError, "returned torch.uint8"),
    "no images": (wrapped(lambda z: None), ValueError, "returned NoneType"),
    "not callable": (
        lambda: wrap_generator(3, levels=[("z", (4,))], image_shape=(1, 2, 2)),
        ValueError,
        "Invalid fn=3",
    ),  # type: ignore[arg-type]
    "no levels": (
        lambda: wrap_generator(sum, levels=[], image_shape=(1, 2, 2)),
        ValueError,
        "at least one level",
    ),
    "repeated level": (
        lambda: wrap_generator(sum, levels=[("z", (4,)), ("z", (4,))], image_shape=(1, 2, 2)),
        ValueError,
        "must differ",
    ),
    "malformed level": (
        lambda: wrap_generator(sum, levels=["z"], image_shape=(1, 2, 2)),
        ValueError,
        "Invalid level 'z'",
    ),
    "empty level": (
        lambda: wrap_generator(sum, levels=[("z", (0,))], image_shape=(1, 2, 2)),
        ValueError,
        "'z' has shape",
    ),
    "image shape of two": (
        lambda: wrap_generator(sum, levels=[("z", (4,))], image_shape=(2, 2)),
        ValueError,
        "image_shape",
    ),  # type: ignore[arg-type]
    "tied levels of two sizes": (lambda: Toy(tied=True), ValueError, "tied=True .* agree"),
    "fewer blocks than levels": (
        lambda: mlviews.MLVGM([], [Level("z", (4,))], (1, 2, 2)),
        ValueError,
        "0 blocks for 1 levels",
    ),
    "too few latents": (
        lambda: Toy()(Toy().sample_latents(range(2))[:2]),
        ValueError,
        "Got 2 latents for 3 levels",
    ),
    "latents of another shape": (
        lambda: Toy()([torch.zeros(2, 4)] * 3),
        ValueError,
        r"'l1' got a latent of shape \(2, 4\)",
    ),
    "latents in one tensor": (lambda: Toy()(torch.zeros(3, 2)), ValueError, "Invalid latents of type Tensor"),
    "latents of numpy": (lambda: Toy()([torch.zeros(2, 4).numpy()] * 3), ValueError, "'l0' got ndarray"),
    "latents of integers": (
        lambda: Toy()([torch.zeros(2, 4).long()] * 3),
        ValueError,
        "'l0' got torch.int64",
    ),
    "latents elsewhere": (
        lambda: Toy()([torch.zeros(2, 4, device="meta")] * 3),
        ValueError,
        "generator's device, cpu",
    ),
    "option of another generator": (
        lambda: load_generator("fashion", groups=4),
        ValueError,
        "Invalid option 'groups' of generator 'fashion'",
    ),
    "labels for no classes": (
        lambda: Toy()(Toy().sample_latents([0]), torch.zeros(1).long()),
        ValueError,
        "has no classes",
    ),
    "labels of no classes": (lambda: Toy().sample_labels([0]), ValueError, "has no classes"),
    "no labels": (
        lambda: classes()(classes().sample_latents([0])),
        ValueError,
        r"pass labels in \[0, 10\), e.g. g.sample_labels",
    ),
    "labels out of range": (
        lambda: classes()(classes().sample_latents([0]), torch.tensor([10])),
        ValueError,
        "labels from 10 to 10",
    ),
    "labels of floats": (
        lambda: classes()(classes().sample_latents([0]), torch.zeros(1)),
        ValueError,
        "expected int64",
    ),
    "fewer labels than latents": (
        lambda: classes()(classes().sample_latents([0, 1]), torch.zeros(1).long()),
        ValueError,
        "expected int64",
    ),
    "negative number of classes": (lambda: Toy(num_classes=-1), ValueError, "Invalid num_classes=-1"),
    "distances without labels": (
        lambda: classes().distances(*[classes().sample_latents([0])] * 2),
        ValueError,
        "pass labels",
    ),
    "distances of other samples": (
        lambda: Toy().distances(Toy().sample_latents([0]), Toy().sample_latents([0, 1])),
        ValueError,
        "2 positives for 1 anchors",
    ),
    "truncation of BigGAN-deep": (
        lambda: BigGANDeep(truncation=0),
        ValueError,
        "Invalid truncation=0: it must be a number above 0 and at most 1",
    ),
    "groups of BigGAN-deep": (
        lambda: BigGANDeep(groups="scales"),
        ValueError,
        "Invalid groups='scales': it must be an integer from 1 to 11 or 'scale'",
    ),
    "levels of VDVAE": (
        lambda: VDVAE(levels="group"),
        ValueError,
        "Invalid levels='group': it must be 'block' or 'scale'",
    ),
    "a VDVAE that was not published": (
        lambda: load_vdvae(Checkpoint("vdvae", {}, {}, "w.th")),
        WeightsError,
        "w.th has 0 decoder blocks, as no published VDVAE: pass dec_blocks, enc_blocks and normalization",
    ),
    "weights are a state dict": (
        lambda: load_generator("fashion", weights={}),
        ValueError,
        "Invalid weights file of type dict",
    ),  # type: ignore[arg-type]
    "real and drawn views at once": (
        lambda: styled().decode_views(
            [styled().sample_latents([0]), styled().from_w_plus(torch.zeros(1, 4, 4))], 0
        ),
        ValueError,
        r"some have the offsets of real images.*one by one, with g\(latents\)",
    ),
    "a W+ code of another shape": (
        lambda: styled().from_w_plus(torch.zeros(1, 4)),
        ValueError,
        r"Invalid W\+ code.*\(1, 4\).*\(B, 4, 4\)",
    ),
    "a W+ code for classes": (
        lambda: styled(num_classes=3, label_dim=2).from_w_plus(torch.zeros(1, 4, 4)),
        ValueError,
        r"has classes, and a W\+ code says nothing of them: use a generator without",
    ),
    "no views to decode": (lambda: Toy().decode_views([], 0), ValueError, "at least one"),
    "shared blocks out of range": (
        lambda: Toy().decode_views([Toy().sample_latents([0])], 9),
        ValueError,
        "Invalid first=9",
    ),
    "a number of samples": (lambda: Toy().sample_latents(8), ValueError, "range\\(8\\)"),  # type: ignore[arg-type]
    "negative sample index": (lambda: Toy().sample_latents([-1]), ValueError, "Invalid indices from -1"),
    "fractional sample index": (lambda: Toy().sample_latents([0.5]), ValueError, "Invalid indices"),  # type: ignore[list-item]
    "negative range": (lambda: Toy().sample_latents(range(-2, 2)), ValueError, "Invalid indices"),
    "truncation of another type": (
        lambda: Toy().sample_latents([0], truncation="high"),
        ValueError,
        "truncation='high'",
    ),
    "unknown dtype": (source(dtype="bfloat"), ValueError, "Invalid dtype='bfloat'.*Did you mean 'bfloat16'"),
    "integer dtype": (source(dtype=torch.int8), ValueError, "Invalid dtype=torch.int8"),
    "float16 on the CPU": (source(dtype="float16"), ValueError, "float16' on the CPU.*use 'bfloat16'"),
    "compile of another type": (source(compile="max"), ValueError, "Invalid compile='max'"),
    # transforms
    "one transform for two views": (source(transform=[None]), ValueError, "Got 1 transforms for num_views=2"),
    "transform that was not called": (
        source(transform=transforms.simclr),
        ValueError,
        "Invalid transform=<function simclr",
    ),
    "transform that returns nothing": (
        lambda: next(iter(toy_source(transform=lambda x: None))),
        ValueError,
        "returned NoneType",
    ),
    "transform that loses images": (
        lambda: next(iter(toy_source(transform=lambda x: x[:3]))),
        ValueError,
        "tensor of 8 images",
    ),
    "images of numpy": (
        lambda: transforms.gray(4)(torch.zeros(1).numpy(), [0], seed=0, epoch=0, view=0),
        ValueError,
        "Got ndarray",
    ),
    "perturber that returns nothing": (
        lambda: next(iter(toy_source(perturb=Nothing()))),
        ValueError,
        "one tensor per level",
    ),
    "transform of another type": (source(transform=3), ValueError, "Invalid transform=3"),
    "transform as a name": (source(transform="simclr"), ValueError, "Invalid transform='simclr': use"),
    "seed of an inverter": (
        lambda: mlviews.train_inverter(Toy(), seed="0"),
        ValueError,
        "Invalid seed='0'",
    ),
    "seed of a walker": (lambda: mlviews.train_walker(Toy(), [0], seed="0"), ValueError, "Invalid seed='0'"),
    "seed of a sweep": (lambda: mlviews.measure_impact(Toy(), seed="0"), ValueError, "Invalid seed='0'"),
    "size of nothing": (lambda: transforms.simclr(0), ValueError, "Invalid size=0"),
    "color to gray": (
        lambda: MLViewSource(Toy3(), transform=transforms.simclr(2, channels=1), batch_size=1),
        ValueError,
        "3 channels for channels=1",
    ),
    "temperature that no float32 holds": (
        lambda: load_generator("fashion-nvae", temperature=1e300),
        ValueError,
        "from 0.001 to 10",
    ),
    "number that no float holds": (
        lambda: load_generator("fashion-nvae", temperature=10**400),
        ValueError,
        "Invalid temperature",
    ),
    "noise of another number of images": (
        lambda: load_generator("fashion-nvae").encode(
            torch.rand(3, 1, 32, 32), load_generator("fashion-nvae").sample_latents([0])
        ),
        ValueError,
        "noise for 1 images, and 3 images",
    ),
    "decoder without a width": (
        lambda: SemafoConfig(decoder=(16, 32)),
        ValueError,
        "3 and 2 widths: the decoder has one more",
    ),
    "level that keeps no value": (
        lambda: load_generator("fashion-semafo").relabel(
            load_generator("fashion-semafo").sample_latents([0]), torch.tensor([0]), torch.tensor([1]), ["z"]
        ),
        ValueError,
        "Invalid level 'z'",
    ),
    "images without classes": (
        lambda: labelled_rows(torch.tensor([0, -1]), 1, seed=0),
        ValueError,
        "some have no class; give a folder with one folder a class",
    ),
    "more labels than images": (
        lambda: labelled_rows(torch.arange(4) % 2, 10, seed=0),
        ValueError,
        "Invalid labels=10.*at most 4",
    ),
    # configurations
    "unknown preset": (
        lambda: MLViewSource.from_config("fashion-ml-randm"),
        ValueError,
        "Did you mean 'fashion-ml-random'",
    ),
    "unknown key": (
        from_config(batchsize=4),
        ValueError,
        "Unknown key 'batchsize'.*Did you mean 'batch_size'",
    ),
    "no generator": (lambda: MLViewSource.from_config({"batch_size": 4}), ValueError, "names no generator"),
    "unknown generator key": (
        from_config(generator={"name": "fashion", "file": "x"}),
        ValueError,
        "Invalid option 'file' of generator 'fashion'",
    ),
    "generator without a name": (from_config(generator={"weights": "x"}), ValueError, "Invalid generator"),
    "weights beside a generator": (
        from_config(generator=Toy(), weights="x"),
        ValueError,
        "given as an object, which has its own",
    ),
    "generator of another type": (from_config(generator=3), ValueError, "Invalid generator 3"),
    "unknown perturber": (from_config(perturb={0: "fixd"}), ValueError, "Did you mean 'fixed'"),
    "unknown perturber option": (
        from_config(perturb={"name": "normal", "sigma": 1}),
        ValueError,
        "'sigma'.*std, truncation, mean",
    ),
    "perturb of another type": (from_config(perturb=3), ValueError, "Invalid perturber 3"),
    "mix without a rate": (from_config(perturb={0: "mix"}), ValueError, "'mix' needs rate"),
    "walker without a file": (from_config(perturb={0: "walker"}), ValueError, "needs path"),
    "bad std in a configuration": (
        from_config(perturb={0: {"name": "normal", "std": -1}}),
        ValueError,
        "Invalid std=-1",
    ),
    "unknown anchor option": (from_config(anchor={"sigma": 1}), ValueError, "'sigma'"),
    "unknown transform": (
        from_config(transform={"name": "simclrr", "size": 28}),
        ValueError,
        "Did you mean 'simclr'",
    ),
    "unknown transform option": (
        from_config(transform={"name": "simclr", "sise": 28}),
        ValueError,
        "Did you mean 'size'",
    ),
    "transform by name only": (from_config(transform="simclr"), ValueError, "transform"),
    "configuration of another type": (
        lambda: MLViewSource.from_config(3),
        ValueError,
        "Invalid config of type int",
    ),
    "missing configuration file": (
        lambda: MLViewSource.from_config("nowhere.yaml"),
        FileNotFoundError,
        "nowhere.yaml",
    ),
    # files, probing
    "missing weights": (
        lambda: load_generator("fashion", weights="nowhere.safetensors"),
        FileNotFoundError,
        "nowhere.safetensors",
    ),
    "a folder as weights": (
        lambda: load_generator("fashion", weights="."),
        FileNotFoundError,
        "No weights file",
    ),
    "missing walker": (lambda: perturb.Walker.load("nowhere.safetensors"), FileNotFoundError, "nowhere"),
    "missing data set": (
        lambda: load_fashion_mnist("nowhere", "test"),
        FileNotFoundError,
        "t10k-images-idx3-ubyte",
    ),
    "unknown split": (lambda: load_fashion_mnist(".", "val"), ValueError, "Invalid split='val'"),
    "no steps": (lambda: train(toy_source(layout="pair"), 0), ValueError, "Invalid steps=0"),
    "training on one view": (lambda: train(toy_source(num_views=1), 1), ValueError, "num_views=1"),
    "training on another layout": (lambda: train(toy_source(layout="solo"), 1), ValueError, "layout='pair'"),
    "training on gray views": (lambda: train(toy_source(layout="pair"), 1), ValueError, "1 channels"),
    "negative learning rate": (
        lambda: train(toy_source(layout="pair"), 1, lr=-1.0),
        ValueError,
        "Invalid lr=-1.0",
    ),
    "no temperature": (
        lambda: train(toy_source(layout="pair"), 1, temperature=0.0),
        ValueError,
        r"Invalid temperature=0\.0",
    ),
    "unknown method": (
        lambda: train(toy_source(layout="pair"), 1, "simclrr"),
        ValueError,
        "Did you mean 'simclr'",
    ),
    # the explorer
    "setting of an unknown kind": (
        lambda: Setting("walker"),
        ValueError,
        "Invalid perturber 'walker': there are fixed, normal, mix, resample, preset",
    ),
    "setting out of range": (lambda: Setting("mix", 1.5), ValueError, "Invalid rate=1.5.*from 0 to 1"),
    "setting without a truncation": (
        lambda: Setting("normal", 1.0, 0.0),
        ValueError,
        "Invalid truncation=0.0.*above 0, or None",
    ),
    "state of too many anchors": (lambda: State((), anchors=17), ValueError, "anchors=17.*from 1 to 16"),
    "state of no span": (lambda: State((), span=0), ValueError, "Invalid span=0.*at most 20"),
    "explored preset that is not there": (
        lambda: Session("fashion-ml-randm"),
        ValueError,
        "Unknown preset 'fashion-ml-randm'.*Did you mean 'fashion-ml-random'",
    ),
    "explored report that is not there": (
        lambda: Session("fashion-none", report="nowhere"),
        FileNotFoundError,
        "No folder nowhere: give the folder of an impact report",
    ),
    # latents in hand
    "traversal of a level that is not there": (
        latents_of("traverse", "l9"),
        ValueError,
        "Invalid level 'l9'",
    ),
    "traversal of two levels": (latents_of("traverse", "0:2"), ValueError, "Invalid level '0:2': name one"),
    "coordinate out of range": (latents_of("traverse", 1, 6), ValueError, "Invalid dim=6.* from 0 to 5"),
    "direction of another shape": (
        latents_of("traverse", 1, torch.ones(5)),
        ValueError,
        r"Invalid dim, torch.float32 \(5,\).*level 'l1'.*\(6,\) or \(D, 2, 6\)",
    ),
    "traversal of no span": (latents_of("traverse", 1, 0, span=0), ValueError, "Invalid span=0"),
    "traversal of one step": (latents_of("traverse", 1, 0, count=1), ValueError, "Invalid count=1"),
    "more directions than scalars": (latents_of("directions", 2, 6), ValueError, "Invalid count=6.*1 to 5"),
    "directions by another method": (
        latents_of("directions", 2, method="jacobi"),
        ValueError,
        "Invalid method 'jacobi'.*Did you mean 'jacobian'",
    ),
    "directions without a derivative": (
        lambda: mlviews.latents.directions(flat(), flat().sample_latents(range(2)), 0),
        ValueError,
        "no derivative: take method='images'",
    ),
    "level set twice": (latents_of("intervene", {"l1": 0.0, 1: 1.0}), ValueError, "Level 1 .* set twice"),
    "value of another shape": (
        latents_of("intervene", {"l1": torch.ones(5)}),
        ValueError,
        r"Invalid value for level 'l1', torch.float32 \(5,\): .*\(6,\) or \(2, 6\)",
    ),
    "finer levels neither kept nor drawn": (
        latents_of("intervene", {1: 0.0}, finer="redraw"),
        ValueError,
        "Invalid finer 'redraw': there are keep, draw",
    ),
    "indices of other samples": (
        latents_of("intervene", {1: 0.0}, finer="draw", indices=range(3)),
        ValueError,
        "Got 3 indices for 2 samples",
    ),
    "split past the last level": (recombined(3, 3, 4), ValueError, "Invalid split=4.* from 0 to 3"),
    "levels of two generators": (recombined(3, 2, 1), ValueError, "Got 3 coarse and 2 fine levels"),
    "codes recombined without the number of levels": (
        lambda: mlviews.latents.recombine(*[[torch.zeros(2, 8)] * 3 + [torch.zeros(2, 2, 8)] * 3] * 2, 1),
        ValueError,
        r"Got 6 tensors, of which the last 3 are offsets of a W\+ code: pass levels=len\(g.levels\)",
    ),
    # purifiers
    "purifier of a generator without an encoder": (
        lambda: mlviews.Purifier(Toy()),
        ValueError,
        "Generator 'Toy' has no encoder: train one",
    ),
    "more levels kept than there are": (purifier(keep=4), ValueError, "Invalid keep=4.* from 0 to 3"),
    "mix rate past 1": (purifier(mix=1.5), ValueError, "Invalid mix=1.5: give a rate from 0"),
    "mix rates in a list": (purifier(mix=[0.5]), ValueError, r"Invalid mix=\[0.5\].*or a mapping"),
    "mix of a level that is not there": (purifier(mix={"l9": 0.5}), ValueError, "Invalid level 'l9'"),
    "no copies": (purifier(samples=0), ValueError, "Invalid samples=0"),
    "blend of another kind": (purifier(blend="lerp"), ValueError, "Invalid blend 'lerp'"),
    "purified images of another shape": (
        lambda: purifier()()(torch.ones(2, 1, 5, 5)),
        ValueError,
        r"Invalid images, torch.float32 \(2, 1, 5, 5\)",
    ),
    "purified images and other indices": (
        lambda: purifier()()(torch.ones(2, 1, 4, 4), indices=range(3)),
        ValueError,
        "Got 3 indices for 2 images",
    ),
    "vote of another kind": (
        lambda: purifier()().predict(torch.nn.Flatten(), torch.ones(2, 1, 4, 4), vote="median"),
        ValueError,
        "Invalid vote 'median'",
    ),
    "variants of nothing": (lambda: mlviews.latents.decode(Toy(), []), ValueError, "Invalid views="),
}


class Toy3(Toy):
    """Claims three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.image_shape = (3, 4, 4)


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_clear_error(mistake: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        mistake()
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def film_file(path: Path, metadata: dict[str, str] | None = None, **changes: torch.Tensor | None) -> Path:
    """A small film generator's weights, with some tensors replaced or (None) left out."""
    g = FilmGenerator(FilmConfig(dims=(2, 3), channels=(8, 8)))
    tensors = {name: value.contiguous() for name, value in g.state_dict().items()} | changes
    config = {"dims": [2, 3], "channels": [8, 8]}
    own = {"format": "mlviews.film", "config": json.dumps(config)} if metadata is None else metadata
    save_file({name: value for name, value in tensors.items() if value is not None}, path, own)
    return path


def truncated(path: Path) -> Path:
    whole = (FOLDER / "fashion.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def written(content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (written(b""), "not a whole safetensors file"),
    "noise": (written(bytes(range(256)) * 40), "not a whole safetensors file"),
    "a pickle": (written(b"\x80\x04cos\nsystem\n(S'false'\ntR."), "not a whole safetensors file"),
    "a huge header": (written(b"\xff" * 7 + b"\x7f" + b"{}"), "not a whole safetensors file"),
    "truncated": (truncated, "not a whole safetensors file"),
    "a walker": (lambda path: (Walker(4).save(path), path)[1], "'mlviews.walker', not 'mlviews.film'"),
    "no format": (lambda path: film_file(path, {}), "'no format'"),
    "no configuration": (lambda path: film_file(path, {"format": "mlviews.film"}), "no valid configuration"),
    "configuration is not JSON": (
        lambda path: film_file(path, {"format": "mlviews.film", "config": "{"}),
        "no valid configuration",
    ),
    "configuration is a list": (
        lambda path: film_file(path, {"format": "mlviews.film", "config": "[]"}),
        "no valid configuration",
    ),
    "unknown option": (
        lambda path: film_file(path, {"format": "mlviews.film", "config": '{"depth": 3}'}),
        "no valid configuration",
    ),
    "no levels": (
        lambda path: film_file(path, {"format": "mlviews.film", "config": '{"dims": [], "channels": []}'}),
        "no valid configuration",
    ),
    "no groups": (
        lambda path: film_file(path, {"format": "mlviews.film", "config": '{"groups": 0}'}),
        "no valid configuration",
    ),
    "sizes beyond memory": (
        lambda path: film_file(
            path, {"format": "mlviews.film", "config": '{"channels": [8, 80000000, 8, 8]}'}
        ),
        "another architecture",
    ),
    "impossible sizes": (
        lambda path: film_file(path, {"format": "mlviews.film", "config": '{"channels": [7, 7]}'}),
        "no valid configuration",
    ),
    "another architecture": (
        lambda path: film_file(path, {"format": "mlviews.film", "config": "{}"}),
        "another architecture",
    ),
    "missing tensor": (lambda path: film_file(path, **{"rgb.bias": None}), "missing rgb.bias"),
    "unknown tensor": (lambda path: film_file(path, extra=torch.zeros(1)), "unknown extra"),
    "tensor of another shape": (
        lambda path: film_file(path, **{"rgb.bias": torch.zeros(2)}),
        r"rgb.bias has shape \(2,\), expected \(1,\)",
    ),
    "NaN": (lambda path: film_file(path, **{"rgb.bias": torch.tensor([float("nan")])}), "NaN"),
}


@pytest.mark.parametrize(("write", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_weights_files(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=message) as caught:
        load_generator("fashion", weights=path)
    assert str(path) in str(caught.value)


def test_the_small_file_is_good(tmp_path: Path) -> None:
    """Without which the tests above would prove nothing."""
    assert load_generator("fashion", weights=film_file(tmp_path / "w.safetensors")).image_shape == (1, 8, 8)


WALKER = {"net.0.weight": (4, 4), "net.0.bias": (4,), "net.2.weight": (4, 4), "net.2.bias": (4,)}


@pytest.mark.parametrize(
    ("changes", "provenance", "message"),
    [
        ({}, "{", "no valid configuration"),
        ({}, "[1]", "no valid configuration"),
        ({}, "3", "no valid configuration"),
        ({"net.0.bias": None}, "{}", "no valid configuration"),
        ({"net.0.bias": (1_000_000,)}, "{}", "another architecture"),
        ({"net.2.weight": (4, 5)}, "{}", "net.2.weight has shape"),
    ],
)
def test_walker_files_with_bad_content(
    changes: dict[str, Any], provenance: str, message: str, tmp_path: Path
) -> None:
    shapes = {name: shape for name, shape in (WALKER | changes).items() if shape is not None}
    save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()},
        tmp_path / "w.safetensors",
        {"format": Walker.FORMAT, "provenance": provenance},
    )
    with pytest.raises(WeightsError, match=message):
        Walker.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04."])
def test_bad_walker_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        Walker.load(tmp_path / "w.safetensors")


def test_a_bad_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("perturb: {0: [fixed\n")
    with pytest.raises(ValueError, match="not a YAML mapping"):
        MLViewSource.from_config(str(tmp_path / "c.yaml"))


def test_a_damaged_idx_file(tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        b"\x00\x00\x08\x03" + b"\x00\x00\x00\x09" * 3 + b"short"
    )
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole idx file"):
        load_fashion_mnist(tmp_path, "test")


def test_unreadable_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        toy_source()


def test_no_cuda_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="Invalid device='cuda'"):
        toy_source(device="cuda")
