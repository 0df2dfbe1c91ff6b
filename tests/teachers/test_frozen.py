import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses
from lightning_kd.teacher_layers import TeacherLayers
from lightning_kd.teachers import EMA, Frozen, Teacher, load_weights


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.late = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.stem(x)))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def bound(model: nn.Module, *paths: str, **kwargs: Any) -> Frozen:
    teacher = Frozen(model, **kwargs)
    teacher.bind(nn.Linear(1, 1), paths or ["output"])
    return teacher


# It stands still


def test_it_stands_still_whatever_train_is_called_around_it() -> None:
    model = Net()
    before, teacher, x = state_of(model), bound(model, "stem", "output"), torch.randn(8, 3)
    expected = copy.deepcopy(model).eval()(x)
    for disturb in (model.train, teacher.train, model.stem.train):
        disturb()
        answer = teacher(x)
        assert torch.equal(answer["output"][0], expected)
        assert not answer["stem"][0].requires_grad
        assert not model.training
    assert same(before, state_of(model))


def test_it_stands_still_while_a_student_learns() -> None:
    student, model = Net(), Net()
    before = state_of(model)
    distiller = Distiller(
        {"kd": Term(losses.KD()), "hint": Term(losses.FitNet(), student="stem", teacher="stem")}, model
    )
    distiller.attach(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        distiller.train()
        model.train()
        with distiller.watch() as calls:
            student(torch.randn(8, 3))
        distiller.total(distiller(calls)).backward()
        optimizer.step()
    assert same(before, state_of(model))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())  # the user's flags are the user's


def test_in_mode_train_it_uses_and_updates_the_statistics_of_the_batch() -> None:
    model, x = Net(), torch.randn(8, 3)
    teacher = bound(model, "stem", mode="train")
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(3):
        model.eval()
        answer = teacher(x)["stem"][0]
        assert not answer.requires_grad
    assert model.training
    assert (answer == 0).any()  # dropout
    # Every layer's, on every call: no early stop behind the tapped layer.
    assert int(model.stem[1].num_batches_tracked) == int(model.late.num_batches_tracked) == 3
    assert same(weights, dict(model.named_parameters()))


def test_mode_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="'eval' or 'train', got 'frozen'"):
        Frozen(Net(), mode="frozen")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (EMA(), r"got a module \(EMA\). That is a teacher already"),
        (Frozen(Net()), "That is a teacher already"),
        (Net, r"got the class Net. Did you mean Net\(\.\.\.\)"),
        ("net", "got a str"),
    ],
)
def test_it_holds_a_network(model: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"Frozen holds a trained network, {said}" if said[:3] == "got" else said):
        Frozen(model)


@pytest.mark.parametrize("options", ["max-autotune", None, 1])
def test_compile_is_a_bool_or_options(options: Any) -> None:
    with pytest.raises(TypeError, match="compile is True, False or a dict of what"):
        Frozen(Net(), compile=options)


def test_a_checkpoint_is_a_file() -> None:
    with pytest.raises(TypeError, match=r"a checkpoint is the name of a file, got a OrderedDict.*load_state_dict"):
        Frozen(Net(), checkpoint=Net().state_dict())


def test_it_runs_only_as_far_as_it_is_read() -> None:
    model, calls = Net(), []
    model.late.register_forward_hook(lambda *_: calls.append(1))
    teacher = bound(model, "stem")
    for _ in range(4):
        teacher(torch.randn(8, 3))
    assert len(calls) == 1


def test_what_shares_parameters_with_the_student_is_refused() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"shares 8 parameters with the student.*copy\.deepcopy"):
        Frozen(model).bind(model, ["output"])
    student = Net()
    student.head = model.head
    with pytest.raises(ValueError, match="shares 2 parameters"):
        Frozen(model).bind(student, ["output"])
    Frozen(copy.deepcopy(model)).bind(model, ["output"])
    assert not model._forward_hooks


def test_what_shares_the_memory_of_the_student_is_refused() -> None:
    """Other parameters, the same numbers: ``assign=True`` copies nothing."""
    student, model = Net(), Net()
    model.load_state_dict(student.state_dict(), assign=True)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in student.parameters()}
    with pytest.raises(ValueError, match=r"shares 8 parameters with the student"):
        Frozen(model).bind(student, ["output"])


def test_models_without_memory_share_nothing() -> None:
    with torch.device("meta"):
        Frozen(Net()).bind(Net(), ["output"])
    empty = nn.ParameterList([nn.Parameter(torch.zeros(0))])
    Frozen(empty).bind(copy.deepcopy(empty), ["output"])


def test_a_teacher_that_runs_in_inference_mode_itself() -> None:
    class Inference(Net):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    student = Net()
    distiller = Distiller(
        {"out": Term(losses.FitNet()), "hint": Term(losses.FitNet(), student="stem", teacher="stem")}, Inference()
    )
    distiller.attach(student)
    with distiller.watch() as calls:
        student(torch.randn(8, 3))
    distiller.total(distiller(calls)).backward()
    assert student.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_take_the_type_of_its_weights(dtype: torch.dtype) -> None:
    class Arguments(Net):
        def forward(self, x: Any, *, more: dict[str, Tensor]) -> Tensor:
            assert more["ids"].dtype == torch.int64
            assert more["mask"].dtype == torch.bool
            return super().forward(x[0] + more["y"])

    teacher = bound(Arguments().to(dtype))
    x = torch.randn(8, 3)
    more = {"y": x, "ids": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2, dtype=torch.bool)}
    assert teacher((x,), more=more)["output"][0].dtype == dtype
    assert more["y"].dtype == x.dtype == torch.float32


def test_a_teacher_of_another_type_teaches() -> None:
    student = Net()
    distiller = Distiller({"hint": Term(losses.FitNet(), student="stem", teacher="stem")}, Net().bfloat16())
    distiller.attach(student)
    with distiller.watch() as calls:
        student(torch.randn(8, 3))
    loss = distiller(calls)["hint"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.stem[0].weight.grad.dtype == torch.float32


def test_it_answers_only_when_bound() -> None:
    teacher = Frozen(Net())
    with pytest.raises(RuntimeError, match="not bound"):
        teacher(torch.zeros(2, 3))
    teacher.bind(Net(), ["stem"])
    teacher.bind(Net(), ["head"])  # again: for other paths
    assert list(teacher(torch.zeros(2, 3))) == ["head"]
    assert not teacher.model.stem._forward_hooks
    teacher.unbind()
    teacher.unbind()
    assert not teacher.model.head._forward_hooks
    with pytest.raises(RuntimeError, match="not bound"):
        teacher(torch.zeros(2, 3))


def test_it_goes_back_to_the_mode_that_it_came_from() -> None:
    model = Net()
    model.head.eval()
    modes = {name: part.training for name, part in model.named_modules()}
    teacher = Frozen(model)
    for _ in range(2):
        teacher.bind(Net(), ["head"])
        teacher(torch.zeros(2, 3))
        assert not any(part.training for part in model.modules())
        teacher.unbind()
        assert {name: part.training for name, part in model.named_modules()} == modes


def test_what_cannot_be_attached_leaves_nothing_on_the_teacher() -> None:
    model = Net()
    term = Term(losses.FitNet(), student="stem", teacher="stem", projector=TeacherLayers(["nope"]))
    with pytest.raises(ValueError, match="'nope'"):
        Distiller({"it": term}, Frozen(model, compile={"backend": "eager"})).attach(Net())
    assert model._compiled_call_impl is None
    assert not any(part._forward_hooks for part in model.modules())


def test_two_distillers_cannot_have_one_at_once() -> None:
    teacher, x = Frozen(Net()), torch.zeros(2, 3)
    one, other = (Distiller({"it": Term(losses.FitNet(), student=at, teacher=at)}, teacher) for at in ("stem", "head"))
    student = Net()
    one.attach(student)
    other.attach(Net())
    with one.watch() as calls:
        student(x)
    with pytest.raises(RuntimeError, match="the teacher gave no 'stem': another Distiller that was attached since"):
        one(calls)
    other.detach()
    with pytest.raises(RuntimeError, match=r"not bound.*If another Distiller had the same teacher"), one.watch():
        student(x)


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the teacher \(Net\) has no module 'sten'.*'stem'"):
        Frozen(Net()).bind(Net(), ["sten"])


def test_copies() -> None:
    teacher = Frozen(Net())
    assert copy.deepcopy(teacher) is teacher
    loaded = pickle.loads(pickle.dumps(teacher))
    loaded.bind(Net(), ["output"])
    assert torch.equal(loaded(torch.ones(2, 3))["output"][0], bound(teacher.model)(torch.ones(2, 3))["output"][0])


def test_a_teacher_of_your_own_needs_three_methods() -> None:
    class Zeros(Teacher):
        def bind(self, student: nn.Module, paths: Any) -> None:
            self.paths = list(paths)

        def unbind(self) -> None:
            self.paths = []

        def forward(self, x: Tensor) -> dict[str, list[Any]]:
            return {path: [torch.zeros(len(x), 2)] for path in self.paths}

    student, teacher, x = nn.Linear(3, 2), Zeros(), torch.randn(8, 3)
    distiller = Distiller({"it": Term(nn.MSELoss())}, teacher)
    distiller.attach(student)
    with distiller.watch() as calls:
        out = student(x)
    torch.testing.assert_close(distiller(calls)["it"], out.square().mean())
    distiller.detach()
    assert teacher.paths == []


# Checkpoints


def save(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "student._orig_mod.", "a.b.c."])
@pytest.mark.parametrize("lightning", [False, True])
def test_weights_load_whatever_prefix_they_have(prefix: str, lightning: bool, tmp_path: Path) -> None:
    saved, model = Net(), Net()
    state: Any = prefixed(saved.state_dict(), prefix)
    if prefix:
        state["beside.weight"] = torch.zeros(7)
        state["other"] = torch.zeros(())
    content = {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}} if lightning else state
    Frozen(model, checkpoint=save(tmp_path, content))
    assert same(state_of(model), state_of(saved))
    Frozen(Net(), checkpoint=str(tmp_path / "model.pt"))


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    saved, model = nn.Linear(3, 2), nn.Linear(3, 2)
    load_weights(model, save(tmp_path, prefixed(saved.state_dict(), "net.head.")))
    assert same(state_of(model), state_of(saved))


def test_two_models_in_one_file_are_told_apart_by_shape(tmp_path: Path) -> None:
    small, big, model = Net(4), Net(8), Net(8)
    state = prefixed(small.state_dict(), "student.") | prefixed(big.state_dict(), "teacher.")
    load_weights(model, save(tmp_path, state))
    assert same(state_of(model), state_of(big))


def test_two_models_in_one_file_that_both_fit_are_refused(tmp_path: Path) -> None:
    model = Net()
    before = state_of(model)
    state = prefixed(Net().state_dict(), "model.") | prefixed(Net().state_dict(), "ema_model.")
    with pytest.raises(ValueError, match=r"more than one.*'ema_model\.'.*'model\.'"):
        load_weights(model, save(tmp_path, state))
    assert same(before, state_of(model))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_deeper_model_of_the_same_family_is_refused(prefix: str, tmp_path: Path) -> None:
    """Every key of a ResNet-18 is in a ResNet-34, in the same shape."""
    deep, model = timm.create_model("resnet34", num_classes=2), timm.create_model("resnet18", num_classes=2)
    before = state_of(model)
    assert set(deep.state_dict()) > set(model.state_dict())
    with pytest.raises(ValueError, match=r"does not fit ResNet.*layer1\.2\.conv1\.weight") as error:
        load_weights(model, save(tmp_path, prefixed(deep.state_dict(), prefix)))
    assert len(str(error.value)) < 1000
    assert same(before, state_of(model))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_another_width_is_refused_and_nothing_is_loaded(prefix: str, tmp_path: Path) -> None:
    model = Net(4)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"does not fit Net: stem\.0\.weight is \(8, 3\) and not \(4, 3\)"):
        load_weights(model, save(tmp_path, prefixed(Net(8).state_dict(), prefix)))
    assert same(before, state_of(model))


def test_the_state_dict_of_the_student_is_refused(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"does not fit Net.*stem\.0\.weight.*0\.weight.*another architecture"):
        Frozen(Net(), checkpoint=save(tmp_path, student.state_dict()))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    state = prefixed(Net().state_dict(), "model.")
    del state["model.late.running_mean"]
    with pytest.raises(ValueError, match=r"lacks .*late\.running_mean"):
        load_weights(Net(), save(tmp_path, state))


def test_a_file_from_before_batches_were_counted(tmp_path: Path) -> None:
    saved, model = Net(), Net()
    state = {k: v for k, v in saved.state_dict().items() if "num_batches" not in k}
    load_weights(model, save(tmp_path, prefixed(state, "model.")))
    assert same(state_of(model), state_of(saved))


def test_modules_that_both_have_keep_the_students_mode() -> None:
    shared = nn.Dropout(0.5)
    teacher, student = nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(nn.Linear(4, 4), shared)
    frozen = Frozen(teacher)
    frozen.bind(student.train(), ["output"])
    x = torch.ones(2, 4)
    assert torch.equal(frozen(x)["output"][0], teacher[0](x))
    assert shared.training
    shared.eval()
    frozen(x)
    assert not shared.training


def test_statistics_that_both_have_are_refused() -> None:
    shared = nn.BatchNorm1d(4, affine=False)
    teacher, student = nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(nn.Linear(4, 4), shared)
    frozen, x = Frozen(teacher), torch.randn(2, 4)
    frozen.bind(student, ["output"])
    frozen(x)  # may be a rehearsal, before a user's hooks
    with pytest.raises(
        ValueError, match=r"shares buffers with the student \(Sequential\), in '1', which is in training"
    ):
        frozen(x)
    shared.eval()
    before = state_of(shared)
    frozen(x)
    assert not shared.training
    assert same(before, state_of(shared))
    with pytest.raises(ValueError, match="with mode='train' it changes them"):
        Frozen(teacher, mode="train").bind(student, ["output"])


def test_a_backbone_that_nobody_trains_may_be_one() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval()
    teacher, student = nn.Sequential(backbone, nn.Linear(4, 3)), nn.Sequential(backbone, nn.Linear(4, 3))
    before, frozen, x = state_of(teacher), Frozen(teacher), torch.randn(2, 4)
    distiller = Distiller({"hint": Term(losses.FitNet(), student="0.1", teacher="1"), "kd": Term(losses.KD())}, frozen)
    distiller.terms.pop("hint")  # of a frozen layer nothing is learned; the tap is what is tried
    distiller.attach(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        student[1].train()
        with distiller.watch() as calls:
            student(x)
        distiller.total(distiller(calls)).backward()
        optimizer.step()
    assert same(before, state_of(teacher))
    assert student[1].training
    with pytest.raises(ValueError, match="a '-true' precision changes them"):
        Frozen(teacher, precision="bf16-true").bind(student, ["output"])
    backbone[0].requires_grad_(True)  # as BackboneFinetuning does in the middle of a run
    with pytest.raises(ValueError, match=r"shares 2 parameters with the student .* that learn"), distiller.watch():
        student(x)


@pytest.mark.parametrize("how", ["train", "dropout", "overridden"])
def test_a_model_that_sets_its_own_mode_does_not_stand_still(how: str) -> None:
    class Restless(Net):
        def forward(self, x: Tensor) -> Tensor:
            if how == "train":
                self.train()
            elif how == "dropout":
                self.stem[2].train()
            return super().forward(x)

        def train(self, mode: bool = True) -> Any:
            return super().train(mode or how == "overridden")

    said = "'stem.2'" if how == "dropout" else "itself, 'stem', 'stem.0', 'stem.1' and"
    with pytest.raises(ValueError, match=f"does not stand still: .* training mode of {said}"):
        bound(Restless())(torch.randn(8, 3))
    bound(Restless(), mode="train")(torch.randn(8, 3))


def test_a_program_of_torch_export_teaches() -> None:
    model, x = Net().eval(), torch.randn(8, 3)
    program = torch.export.export(model, (x,)).module()
    assert torch.equal(bound(nn.Sequential(program))(x)["output"][0], model(x))
    with pytest.raises(NotImplementedError):
        bound(program, mode="train")(x)


def test_a_missing_file_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*nowhere\.pt.*looked from"):
        Frozen(Net(), checkpoint=tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="It is a folder"):
        Frozen(Net(), checkpoint=tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(FileNotFoundError, match="It is a folder of sharded training"):
        Frozen(Net(), checkpoint=tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    model = Net()
    before, path = state_of(model), save(tmp_path, Net().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ValueError, match=r"model\.pt.*bytes, is damaged"):
        load_weights(model, path)
    assert same(before, state_of(model))


EXECUTED: list[str] = []


class Bomb:
    def __reduce__(self) -> Any:
        return EXECUTED.append, ("boom",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, of the legacy file
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    content = {"state_dict": Net().state_dict(), "hyper_parameters": Bomb()}
    path = tmp_path / "model.pt"
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="weights_only=True"):
        load_weights(Net(), path)
    assert not EXECUTED


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds an object of .*Net, and is loaded as plain tensors"):
        load_weights(nn.Linear(3, 2), save(tmp_path, Net()))


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {"epoch": 3}, {"state_dict": [1]}, {1: torch.zeros(2)}, {}]
)
def test_a_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no state dict, but a|holds no weights|does not fit"):
        load_weights(Net(), save(tmp_path, content))


def test_a_state_dict_inside_of_a_file_is_named(tmp_path: Path) -> None:
    content = {"epoch": 3, "options": {}, "model": Net().state_dict()}
    with pytest.raises(ValueError, match=r"Save the one in it: torch\.save\(torch\.load\(path\)\['model'\], path\)"):
        load_weights(Net(), save(tmp_path, content))


def test_buffers_are_loaded_and_weights_keep_their_type_and_place(tmp_path: Path) -> None:
    saved = Net()
    saved(torch.randn(8, 3))
    model = Net().bfloat16()
    pointer = model.head.weight.data_ptr()
    load_weights(model, save(tmp_path, saved.state_dict()))
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.data_ptr() == pointer
    assert int(model.late.num_batches_tracked) == 1


def test_weights_that_count_no_batches_are_loaded(tmp_path: Path) -> None:
    state = Net().state_dict()
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]  # which leaves the versions of the modules that have it
    model = Net()
    model(torch.randn(8, 3))
    load_weights(model, save(tmp_path, state))
    assert torch.equal(model.head.weight, state["head.weight"])
    assert int(model.late.num_batches_tracked) == 1


def test_a_lightning_module_without_forward_is_told_what_to_pass() -> None:
    class Trained(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"has no forward\(\) to call.*teacher\.net"):
        Frozen(Trained())
