from __future__ import annotations

import json
import math

import pytest
import torch

from mlviews import MLViewSource
from mlviews.evaluation.data import Labelled, bundled_slice
from mlviews.evaluation.learner import RATES, Encoder, initial, train
from mlviews.evaluation.probe import run_probe
from mlviews.evaluation.readout import embed, evaluate


def source() -> MLViewSource:
    return MLViewSource.from_config({"preset": "fashion-ml-random", "batch_size": 16, "num_samples": 32})


def test_training_is_a_function_of_its_seeds() -> None:
    before = torch.random.get_rng_state()
    runs = [train(source(), 4, seed=seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.allclose(torch.tensor(runs[0]), torch.tensor(runs[1]), atol=1e-4)
    assert runs[0][0] != runs[2][0]


def test_a_method_has_its_own_learning_rate() -> None:
    default, same, other = (
        train(source(), 4, "simsiam", lr)[1] for lr in (None, RATES["simsiam"], RATES["simclr"])
    )
    assert torch.allclose(torch.tensor(default), torch.tensor(same), atol=1e-4)
    assert not torch.allclose(torch.tensor(default), torch.tensor(other), atol=1e-4)


def test_the_loss_falls() -> None:
    _, losses = train(MLViewSource.from_config({"preset": "fashion-none", "batch_size": 32}), 50)
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.2


def test_training_goes_through_epochs() -> None:
    views = source()
    train(views, 5)
    assert views.epoch == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "Invalid steps=0"),
        ({"lr": math.inf}, "Invalid lr=inf"),
        ({"temperature": math.nan}, "Invalid temperature=nan"),
        ({"lr": 1e30}, "The loss is nan at step"),
    ],
)
def test_a_training_that_cannot_be_is_an_error(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(source(), **({"steps": 3} | arguments))


def test_run_probe_reports_what_was_trained_and_how_it_scores() -> None:
    fit, test = bundled_slice()
    rows = torch.arange(0, 2500, 10)
    images = (Labelled(fit.images[rows], fit.labels[rows]), Labelled(test.images[rows], test.labels[rows]))
    report = run_probe(source(), 3, temperature=0.5, images=images)

    assert (report.steps, report.batch_size, report.views, report.repeats) == (3, 16, 3 * 16 * 2, False)
    assert (report.probe_images, report.test_images, report.temperature) == (250, 250, 0.5)
    assert report.chance == math.log(31)
    assert len(report.losses) == 3
    assert list(report.scores) == ["raw pixels", "untrained encoder", "encoder trained on views"]
    for scores in report.scores.values():
        assert 20 < scores.linear[1.0] < 95
        assert 20 < scores.knn < 95
    assert report.scores["raw pixels"] == evaluate(None, *images)
    assert not report.encoder.training
    assert report.table().row_count == 3
    assert report.summary.startswith("3 steps on 96 views, none seen twice: ")
    assert json.loads(json.dumps(report.record()))["training"]["lr"] == RATES["simclr"]


def test_encoder_size() -> None:
    encoder = Encoder()
    assert encoder(torch.zeros(2, 3, 28, 28)).shape == (2, 512)
    assert encoder(torch.zeros(2, 3, 112, 112)).shape == (2, 512)
    assert 250_000 < sum(p.numel() for p in encoder.parameters()) < 350_000


def test_byols_target_follows_slowly_and_is_not_trained() -> None:
    learner = initial("byol", 0.2, 0)
    x, y = torch.rand(8, 3, 28, 28), torch.rand(8, 3, 28, 28)
    learner(x, y).backward()
    assert all(parameter.grad is None for parameter in learner.target.parameters())
    online, target = learner.encoder.body[0].weight, learner.target[0].body[0].weight
    assert torch.equal(online, target)
    with torch.no_grad():
        online += 1
    learner.after_step(0.0)
    assert torch.allclose(online - target, torch.full_like(online, 0.9), atol=1e-5)
    learner.after_step(1.0)
    assert torch.allclose(online - target, torch.full_like(online, 0.9), atol=1e-5), (
        "the momentum has reached 1"
    )


def test_simsiam_stops_the_gradient() -> None:
    learner = initial("simsiam", 0.2, 0)
    x, y = torch.rand(8, 3, 28, 28), torch.rand(8, 3, 28, 28)
    learner(x, y).backward()
    got = learner.encoder.body[0].weight.grad.clone()
    learner.zero_grad()
    z0, z1 = learner.head(learner.encoder(torch.cat([x, y]))).chunk(2)
    p0, p1 = learner.predictor(torch.cat([z0, z1])).chunk(2)
    cos = torch.nn.functional.cosine_similarity
    loss = -(cos(p0, z1.detach()).mean() + cos(p1, z0.detach()).mean()) / 2
    loss.backward()
    torch.testing.assert_close(got, learner.encoder.body[0].weight.grad, atol=1e-6, rtol=1e-3)


def test_a_feature_that_is_the_class_scores_all() -> None:
    """An encoder that sees the label written into a pixel's place is right everywhere; a constant one is at
    chance.
    """
    fit, test = bundled_slice()

    class Cheat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(10) * 50)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            grey = x[:, 0, 0, 0] * 0.229 + 0.485
            return self.weight[(grey * 255 / 20).round().long()]

    def marked(part: Labelled) -> Labelled:
        images = part.images.clone()
        images[:, :, 0, 0] = (part.labels * 20)[:, None].to(torch.uint8)
        return Labelled(images, part.labels)

    scores = evaluate(Cheat(), marked(fit), marked(test))
    assert scores.knn == 100
    assert scores.linear == {0.01: 100, 0.1: 100, 1.0: 100}


def test_a_class_of_one_label_can_be_probed() -> None:
    fit, test = bundled_slice()
    rows = torch.cat([torch.nonzero(fit.labels == 0)[:39, 0], torch.nonzero(fit.labels == 1)[:1, 0]])
    scores = evaluate(None, Labelled(fit.images[rows], fit.labels[rows]), test)
    assert 10 <= scores.linear[1.0] <= 20, "two of ten classes at most"


def test_pixels_are_embedded_as_they_are() -> None:
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(embed(None, images), images.flatten(1) / 255)
