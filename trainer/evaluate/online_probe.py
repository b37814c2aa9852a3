"""A linear classifier that is trained beside the encoder, on features that a training step computes anyway.

It says early how well the classes can be told apart, for the cost of a matrix product. The encoder does not learn from
it: the features are detached. Features at unit length are standardised by their running mean and variance and scaled to
a mean square of 1 / F. Then the loss's second derivative is at most 1/2 in every direction, whatever the backbone, and
one learning rate suits all: SGD with momentum is stable below 2 (1 + MOMENTUM) / (1/2) = 7.6.

Shape suffixes: B images of a rank's micro-batch, N features of them (all query views), F dimensions, C classes.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import Encoder
from trainer.engines.finite import not_finite
from trainer.evaluate.features import Features

if TYPE_CHECKING:
    from trainer.config import Config

LR, MOMENTUM = 1.0, 0.9
MEMORY = 100  # steps over which mean and variance are averaged
MAX_CLASSES = 4096  # of eval.probe=null: weights and gradients of more cost more than 2 % of a ResNet-50's step


class OnlineProbe:
    """A linear classifier on the backbone of a student in training; equal on all ranks.

    Attributes:
        tensors: Weights and velocity [C, F + 1], whose last column is the bias's, mean and mean square of the features
            [2, F], and the number of steps [].
    """

    def __init__(self, student: Encoder, classes: int, device: torch.device) -> None:
        """Starts with weights of 0, and makes `student` keep its features. Draws no random numbers."""
        projection = student.head[0]
        assert isinstance(projection, nn.Linear)
        features = projection.in_features
        student.keeps_features, self.student = True, student
        self.tensors = {
            "weight": torch.zeros(classes, features + 1, device=device),
            "velocity": torch.zeros(classes, features + 1, device=device),
            "moments": torch.zeros(2, features, device=device),
            "steps": torch.zeros((), device=device),
        }

    @torch.no_grad()
    def step(self, labels_B: Tensor, intact: Tensor) -> dict[str, Tensor]:
        """Classify the features of the student's last forward pass, then learn from them. Called by all ranks.

        Does not wait for the device.

        Args:
            labels_B: Labels of this rank's last micro-batch, int64 on the device.
            intact: NaN if the training step has failed, scalar; then nothing changes.

        Returns:
            The accuracy before the update, as `probe_top1`; {} for a method that bypasses the encoder's forward pass.
        """
        if self.student.features_NF is None:
            return {}
        x_NF = F.normalize(self.student.features_NF.float(), dim=1)
        labels_N = labels_B.repeat(len(x_NF) // len(labels_B))  # view by view
        old = self.tensors
        steps = old["steps"] + 1
        batch_moments = _mean_over_ranks(torch.stack([x_NF.mean(0), x_NF.square().mean(0)]))
        moments = old["moments"].lerp(batch_moments, steps.reciprocal().clamp(min=1 / MEMORY))
        z_NF = _standardise(x_NF, moments)
        logits_NC = z_NF @ old["weight"].T
        error_NC = logits_NC.softmax(1).scatter_add_(1, labels_N[:, None], -torch.ones_like(logits_NC[:, :1]))
        gradient = _mean_over_ranks(error_NC.T @ z_NF / len(z_NF))
        velocity = MOMENTUM * old["velocity"] + gradient
        new = {"weight": old["weight"] - LR * velocity, "velocity": velocity, "moments": moments, "steps": steps}
        failed = not_finite(intact)
        self.tensors = {name: torch.where(failed, old[name], x) for name, x in new.items()}
        return {"probe_top1": (logits_NC.argmax(1) == labels_N).float().mean()}

    @torch.no_grad()
    def accuracy(self, features: Features) -> float:
        """Return the accuracy on all ranks' features, whose labels are those of the training images. Collective."""
        logits_NC = _standardise(features.x_ND, self.tensors["moments"]) @ self.tensors["weight"].T
        correct = (logits_NC.argmax(1) == features.labels_N).sum()
        counts = torch.stack([correct, torch.full_like(correct, len(features.labels_N))])
        dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds."""
        return dict(self.tensors)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the tensors of `state_dict`."""
        self.tensors = dict(tensors)


def make_probe(config: "Config", classes: int, student: Encoder, device: torch.device) -> OnlineProbe | None:
    """Return the probe that eval.probe asks for, or None. Raises ValueError if there is nothing to tell apart."""
    wanted = config.eval.probe
    if wanted and classes < 2:
        raise ValueError(f"eval.probe: need images of at least two classes; {config.data.train} has one")
    wanted = 2 <= classes <= MAX_CLASSES if wanted is None else wanted
    return OnlineProbe(student, classes, device) if wanted else None


def _mean_over_ranks(x: Tensor) -> Tensor:
    if (world_size := dist.get_world_size()) > 1:
        dist.all_reduce(x)
        x /= world_size
    return x


def _standardise(x_NF: Tensor, moments: Tensor) -> Tensor:
    """Return the features with mean 0 and variance 1 / F, and a column of ones: [N, F + 1]."""
    mean_F, square_F = moments
    # Features that never vary get 0; unit rows have a mean square of 1 / F.
    scale_F = (len(mean_F) * (square_F - mean_F.square()).clamp(min=1e-6 / len(mean_F))).rsqrt()
    return F.pad((x_NF - mean_F) * scale_F, (0, 1), value=1.0)
