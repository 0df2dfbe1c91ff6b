from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_kd.tasks import LabelAssisted, Segmentation
from project import QUIET
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd import DistillationModule, Term, losses, teachers
from lightning_kd.data import MaskScenes


class Net(nn.Sequential):
    def __init__(self, channels: int) -> None:
        width = 8
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 11, 1),
        )


def fit(module: DistillationModule) -> Trainer:
    trainer = Trainer(**QUIET)
    trainer.fit(module, datamodule=MaskScenes(batch_size=8, train_size=16, val_size=8, test_size=2, size=32))
    return trainer


def test_a_teacher_that_sees_the_labels_teaches_one_that_does_not() -> None:
    teacher = Net(4)
    told = fit(DistillationModule(LabelAssisted(num_classes=11), teacher))
    assert told.callback_metrics["val/loss"] < 11  # of the labels' view, with four channels
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    student = Net(3)
    student.register_forward_pre_hook(lambda model, args: seen.append(args[0]) if model.training else None)
    module = DistillationModule(
        Segmentation(num_classes=11),
        student,
        teacher,
        {"lad": Term(losses.CWD(temperature=4.0), weight=3.0)},
        teacher_input=teachers.LabelNoise(11, values="spread", noise=0.0),
    )
    trainer = fit(module)
    assert trainer.callback_metrics["train/lad"] > 0
    to_student, to_teacher = seen[-2:]
    assert torch.equal(to_teacher[:, :3], to_student)
    assert set(to_teacher[:, 3].unique().tolist()) <= set(((2 * torch.arange(12) - 12) / 10).tolist())
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert 0 <= trainer.callback_metrics["test/agreement"] <= 1


def test_the_loss_is_that_of_both_views_and_their_consistency() -> None:
    task = LabelAssisted(num_classes=3, ignore_index=9, consistency=5.0, temperature=4.0)
    batch = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    batch[1][0, 0] = 9
    seen: list[Tensor] = []

    def watched(model: nn.Module, args: Any) -> None:
        seen.append(args[0])

    model = nn.Conv2d(4, 3, 1)
    model.register_forward_pre_hook(watched)
    one, other = task(model, batch)
    assert torch.equal(seen[0][:, :3], batch[0])
    assert not torch.equal(seen[0][:, 3], seen[1][:, 3])
    plain = Segmentation(num_classes=3, ignore_index=9)
    kept = (batch[1] != 9).unsqueeze(1)

    def directed(x: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = ((z / 4.0).masked_fill(~kept, -1e30).flatten(2).log_softmax(2) for z in (x, y))
        return 16.0 * F.kl_div(log_p, log_q, reduction="sum", log_target=True) / 6

    expected = plain.loss(one, batch) + plain.loss(other, batch) + 5.0 * (directed(one, other) + directed(other, one))
    assert task.loss((one, other), batch).item() == pytest.approx(expected.item(), rel=1e-5)
    model.eval()
    assert task.loss(task(model, batch), batch).ndim == 0
    assert len(seen) == 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="not negative; got -1"):
        LabelAssisted(num_classes=3, consistency=-1.0)
    with pytest.raises(TypeError, match="colour"):
        LabelAssisted(num_classes=3, colour="red")
