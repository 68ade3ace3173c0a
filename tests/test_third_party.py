"""Networks that packages of other people ship, as sources of views: a consistency model in ONNX, and a DCGAN.

The packages are large, so the tests are skipped where they are not installed. By hand:
``pip install --no-deps adaptive-terrain-diffusion gan_face_generate``, onnxruntime, and this file again.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mlviews
from mlviews import MLVGM, Level, MLViewSource, perturb

COUNT = 2  # terrains; a pass of the network takes half a second each


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Denoise(nn.Module):
    """Adds noise to the terrain of the block before, and removes it by a pass of the network."""

    def __init__(self, session: Any, sigma: float) -> None:
        super().__init__()
        self.session, self.sigma = session, sigma
        self.passes = 0

    def forward(self, latent: tuple[Tensor, Tensor], state: Tensor | None) -> Tensor:
        z, difficulty = latent
        x = self.sigma * z if state is None else state + self.sigma * z  # [B, 1, 128, 128]
        sigmas = np.full(len(x), self.sigma, np.float32)
        feeds = {"noisy": x.cpu().numpy(), "sigma": sigmas, "difficulty": difficulty.cpu().numpy()}
        self.passes += 1
        return torch.from_numpy(self.session.run(["denoised"], feeds)[0]).to(z.device)


class Terrain(MLVGM):
    """A height map in [0, 1], ``[B, 1, 128, 128]``; a level for each noise, a class for each difficulty."""

    def __init__(self, sigmas: tuple[float, ...] = (80.0, 8.0, 1.4)) -> None:
        import onnxruntime

        file = importlib.resources.files("terrain_diffusion") / "weights"
        path = str(file / "terrain_consistency_unet_difficulty100.onnx")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        levels = [Level(f"sigma {sigma:g}", (1, 128, 128)) for sigma in sigmas]
        super().__init__(
            [Denoise(session, sigma) for sigma in sigmas],
            levels,
            (1, 128, 128),
            num_classes=100,
            truncation=None,
        )

    def condition(self, latents: Any, labels: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        assert labels is not None
        difficulty = labels.float() / (self.num_classes - 1)
        return [(z, difficulty) for z in latents]

    def to_image(self, state: Tensor) -> Tensor:
        return (state * 0.5 + 0.5).clamp(0, 1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack(
        [torch.corrcoef(torch.stack([x, y]))[0, 1] for x, y in zip(a.flatten(1), b.flatten(1), strict=True)]
    )


@needs("terrain_diffusion", "onnxruntime")
def test_a_consistency_model_in_onnx() -> None:
    g = Terrain()
    z, labels = g.sample_latents(range(COUNT)), torch.tensor([10, 90])
    x = g(z, labels)
    assert x.shape == (COUNT, 1, 128, 128)
    assert x.std() > 0.05
    alone = g([level[1:] for level in z], labels[1:])
    torch.testing.assert_close(alone, x[1:], atol=1e-4, rtol=0)

    # Late noise keeps the layout and early noise makes another; the passes before the moved level are shared.
    fresh = g.sample_latents(range(COUNT), seed=1)
    late, early = [*z[:2], fresh[2]], [fresh[0], *z[1:]]
    before = sum(block.passes for block in g.blocks)
    anchors, positives = g.decode_views([z, late], first=2, labels=labels)
    assert sum(block.passes for block in g.blocks) - before == 3, "the last one is of both views at once"
    torch.testing.assert_close(anchors, x, atol=1e-4, rtol=0)
    kept, changed = correlation(x, positives), correlation(x, g(early, labels))
    assert kept.min() > 0.7
    assert changed.max() < 0.5

    source = MLViewSource(g, perturb={-1: perturb.Resample()}, batch_size=1, num_samples=COUNT, seed=0)
    views = [torch.cat(parts) for parts in zip(*source, strict=True)]
    torch.testing.assert_close(views[0], g(g.sample_latents(range(COUNT)), g.sample_labels(range(COUNT))))
    assert correlation(*views).min() > 0.7


class Faces(nn.Module):
    """gan_face_generate's DCGAN: ``[B, 100]`` to color images of 64 pixels in [0, 1]."""

    def __init__(self) -> None:
        from gan_face_generate.models import Generator

        super().__init__()
        self.net = Generator(ngpu=0, nc=3, nz=100, ngf=64)
        file = importlib.resources.files("gan_face_generate") / "weights.tar"
        self.net.load_state_dict(torch.load(str(file), "cpu", weights_only=True)["netG_state_dict"])

    def forward(self, latents: list[Tensor]) -> Tensor:
        image: Tensor = self.net(latents[0][:, :, None, None])
        return image * 0.5 + 0.5


@needs("gan_face_generate")
def test_a_dcgan() -> None:
    g = mlviews.wrap_generator(Faces(), levels=[("z", (100,))], image_shape=(3, 64, 64))
    x = g(g.sample_latents(range(8)))
    assert x.std() > 0.1
    alone = torch.cat([g(g.sample_latents([index])) for index in range(8)])
    torch.testing.assert_close(alone, x, atol=1e-5, rtol=0)

    def views(batch_size: int) -> list[Tensor]:
        normal = perturb.Normal(0.3, 2.0)
        source = MLViewSource(g, perturb=normal, batch_size=batch_size, num_samples=8)
        return [torch.cat(parts) for parts in zip(*source, strict=True)]

    anchors, positives = views(8)
    torch.testing.assert_close(torch.cat(views(2)), torch.cat([anchors, positives]), atol=1e-5, rtol=0)
    near, far = ((anchors - other).square().mean((1, 2, 3)) for other in (positives, anchors.roll(1, 0)))
    assert (near < far).all(), "a positive is nearer to its anchor than the anchor of another sample"

    options = {"steps": 20, "pairs": 8, "train_pairs": 8, "evaluations": 2, "width": 8, "monte_carlo": 500}
    (impact,) = mlviews.measure_impact(g, progress=False, **options).impacts
    assert impact.levels == (0,)
    assert np.isfinite(impact.loss)
