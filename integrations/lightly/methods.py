"""SimCLR, SimSiam, BYOL, VICReg, SwAV and DINO, written as lightly's own examples are, with its heads, losses
and schedules.

They are as small as the example's backbone and as short as its trainings; what is not lightly's default is in
the arguments below.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.benchmarking import OnlineLinearClassifier
from lightly.utils.debug import std_of_l2_normalized
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from torch import Tensor, nn

from mlviews.evaluation.learner import RATES, Encoder
from mlviews.transforms import Augmentation

PAIR: dict[str, Any] = {"num_views": 2}
"""What a source makes for a method of two views: the anchor and a positive, under the preset's T_x."""

_LARGE, _SMALL = Augmentation(size=28, scale=(0.4, 1.0)), Augmentation(size=16, scale=(0.15, 0.4))
MULTI_CROP: dict[str, Any] = {
    "num_views": 4,
    "crops": (0, 1, 0, 1, 2, 3),
    "transform": [_LARGE, _LARGE, _SMALL, _SMALL, _SMALL, _SMALL],
}
"""What a source makes for a method of several crops.

Large crops come from the anchor and a positive; small ones from both and from two more positives.
"""


class Method(pl.LightningModule):
    """What the methods share: the backbone, the optimizer, and what is logged.

    Args:
        steps: the steps of the whole run, for the schedules. lightly's benchmarks ask
            ``trainer.estimated_stepping_batches`` for it; with that, Lightning would drop the source's place
            from a checkpoint.
        num_classes: the classes of a class-conditional generator, for lightly's online classifier. 0 for all
            other generators, whose targets are all -1.
        lr: the peak learning rate of AdamW; None: the method's own.
    """

    rate: ClassVar[float] = 1.5e-3  # the method's own peak learning rate
    views: ClassVar[dict[str, Any]] = PAIR  # what a source makes for it, beyond a preset

    def __init__(self, steps: int, num_classes: int = 0, lr: float | None = None) -> None:
        super().__init__()
        self.steps, self.lr = steps, self.rate if lr is None else lr
        self.backbone = Encoder()  # images [B, 3, 28, 28] -> features [B, 512]
        self.online_classifier = None
        if num_classes:
            self.online_classifier = OnlineLinearClassifier(Encoder.features, num_classes, topk=(1,))

    def finish(self, loss: Tensor, features: Tensor, z: Tensor, targets: Tensor) -> Tensor:
        """Log the loss, and return it with the online classifier's added if there are classes.

        The online classifier sends no gradient into the backbone.

        Args:
            loss: the method's loss.
            features: the backbone's features of the anchors, ``[B, 512]``.
            z: their projections, ``[N, D]``. The spread of the normalized ones is logged as ``z_std``: 0 if
                they have collapsed, at best 1 / sqrt(D).
            targets: classes, ``[B]``.
        """
        log = {"train_loss": loss, "z_std": std_of_l2_normalized(z)}
        if self.online_classifier is not None:
            online_loss, online_log = self.online_classifier.training_step((features.detach(), targets), 0)
            loss = loss + online_loss
            log |= online_log
        self.log_dict(
            log, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets), sync_dist=True
        )
        return loss

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=1e-4)
        # The scheduler counts steps, as its interval says, whatever its arguments are called.
        warmup_steps = max(1, self.steps // 10)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=warmup_steps, max_epochs=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SimCLR(Method):
    """SimCLR (Chen et al. 2020)."""

    rate = RATES["simclr"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = SimCLRProjectionHead(Encoder.features, 256, 128)
        self.criterion = NTXentLoss(temperature=0.2, gather_distributed=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), targets = batch[0], batch[1]
        features = self.backbone(torch.cat([x0, x1]))
        z = self.projection_head(features)
        return self.finish(self.criterion(*z.chunk(2)), features[: len(x0)], z, targets)


class SimSiam(Method):
    """SimSiam (Chen and He 2021)."""

    rate = RATES["simsiam"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = SimSiamProjectionHead(Encoder.features, 512, 512)
        self.prediction_head = SimSiamPredictionHead(512, 128, 512)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), targets = batch[0], batch[1]
        f0, f1 = self.backbone(x0), self.backbone(x1)
        z0, z1 = self.projection_head(f0), self.projection_head(f1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        loss = 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))
        return self.finish(loss, f0, z0, targets)


class BYOL(Method):
    """BYOL (Grill et al. 2020)."""

    rate = RATES["byol"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = BYOLProjectionHead(Encoder.features, 512, 128)
        self.prediction_head = BYOLPredictionHead(128, 512, 128)
        self.criterion = NegativeCosineSimilarity()
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.global_step, self.steps, 0.9, 1.0)  # from 0.9, as training is short
        update_momentum(self.backbone, self.backbone_momentum, momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, momentum)
        (x0, x1), targets = batch[0], batch[1]
        f0, f1 = self.backbone(x0), self.backbone(x1)
        z0, z1 = self.projection_head(f0), self.projection_head(f1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        with torch.no_grad():
            t0, t1 = (self.projection_head_momentum(self.backbone_momentum(x)) for x in (x0, x1))
        loss = 0.5 * (self.criterion(p0, t1) + self.criterion(p1, t0))
        return self.finish(loss, f0, z0, targets)


class VICReg(Method):
    """VICReg (Bardes et al. 2022)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = VICRegProjectionHead(Encoder.features, 512, 512)
        self.criterion = VICRegLoss(gather_distributed=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), targets = batch[0], batch[1]
        features = self.backbone(torch.cat([x0, x1]))
        z = self.projection_head(features)
        return self.finish(self.criterion(*z.chunk(2)), features[: len(x0)], z, targets)


class SwAV(Method):
    """SwAV (Caron et al. 2020): two large crops and several small ones, without a queue.

    lightly's queue is not a part of a checkpoint, so that a run with one would not resume exactly.
    """

    views = MULTI_CROP

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = SwaVProjectionHead(Encoder.features, 512, 128)
        self.prototypes = SwaVPrototypes(128, n_prototypes=64)  # few enough for a batch to fill them
        self.criterion = SwaVLoss(sinkhorn_gather_distributed=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        crops, targets = batch[0], batch[1]
        self.prototypes.normalize()
        large = self.backbone(torch.cat(crops[:2]))
        small = self.backbone(torch.cat(crops[2:]))
        z = nn.functional.normalize(self.projection_head(torch.cat([large, small])))
        scores = self.prototypes(z).chunk(len(crops))  # one [B, 64] for each crop
        loss = self.criterion(scores[:2], scores[2:])
        return self.finish(loss.squeeze(), large[: len(targets)], z, targets)


class DINO(Method):
    """DINO (Caron et al. 2021): a teacher of the two large crops, a student of these and the small ones."""

    views = MULTI_CROP
    outputs, momentum = 64, 0.99  # few, for a batch to fill them; the teacher's momentum rises from this to 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head: dict[str, Any] = {"batch_norm": True, "freeze_last_layer": 1}
        sizes = (Encoder.features, 512, 128, self.outputs)
        self.student_head, self.teacher_head = (DINOProjectionHead(*sizes, **head) for _ in range(2))
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        self.teacher_backbone = copy.deepcopy(self.backbone)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(self.outputs, warmup_teacher_temp_epochs=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.global_step, self.steps, self.momentum, 1.0)
        update_momentum(self.backbone, self.teacher_backbone, momentum)
        update_momentum(self.student_head, self.teacher_head, momentum)
        crops, targets = batch[0], batch[1]
        large_crops = torch.cat(crops[:2])
        large, small = self.backbone(large_crops), self.backbone(torch.cat(crops[2:]))
        student = self.student_head(torch.cat([large, small]))
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher_backbone(large_crops))
        loss = self.criterion(teacher.chunk(2), student.chunk(len(crops)), epoch=self.current_epoch)
        return self.finish(loss, large[: len(targets)], student, targets)

    def on_after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(self.current_epoch)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=3.0, gradient_clip_algorithm="norm")


METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "byol": BYOL,
    "vicreg": VICReg,
    "swav": SwAV,
    "dino": DINO,
}
"""The methods by name."""
