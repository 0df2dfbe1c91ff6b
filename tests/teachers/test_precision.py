"""What a frozen teacher runs in: its precision, the order of its memory, compiled or not."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_kd.callbacks import EMATeacher
from lightning_kd.tasks import Classification
from project import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import DistillationModule, Distiller, Term, losses
from lightning_kd.schedules import Moment
from lightning_kd.teachers import EMA, Ensemble, Frozen, PastSelf
from lightning_kd.teachers import frozen as frozen_file

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A network that begins with BatchNorm, and says what its convolution was called with."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 5)
        self.seen: list[Tensor] = []
        self.conv.register_forward_pre_hook(lambda module, args: self.seen.append(args[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.norm(x)).relu().mean((2, 3)))


def answers(teacher: Frozen, x: Tensor = X) -> list[Tensor]:
    teacher.bind(nn.Identity(), ["conv", "output"])
    try:
        record = teacher(x)
        return [record["conv"][0], record["output"][0]]
    finally:
        teacher.unbind()


def plain() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize(
    ("precision", "output", "weights"),
    [
        (None, torch.float32, torch.float32),
        ("32-true", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-mixed", torch.float16, torch.float32),
        ("16-true", torch.float16, torch.float16),
    ],
)
def test_it_runs_in_its_own_precision(precision: Any, output: torch.dtype, weights: torch.dtype) -> None:
    expected, model = answers(Frozen(plain())), plain()
    found = answers(Frozen(model, precision=precision))
    assert {x.dtype for x in found} == {output}
    assert {model.conv.weight.dtype, model.head.bias.dtype} == {weights}
    assert {x.dtype for x in model.norm.state_dict().values()} == {torch.float32, torch.int64}
    exact = output == torch.float32
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0 if exact else 2e-2, atol=0 if exact else 2e-2)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [(None, torch.bfloat16), ("32-true", torch.float32), ("16-true", torch.float16), ("16-mixed", torch.float16)],
)
def test_it_does_not_care_for_the_trainers_autocast(precision: Any, expected: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {x.dtype for x in answers(Frozen(plain(), precision=precision))} == {expected}
        assert torch.is_autocast_enabled("cpu")


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of '32-true', 'bf16-true', .* got 'fp8'"):
        Frozen(plain(), precision="fp8")  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize("options", [{"precision": "bf16-true"}, {"channels_last": True}])
def test_the_weights_of_a_sharded_teacher_stay(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_file, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"Net\) is sharded .*mp_policy"):
        Frozen(plain(), **options).bind(nn.Identity(), ["output"])
    Frozen(plain(), precision="bf16-mixed").bind(nn.Identity(), ["output"])


def test_channels_last_are_the_same_numbers_in_another_order() -> None:
    model = plain()
    found = answers(Frozen(model, channels_last=True))
    torch.testing.assert_close(found, answers(Frozen(plain())))
    for tensor in (model.conv.weight, *model.seen, found[0]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert not X.is_contiguous(memory_format=torch.channels_last)


class Counted:
    """A backend of torch.compile that counts what it runs."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.mark.parametrize("path", ["conv", "output"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo at a graph break
def test_it_is_compiled_while_it_is_bound(path: str) -> None:
    backend, model, student = Counted(), plain(), Net()
    model.conv._forward_pre_hooks.clear()
    term = Term(losses.FitNet() if path == "conv" else losses.KD(), student=path, teacher=path)
    results = []
    for teacher in (Frozen(copy.deepcopy(model)), Frozen(model, compile={"backend": backend})):
        distiller = Distiller({"it": copy.deepcopy(term)}, teacher)
        distiller.attach(student)
        for step in range(4):
            with distiller.watch() as calls:
                student(X)
            results.append(distiller(calls)["it"].detach())
            if step == 1:
                compiled, runs = backend.compiled, backend.runs
        distiller.detach()
    torch.testing.assert_close(results[:4], results[4:])
    assert backend.compiled == compiled > 0  # once it is known where it may stop, no more
    assert backend.runs > runs
    assert model._compiled_call_impl is None
    ran = backend.runs
    model(X)
    assert backend.runs == ran


def test_through_both_doors_and_in_an_ensemble() -> None:
    data = DataLoader(TensorDataset(X, torch.arange(4)), batch_size=2)
    model = plain()
    own = Frozen(model, precision="bf16-true", channels_last=True)
    for teacher in (own, Ensemble([Frozen(plain(), precision="bf16"), plain()])):
        terms = {"kd": Term(losses.KD())}
        if teacher is own:
            terms["hint"] = Term(losses.FitNet(), student="conv", teacher="conv")
        module = DistillationModule(Classification(5), Net(4), teacher, terms)
        trainer = Trainer(**QUIET)
        trainer.test(module, data, verbose=False)
        trainer.fit(module, data, data)
        assert all(0 < trainer.callback_metrics[f"train/{name}"] < float("inf") for name in terms)
        trainer.test(module, data, verbose=False)
    assert model.seen[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [EMA, PastSelf])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [(None, None), ("32-true", torch.float32), ("bf16", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_a_copy_of_the_student_runs_in_its_own_precision(
    precision: Any, expected: torch.dtype | None, autocast: bool, kind: Any
) -> None:
    student, teacher = plain(), kind(precision=precision)
    teacher.bind(student, ["output"])
    dtype = expected or (torch.bfloat16 if autocast else torch.float32)
    for epoch in (1, 2):  # what is cast is the average of now
        with torch.no_grad():
            student.head.weight += 1.0
        teacher.update(Moment(step=epoch, epoch=epoch))
        teacher.begin_epoch(Moment(step=epoch, epoch=epoch))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            (found,) = teacher(X)["output"]
            assert torch.is_autocast_enabled("cpu") == autocast
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            oracle = copy.deepcopy(teacher.model).eval()(X)
        assert found.dtype == dtype
        assert torch.equal(found, oracle)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    teacher.unbind()


@pytest.mark.parametrize("kind", [EMA, PastSelf])
def test_the_weights_of_a_copy_stay_in_float32(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"weights in float32, .*got 'bf16-true'.*precision='bf16-mixed'"):
        kind(precision="bf16-true")
    with pytest.raises(ValueError, match="got 'fp8'"):
        kind(precision="fp8")
    assert EMATeacher({"it": Term(losses.KD())}, precision="bf16").distiller.teacher.precision == "bf16"


def test_a_copy_takes_after_the_student_in_memory_and_compilation() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(graph)
        return graph

    model = plain().to(memory_format=torch.channels_last)
    model.conv._forward_pre_hooks.clear()
    teacher = EMA()
    teacher.bind(torch.compile(model, backend=backend), ["output"])
    teacher(X)
    assert compiled
    (weight,) = (p for name, p in teacher.model.named_parameters() if name.endswith("conv.weight"))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    teacher.unbind()
