"""What is distilled in the benchmarks: networks, a batch, and the same losses by hand and as terms."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import segmentation_models_pytorch as smp
import torch
from lightning_kd.tasks import Classification, Detection, Segmentation
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet34

from lightning_kd import Term, losses
from lightning_kd.models import FCOS
from lightning_kd.task import TaskAdapter

TEMPERATURE = 4.0
HINTS = ("layer2", "layer3", "layer4")

Losses = dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]]
"""Of each term its weight, and the loss of what the student and the teacher have."""


@dataclass
class Work:
    """A case: what the student learns, from whom, and how.

    Args:
        student: The network that learns.
        teacher: The network that it learns from.
        batch: Inputs and labels, the same in every step: what a step costs does not depend on them.
        task: The task, which the module door has.
        taps: Of each term where it looks: a module that both networks have, "" for what they return.
        by_hand: The losses as one writes them.
        terms: Makes the same losses as terms.
        task_weight: Of the task's own loss.
        levels: Whether detectors are compared, by the levels of their pyramid.
        device: Where it is done.
    """

    student: nn.Module
    teacher: nn.Module
    batch: tuple[Any, Any]
    task: TaskAdapter
    taps: dict[str, str]
    by_hand: Losses
    terms: Callable[[], dict[str, Term]]
    task_weight: float = 1.0
    levels: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Returns copies with the same weights each time."""
        return copy.deepcopy(self.student), copy.deepcopy(self.teacher)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Returns the task's own loss, as one writes it; torchvision's detectors return theirs."""
        return torch.stack([*output.values()]).sum() if self.levels else F.cross_entropy(output, batch[1])

    def call(self, student: nn.Module, batch: Any) -> Any:
        """Calls the student in training."""
        return student(*batch) if self.levels else student(batch[0])

    def compare(self, term: str, ours: Any, theirs: Any) -> Tensor:
        """Returns the loss of a term by hand, over levels the sum."""
        pairs = zip(ours.values(), theirs.values(), strict=True) if self.levels else [(ours, theirs)]
        return torch.stack([self.by_hand[term][1](s, t) for s, t in pairs]).sum()

    def teach(self, teacher: nn.Module, batch: Any) -> Any:
        """Calls what is needed of the teacher, and no more."""
        if self.levels:
            return teacher.backbone(teacher.transform([*batch[0]])[0].tensors)  # type: ignore[operator, union-attr]  # of a module
        return teacher(batch[0])


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    log_s, log_t = ((x.float() / TEMPERATURE).log_softmax(1) for x in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * TEMPERATURE**2


def cwd(student: Tensor, teacher: Tensor) -> Tensor:
    log_s, log_t = ((x.float() / TEMPERATURE).flatten(2).log_softmax(2) for x in (student, teacher))
    total = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return total * TEMPERATURE**2 / student.shape[:2].numel()


def classification(
    size: int = 32,
    batch_size: int = 64,
    hints: Sequence[str] = (),
    classes: int = 100,
    teacher: Callable[..., nn.Module] = resnet34,
) -> Work:
    """ResNet-34 teaches ResNet-18 by its logits, and by the outputs of some layers."""

    def terms() -> dict[str, Term]:
        found = {"kd": Term(losses.KD(temperature=TEMPERATURE), weight=0.9)}
        return found | {key(n): Term(losses.FitNet(), student=n, teacher=n) for n in hints}

    def key(path: str) -> str:
        return path.replace(".", "_")

    return Work(
        student=resnet18(num_classes=classes),
        teacher=teacher(num_classes=classes),
        batch=(torch.randn(batch_size, 3, size, size), torch.randint(classes, (batch_size,))),
        task=Classification(classes),
        taps={"kd": ""} | {key(path): path for path in hints},
        by_hand={"kd": (0.9, kd)} | {key(path): (1.0, F.mse_loss) for path in hints},
        terms=terms,
        task_weight=0.1,
    )


def segmentation(classes: int, size: int, batch_size: int) -> Work:
    """An FPN on a ResNet-18 teaches one on a small MobileNetV3 by its logits at the image's resolution (CWD)."""
    student = {"encoder_name": "tu-mobilenetv3_small_050", "decoder_segmentation_channels": 32}
    return Work(
        student=smp.FPN(encoder_weights=None, classes=classes, **student),
        teacher=smp.FPN("resnet18", encoder_weights=None, classes=classes),
        batch=(torch.randn(batch_size, 3, size, size), torch.randint(classes, (batch_size, size, size))),
        task=Segmentation(classes),
        taps={"cwd": ""},
        by_hand={"cwd": (3.0, cwd)},
        terms=lambda: {"cwd": Term(losses.CWD(temperature=TEMPERATURE), weight=3.0)},
    )


def detection(size: int, batch_size: int) -> Work:
    """An FCOS on a ResNet-18 teaches one on a small MobileNetV3 by the levels of its pyramid (CWD)."""
    shared = {"num_classes": 20, "channels": 64, "min_size": size, "max_size": size}
    target = {"boxes": torch.tensor([[8.0, 8.0, size / 2, size / 2]]), "labels": torch.tensor([3])}
    images = [torch.rand(3, size, size) for _ in range(batch_size)]
    return Work(
        student=FCOS(backbone="mobilenet_v3_small", **shared),
        teacher=FCOS(backbone="resnet18", **shared),
        batch=(images, [target] * batch_size),
        task=Detection(20),
        taps={"pyramid": "backbone"},
        by_hand={"pyramid": (1.0, cwd)},
        terms=lambda: {
            "pyramid": Term(losses.CWD(temperature=TEMPERATURE), student="backbone[:]", teacher="backbone[:]")
        },
        levels=True,
    )


CASES: dict[str, Callable[[], Work]] = {
    "logits, 32 px": lambda: classification(32, 64),
    "logits and 3 hints, 32 px": lambda: classification(32, 64, HINTS),
    "logits, 224 px": lambda: classification(224, 4),
    "logits and 3 hints, 224 px": lambda: classification(224, 4, HINTS),
    "segmentation, 19 classes, 256 px": lambda: segmentation(19, 256, 2),
    "segmentation, 150 classes, 256 px": lambda: segmentation(150, 256, 2),
    "detection, 4 levels, 256 px": lambda: detection(256, 2),
}
