"""Purifiers: what is kept, what is drawn, what it depends on, and its gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Toy
from PIL import Image
from test_source import Watch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from typer.testing import CliRunner

from mlviews import MLVGM, Purifier, load_generator
from mlviews.cli import app
from mlviews.generators.inverter import Inverter
from mlviews.generators.nvae import NVAE, NVAEConfig
from mlviews.perturb import Normal
from mlviews.zoo.train_nvae import initialize


def invertible(**options: bool) -> Toy:
    """The toy generator with an untrained inverter."""
    g = Toy((4, 4, 4) if options.get("tied") else (4, 6, 5), **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        g.inverter = Inverter.of(g, width=8, hidden=16).requires_grad_(False)
    return g


def small_nvae(levels: str = "group") -> NVAE:
    config = NVAEConfig(
        image_size=8, groups=(2, 1), latents=(2, 2), encoder=(8, 8, 8), decoder=(8, 8, 8), mixtures=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return initialize(NVAE(config, levels=levels))


GENERATORS = {
    "inverter": invertible,
    "tied": lambda: invertible(tied=True),
    "nvae": small_nvae,
    "nvae by scale": lambda: small_nvae("scale"),
}


def pictures(g: MLVGM, rows: int = 5) -> Tensor:
    return g(g.sample_latents(range(rows)))


def law(g: MLVGM) -> Normal:
    """What a level is drawn anew from."""
    return Normal(1.0, g.truncation)


class Linear(nn.Module):
    """A classifier of three classes."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.linear = nn.Linear(pixels, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


@pytest.fixture(params=GENERATORS.values(), ids=GENERATORS)
def g(request: pytest.FixtureRequest) -> MLVGM:
    return request.param()


def test_nothing_mixed_is_the_autoencoder(g: MLVGM) -> None:
    images = pictures(g)
    for purifier in (Purifier(g, keep=len(g.levels)), Purifier(g, keep=0, mix=0.0)):
        copies = purifier.copies(images)
        assert copies.shape == (8, 5, *g.image_shape)
        for copy in copies:
            torch.testing.assert_close(copy, g(g.encode(images)), atol=1e-5, rtol=0)


def test_everything_drawn_is_a_sample_of_the_prior(g: MLVGM) -> None:
    images = pictures(g)
    purifier = Purifier(g, keep=0, seed=4)
    torch.testing.assert_close(purifier(images), purifier(1 - images), atol=1e-5, rtol=0)
    levels = [0] if g.tied else None
    noise = g.sample_noise(range(5), law(g), 4, view=1, levels=levels)
    noise = noise * len(g.levels) if g.tied else noise
    torch.testing.assert_close(purifier(images), g(noise), atol=1e-5, rtol=0)


def test_it_depends_on_seed_epoch_index_and_copy_only(g: MLVGM) -> None:
    images = pictures(g)
    purifier = Purifier(g, keep=1, samples=3, seed=7)
    copies = purifier.copies(images)
    assert torch.equal(purifier(images), purifier(images))
    torch.testing.assert_close(purifier(images), copies[0], atol=1e-6, rtol=0)
    assert (copies[0] - copies[1]).abs().max() > 1e-4
    part = purifier.copies(images[[3, 1]], indices=[3, 1])
    torch.testing.assert_close(part, copies[:, [3, 1]], atol=1e-6, rtol=0)
    on_device = purifier.copies(images[[3, 1]], indices=torch.tensor([3, 1]), count=2)
    torch.testing.assert_close(on_device, copies[:2, [3, 1]], atol=1e-6, rtol=0)
    more = Purifier(g, keep=1, samples=5, seed=7).copies(images, count=3)
    torch.testing.assert_close(more, copies, atol=1e-6, rtol=0)
    for other in (purifier(images, epoch=1), Purifier(g, keep=1, seed=8)(images)):
        assert (other - copies[0]).abs().max() > 1e-4


def test_the_two_ways_to_blend(g: MLVGM) -> None:
    images = pictures(g)
    last = len(g.levels) - 1
    z = g.encode(images)
    for blend, share in (("variance", 0.8), ("linear", 0.4)):
        purifier = Purifier(g, keep=last, mix=0.6, blend=blend)
        noise = g.sample_noise(range(5), law(g), 0, view=1, levels=[0 if g.tied and last == 0 else last])[0]
        expected = g([*z[:last], share * z[last] + 0.6 * noise])
        # Nothing comes after the finest level, so that mixing within the posterior and after it agree.
        torch.testing.assert_close(purifier(images), expected, atol=1e-5, rtol=0)
    named = Purifier(g, keep=last, mix={g.levels[last].name: 0.6})
    assert torch.equal(named(images), Purifier(g, keep=last, mix=0.6)(images))


def test_finer_posteriors_of_an_nvae_follow_what_coarser_levels_became() -> None:
    g = small_nvae()
    images = pictures(g)
    mixed = Purifier(g, keep=0, mix={0: 1.0, "1:": 0.0})(images)
    # The reference by hand: encode with the first group's latent given.
    noise = g.sample_noise(range(5), law(g), 0, view=1, levels=[0])[0]
    result = g.posterior(images, change=lambda index, eps: noise if index == 0 else eps)
    torch.testing.assert_close(mixed, g(result.latents), atol=1e-5, rtol=0)
    after = [noise, *g.encode(images)[1:]]
    assert (mixed - g(after)).abs().max() > 1e-4  # mixing after encoding is something else


def test_the_gradient_is_that_of_finite_differences(g: MLVGM) -> None:
    g.double()
    if g.inverter is not None:
        g.inverter.double()
    images = pictures(g, 2).double().clamp(0.05, 0.95).requires_grad_(True)
    purifier = Purifier(g, keep=1, mix=0.5, samples=2, seed=1)
    classifier = Linear(images[0].numel()).double()

    def loss(x: Tensor) -> Tensor:
        return purifier.copies(x).double().flatten(2).pow(2).sum()

    (gradient,) = torch.autograd.grad(loss(images), images)
    direction = torch.sign(gradient)
    step = 1e-2  # images are float32
    slope = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, gradient.abs().sum(), rtol=0.05, atol=1e-3)
    (through,) = torch.autograd.grad(classifier(purifier(images).double()).sum(), images)
    assert through.abs().sum() > 0
    assert all(parameter.grad is None for parameter in g.parameters())


def test_votes() -> None:
    g = invertible()
    images = pictures(g)
    purifier, classifier = Purifier(g, samples=5), Linear(16)
    votes = torch.stack([classifier(copy) for copy in purifier.copies(images)])
    torch.testing.assert_close(purifier.logits(classifier, images), votes.mean(0), atol=1e-6, rtol=0)
    assert torch.equal(purifier.predict(classifier, images), votes.mean(0).argmax(1))

    class Scripted(nn.Module):
        """Two copies are faintly of class 0, two of class 1, one strongly of class 2; and so on."""

        def forward(self, copies: Tensor) -> Tensor:
            table = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0.5], [0, 1.5, 0], [0, 0, 99]])
            return table.repeat_interleave(5, dim=0)

    assert purifier.predict(Scripted(), images).tolist() == [2] * 5
    assert purifier.predict(Scripted(), images, vote="majority").tolist() == [1] * 5
    assert torch.equal(
        purifier.predict(classifier, images, epoch=2, indices=range(3, 8)),
        purifier.logits(classifier, images, epoch=2, indices=range(3, 8)).argmax(1),
    )


def test_a_defended_classifier_draws_at_every_call_or_never() -> None:
    g = invertible()
    images = pictures(g)
    purifier, classifier = Purifier(g, samples=2), Linear(16)
    fresh, fixed = purifier.defend(classifier), purifier.defend(classifier, fresh=False)
    assert not torch.equal(fresh(images), fresh(images))
    assert torch.equal(fixed(images), fixed(images))
    # Without fresh noise an image's logits do not depend on its place in the batch.
    torch.testing.assert_close(fixed(images[[3]]), fixed(images)[[3]], atol=1e-6, rtol=0)
    assert torch.equal(purifier.defend(classifier)(images[:1]), fixed(images[:1]))
    assert fresh.epoch == 2


def test_it_moves_and_is_frozen() -> None:
    g = invertible()
    g.requires_grad_(True)
    purifier = Purifier(g).train()
    assert not g.training
    assert not any(weight.requires_grad for weight in purifier.parameters())
    assert Purifier(g, keep=2, mix=0.5).rates == (0.0, 0.0, 0.5)
    assert "rates=(0.0, 1.0, 1.0)" in repr(purifier)


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_it_never_waits_for_the_device(make) -> None:  # type: ignore[no-untyped-def]
    with FakeTensorMode(), torch.device("cuda"):
        g = make()
        images = torch.rand(3, *g.image_shape)
        purifier = Purifier(g, mix=0.5, samples=2)
        with torch.no_grad():
            purifier(images)  # the plan's constants are sent there once
            with Watch() as watch:
                copies = purifier.copies(images)
    assert copies.device.type == "cuda"
    assert watch.devices == {"cuda"}
    assert watch.waits == []


def test_a_folder_is_purified_as_the_purifier_does_it(tmp_path: Path) -> None:
    fashion_nvae = load_generator("fashion-nvae")
    clean = pictures(fashion_nvae, 3)
    for name, image in zip(("a.png", "deep/b.png", "c.bmp"), clean, strict=True):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)
    options = ["--keep", "2", "--mix", "0.5", "--seed", "3", "--samples", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["purify", str(tmp_path / "images"), *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "grid.png").read_bytes().startswith(b"\x89PNG")
    stored = torch.stack([to_image(tmp_path / "images" / name) for name in ("a.png", "c.bmp", "deep/b.png")])
    purified = Purifier(fashion_nvae, 2, 0.5, 1, 3)(stored)
    for name, image in zip(("a.png", "c.bmp.png", "deep/b.png"), purified, strict=True):
        written = to_image(tmp_path / "out" / "images" / name)
        torch.testing.assert_close(written, image, atol=1 / 255, rtol=0)


def to_image(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path)))[None].float() / 255
