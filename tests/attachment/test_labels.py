"""What losses and inputs ask for of a batch, and what says that it is not there."""

from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from project import QUIET, Project, data, fit, hint, kd, loader, logged, net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Distillation, Term, losses, teachers


class Labelled(losses.KD):
    """Keeps the targets that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        self.seen.append(target)
        return super().forward(student, teacher)


@pytest.mark.parametrize("target", [None, 1, lambda batch: batch[1]])
def test_labels_of_a_tuple(target: Any) -> None:
    fit(Project(), Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model", target=target))


def test_labels_that_are_not_there() -> None:
    class Unlabelled(Project):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch).square().mean()

    images = DataLoader(torch.randn(8, 6), batch_size=4)
    fit(Unlabelled(), kd(), batches=images)
    with pytest.raises(ValueError, match=r"needs 'target', and batch\[1\] did not get it out of the batch, a tensor"):
        fit(Unlabelled(), Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model"), batches=images)
    optional = Distillation(net(16), {"z": Term(losses.Standardized(losses.KD()))}, student="model")
    fit(Unlabelled(), optional, batches=images)


def test_labels_that_a_loss_can_do_without() -> None:
    class Unlabelled(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch[0]).square().mean()

    term = Term(losses.Standardized(losses.KD()))
    run = fit(
        Unlabelled(),
        Distillation(net(16), {"kd": term}, student="model"),
        batches=DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4),
    )
    assert logged(run)["train/kd"] > 0


def test_inputs_may_ask_for_labels() -> None:
    seen: list[tuple[str, Any]] = []

    def privileged(x: Tensor, *, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        seen.append(("teacher", (target, mask)))
        return (x + target[:, None],)

    def harder(x: Tensor, *, noise: Tensor) -> Tensor:
        seen.append(("student", noise))
        return x + noise

    batch = torch.randn(4, 6), torch.arange(4)
    batches = DataLoader(TensorDataset(*batch), batch_size=4)
    noise = {"noise": lambda batch: torch.full_like(batch[0], 0.5)}
    # Rehearsed, too: it needs a projector.
    fit(Project(), hint(teacher_input=privileged, student_input=harder, labels=noise), batches=batches)
    assert [side for side, _ in seen] == ["student", "teacher"] * 2
    assert torch.equal(seen[-1][1][0], batch[1])
    assert seen[-1][1][1] is None
    assert torch.equal(seen[-2][1], torch.full((4, 6), 0.5))


def test_an_input_that_asks_for_what_is_not_there() -> None:
    def harder(x: Tensor, *, noise: Tensor) -> Tensor:
        return x + noise

    with pytest.raises(ValueError, match=r"harder, which makes a model's arguments, asks for 'noise'.*labels="):
        fit(Project(), kd(student_input=harder))


def test_labels_have_one_way_in() -> None:
    with pytest.raises(ValueError, match="give target by that name"):
        kd(labels={"target": 1})
    with pytest.raises(TypeError, match=r"labels= says by the name.*got a set\."):
        kd(labels={"mask"})


def test_a_batch_of_two_views_needs_labels_of_both() -> None:
    class Views(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.model(torch.cat([batch[0], batch[0]])), torch.cat([batch[1]] * 2))

    def dkd(**kwargs: Any) -> Distillation:
        return Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model", **kwargs)

    with pytest.raises(ValueError, match=r"two views or a part of a batch: pass the labels of what it is called with"):
        fit(Views(), dkd())
    fit(Views(), dkd(target=lambda batch: torch.cat([batch[1], batch[1]])))


def test_labels_are_those_with_which_a_batch_comes() -> None:
    class Tidies(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.model(batch[0])
            batch[1][batch[1] == 255] = 0  # of what is ignored
            return F.cross_entropy(logits, batch[1])

    images, labels = torch.randn(8, 6), torch.tensor([0, 1, 255, 2, 255, 3, 1, 255])
    counts = (labels != 255)[:, None, None].expand(-1, 2, 2)
    found = []
    for kind, mask in ((Project, lambda batch: counts), (Tidies, lambda batch: batch[1] != 255)):
        torch.manual_seed(0)
        module, teacher = kind(), nn.Sequential(net(16), Maps())
        module.model = nn.Sequential(net(), Maps())
        target = labels[:, None, None].repeat(1, 2, 2).clamp(max=255 if kind is Tidies else 3)
        terms = {"kd": Term(losses.Pixelwise(losses.KD()))}
        callback = Distillation(teacher, terms, student="model", labels={"mask": mask})
        trainer = Trainer(callbacks=[callback], **QUIET)
        trainer.fit(module, DataLoader(TensorDataset(images, target), batch_size=8))
        found.append(float(trainer.callback_metrics["train/kd"]))
    assert found[0] == found[1] != 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_may_skip_a_batch_without_labels_or_put_them_there() -> None:
    class Skips(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.model(batch["x"])
            if "late" in batch:
                batch["y"] = batch["late"]
            return F.cross_entropy(logits, batch["y"]) if "y" in batch else None

    x, y = torch.randn(4, 6), torch.arange(4)
    batches: Any = [{"x": x, "y": y}, {"x": x}, {"x": x, "late": y}]
    callback = Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model", target="y")
    trainer = Trainer(callbacks=[callback], **QUIET)
    trainer.fit(Skips(), DataLoader(batches, batch_size=None))
    assert trainer.callback_metrics["train/dkd"] > 0


@pytest.mark.parametrize(
    ("learns", "before"),  # with projectors, the step is rehearsed on another batch
    [(False, "nothing"), (True, "nothing"), (False, "None"), (True, "None"), (False, "a skipped step")],
)
@pytest.mark.parametrize("several", [False, True])
def test_labels_that_the_step_makes_are_those_of_its_batch(learns: bool, before: str, several: bool) -> None:
    class Mixing(Project):
        skips = before == "a skipped step"

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            mixed = batch[1].flip(0)
            self.mixed = (mixed, 0.5) if several else mixed
            self.skips, skip = False, self.skips
            return None if skip else super().training_step((batch[0], mixed), batch_idx)

    module, loss = Mixing(), Labelled()
    terms = {"kd": Term(loss), **(dict(hint().distiller.named_terms()) if learns else {})}
    if before != "nothing":
        module.mixed = None
    distillation = Distillation(net(16), terms, student="model", target=lambda _: module.mixed)
    fit(module, distillation, batches=loader(8), max_epochs=2)
    expected = [batch[1].flip(0) for _ in range(2) for batch in loader(8)]
    skipped = int(before == "a skipped step")
    assert all(torch.equal(a[0] if several else a, b) for a, b in zip(loss.seen, expected[skipped:], strict=True))
    again = Distillation(net(16), {"kd": Term(loss)}, student="model", target=lambda _: module.mixed)
    for callback in (distillation, again):  # whose first step finds what the last fit has left
        loss.seen.clear()
        fit(module, callback, batches=loader(8))
        assert all(torch.equal(a[0] if several else a, b) for a, b in zip(loss.seen, expected[:2], strict=True))


@pytest.mark.parametrize("asks", ["nobody", "student_input", "teacher_input", "a cache"])
@pytest.mark.parametrize("form", ["tensor", "beside the batch's own", "else the batch's own", "new"])
def test_labels_of_losses_are_those_of_this_step_whoever_asks_before(asks: str, form: str, tmp_path: Path) -> None:
    class Mixing(Project):
        mixed: Tensor | None = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.model(batch[0])
            self.mixed = batch[1].flip(0)
            return F.cross_entropy(logits, self.mixed)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    module, teacher, loss = Mixing(), net(16), Labelled()
    fetch: dict[str, Any] = {
        "tensor": lambda _: module.mixed,
        "beside the batch's own": lambda batch: (module.mixed, batch[1]),
        "else the batch's own": lambda batch: batch[1] if module.mixed is None else module.mixed,
        "new": lambda _: module.mixed + 0,
    }
    inputs: dict[str, Any] = {
        "student_input": {"student_input": lambda x, *, teacher: x},
        "teacher_input": {"teacher_input": lambda x, *, target=None: x},
    }
    given = teachers.Cached(tmp_path, teacher) if asks == "a cache" else teacher
    distillation = Distillation(given, {"kd": Term(loss)}, student="model", target=fetch[form], **inputs.get(asks, {}))
    options = QUIET | {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_val_batches": 2}
    Trainer(callbacks=[distillation], **options).fit(module, loader(8), loader(8))
    expected = [batch[1].flip(0) for _ in range(2) for batch in loader(8)]
    seen = [target[0] if isinstance(target, tuple) else target for target in loss.seen]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_label_that_a_step_makes_of_none_is_that_of_its_batch() -> None:
    class Masking(Project):
        kept: Tensor | None = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.kept = batch[1] > 1
            return super().training_step(batch, batch_idx)

    class Masked(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
            seen.append(kept)
            return super().forward(student, teacher)

    seen: list[Tensor | None] = []
    module, terms = Masking(), {"kd": Term(Masked())}
    fit(module, Distillation(net(16), terms, student="model", labels={"kept": lambda _: module.kept}))
    assert all(torch.equal(a, b[1] > 1) for a, b in zip(seen, loader(), strict=True))


def test_a_label_function_may_return_another_number_of_tensors_each_time() -> None:
    class Several(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, parts: list[Tensor]) -> Tensor:
            return super().forward(student, teacher) * len(parts)

    asked: list[int] = []

    def parts(batch: Any) -> list[Tensor]:
        asked.append(0)
        return [batch[1]] * len(asked)

    distillation = Distillation(net(16), {"kd": Term(Several())}, student="model", labels={"parts": parts})
    assert fit(Project(), distillation, batches=loader(8)).callback_metrics["train/kd"] > 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_labels_in_an_object_are_read_before_the_step_takes_them_out() -> None:
    class Batch:
        def __init__(self, rows: Any) -> None:
            self.x, self.y = torch.utils.data.default_collate(rows)

    class Popping(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            y = vars(batch).pop("y", None)
            return None if y is None else super().training_step((batch.x, y), batch_idx)

    def unlabelled_first(rows: Any) -> Batch:
        batch = Batch(rows)
        if not torch.equal(batch.x, data()[:8][0]):
            return batch
        del batch.y
        return batch

    batches = DataLoader(data(), batch_size=8, collate_fn=unlabelled_first)
    distillation = Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model", target=lambda batch: batch.y)
    trainer = Trainer(callbacks=[distillation], **QUIET | {"max_epochs": 2})
    trainer.fit(Popping(), batches)
    assert trainer.callback_metrics["train/dkd"] > 0


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_labels_may_be_taken_out_made_and_overwritten_in_one_step(kind: Any) -> None:
    class Tidying(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y, batch["late"] = batch.pop("y"), batch["x"].sum(1)
            batch["z"] += 1
            return F.cross_entropy(self.model(batch.pop("x")), y)

    class Several(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, target: Any, late: Any, z: Any, odd: Any) -> Tensor:
            seen.append([target, late, z, odd])
            return super().forward(student, teacher)

    seen: list[list[Tensor]] = []
    labels: dict[str, Any] = {"late": "late", "z": "z", "odd": lambda batch: batch.pop("z") % 2 == 1}
    distillation = Distillation(net(16), {"kd": Term(Several())}, student="model", target="y", labels=labels)
    x, y = next(iter(loader(8)))
    trainer = Trainer(callbacks=[distillation], **QUIET)
    trainer.fit(Tidying(), DataLoader([kind(x=x, y=y, z=y.clone())], batch_size=None))
    (found,) = seen
    for one, other in zip(found, (y, x.sum(1), y, y % 2 == 1), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class AttributeDict(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Nested:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.all = x, {"y": [y], "itself": self}

    y = property(lambda self: self.all["y"].pop())


@pytest.mark.parametrize("kind", [AttributeDict, Slotted, Nested, SimpleNamespace])
def test_batches_of_any_kind_are_as_they_came(kind: Any) -> None:
    class Overwriting(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = batch.y
            loss = F.cross_entropy(self.model(batch.x), y.clone())
            y.fill_(0)
            return loss

    loss = Labelled()
    x, y = next(iter(loader(8)))
    batch = kind(x=x, y=y.clone())
    distillation = Distillation(net(16), {"kd": Term(loss)}, student="model", target=lambda batch: batch.y)
    Trainer(callbacks=[distillation], **QUIET).fit(Overwriting(), DataLoader([batch], batch_size=None))
    assert torch.equal(loss.seen[0], y)
    if kind is not Nested:
        assert not batch.y.any()


def test_a_label_that_is_none_stays_so_where_the_step_takes_out_what_it_is_of() -> None:
    class Popping(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch.pop("y")), batch_idx)

    class Odd(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, odd: Any = None) -> Tensor:
            seen.append(odd)
            return super().forward(student, teacher)

    seen: list[Any] = []
    odd = {"odd": lambda batch: batch["y"] if batch["y"].numel() == 1 else None}
    distillation = Distillation(net(16), {"kd": Term(Odd())}, student="model", labels=odd)
    batches: Any = [{"x": x, "y": y} for x, y in loader(8)]
    Trainer(callbacks=[distillation], **QUIET).fit(Popping(), DataLoader(batches, batch_size=None))
    assert seen == [None, None]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_label_under_a_new_key_goes_before_the_one_that_came(kind: Any) -> None:
    class Mixing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                batch["mixed"] = batch["y"].flip(0)
            return F.cross_entropy(self.model(batch["x"]), batch["y"])

    loss = Labelled()
    batches = [kind(x=x, y=y) for x, y in loader(8)]
    distillation = Distillation(
        net(16), {"kd": Term(loss)}, student="model", target=lambda batch: batch.get("mixed", batch["y"])
    )
    Trainer(callbacks=[distillation], **QUIET).fit(Mixing(), DataLoader(batches, batch_size=None))
    (_, first), (_, second) = loader(8)
    assert torch.equal(loss.seen[0], first)
    assert torch.equal(loss.seen[1], second.flip(0))


class Maps(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, :, None, None] * torch.arange(1.0, 5.0).view(2, 2)
