"""What differs between schedules of a weight and those of a temperature; the rest is tried with the latter."""

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_kd.callbacks import Distillation, WeightScheduler
from project import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_kd import Term, losses, schedules


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += [float(v) for name, v in self.trainer.callback_metrics.items() if name == "train/kd/weight"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(weight: float | schedules.Schedule, *schedulers: WeightScheduler) -> tuple[Module, Term]:
    torch.manual_seed(1)
    module, term = Module(), Term(losses.KD(), weight=weight)
    own = Distillation(nn.Linear(4, 3), {"kd": term}, student="model")
    trainer = Trainer(callbacks=[own, *schedulers], **QUIET | {"max_epochs": 2})
    trainer.fit(module, DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)), batch_size=2))
    return module, term


def test_it_is_the_schedule_of_the_term_from_outside() -> None:
    schedule = schedules.Cosine(100.0, 0.0)
    lent, term = fit(1.0, WeightScheduler("kd", schedule))
    own, _ = fit(schedule)
    assert lent.seen == own.seen
    assert lent.seen[:5:4] == [100.0, pytest.approx(50.0)]
    assert torch.equal(lent.model.weight, own.model.weight)
    assert term.weight == 1.0


def test_a_term_has_one_schedule_of_its_weight() -> None:
    with pytest.raises(ValueError, match=r"the weight of that term follows Constant\(1.0\) already. Keep one"):
        fit(schedules.Constant(1.0), WeightScheduler("kd", schedules.Linear(1.0, 0.0)))


def test_a_term_that_is_switched_off_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        lent, term = fit(0.0, WeightScheduler("kd", schedules.Constant(100.0)))
    own, _ = fit(0.0)
    assert torch.equal(lent.model.weight, own.model.weight)
    assert lent.seen == []
    assert term.weight == 0.0
    assert caplog.text.count("WeightScheduler('kd') leaves that term alone: its weight is 0") == 1


def test_a_weight_that_would_not_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"WeightScheduler\('kd'\): that term has the weight 0.25, which the schedule"):
        fit(0.25, WeightScheduler("kd", schedules.Linear(1.0, 0.0)))


@pytest.mark.parametrize("term", [None, Term(losses.KD())])
def test_a_term_is_named(term: Any) -> None:
    with pytest.raises(TypeError, match="WeightScheduler takes the name of a term, 'kd', and a schedule; got a "):
        WeightScheduler(term, schedules.Linear(1.0, 0.0))


def test_any_term_has_a_weight() -> None:
    assert WeightScheduler("hint", schedules.Linear(1.0, 0.0)).schedule(1.0) == 0.0
    with pytest.raises(ValueError, match=r"A weight cannot follow.*it goes from 1.0 to -1.0"):
        WeightScheduler("hint", schedules.Linear(1.0, -1.0))
