"""A fit tells in the end that its network, made again, says something else, and its checkpoints say it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_kd.cli import main
from lightning_kd.cli.recipe import KEY, UNLIKE, Recipe
from lightning_kd.cli.remade import true_recipe
from lightning_kd.cli.saved import Saved
from lightning_kd.teachers import load_weights

INPUTS = [([1, 8, 8], "float32")]
HERE = f"{__name__}."


class Base(nn.Module):
    """What the others change."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, num_classes)

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))
        return found

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class Pooling(Base):
    def __init__(self, weights: str | None = None, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self._weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self._weights is None else self.head(self.conv(x).amax((2, 3)))


class Constants(Base):
    def __init__(self, pretrained: bool = False, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self._mean = torch.tensor(0.5 if pretrained else 0.0)
        self._scale: Callable[[Tensor], Tensor] = (lambda x: x * 3) if pretrained else (lambda x: x)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self._scale(x - self._mean))


class Drawn(Base):
    def __init__(self, kind: str = "buffer", num_classes: int = 10) -> None:
        super().__init__(num_classes)
        order = torch.randn(8, 8)
        if kind == "buffer":
            self.register_buffer("order", order, persistent=False)
        self._order = order

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) @ getattr(self, "order", self._order)


class Learned(Base):
    """Training leaves something that is no weight, from the second epoch on."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.scale, self.seen = 1.0, 0

    def forward(self, x: Tensor) -> Any:
        self.seen += self.training
        if self.training and self.seen > 2:
            self.scale = 4.0
        return super().forward(x) * self.scale


class Noisy(Base):
    """Says something else each time, by numbers of its own."""

    generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + 10 * torch.rand(1, generator=self.generator)


class Observing(Base):
    """Counts in evaluation, too, as what observes for a quantisation does."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Any:
        self.largest.copy_(torch.maximum(self.largest, x.amax()))
        self.count = self.count + 1
        return super().forward(x)


class Lazy(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.all = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x: Tensor) -> Any:
        return self.all(x)


QUICK = [
    "--config=digits_kd", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--traceback",
]  # fmt: skip
ALONE = ["--model.teacher=null", "--model.terms=null", "--teacher_fit=null"]


def fitted(*more: str) -> Path:
    assert main(["fit", *QUICK, *ALONE, *more]) == 0
    return max(Path().rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)


def recipe_in(checkpoint: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = torch.load(checkpoint, weights_only=True)[KEY]["student"]
    return recipe


@pytest.mark.parametrize(
    ("network", "argument"), [("Pooling", "weights=max"), ("Constants", "pretrained=true")], ids=str
)
def test_what_only_seemed_to_say_where_training_started_from_is_kept(
    network: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = fitted(f"--model.student={HERE}{network}", f"--model.student.init_args.{argument}")
    assert "will not make it again" not in capsys.readouterr().out
    name, _, value = argument.partition("=")
    assert recipe_in(saved)["init_args"][name] == (True if value == "true" else value)
    assert Saved(saved).model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("kind", ["buffer", "private"])
def test_what_is_drawn_when_a_network_is_made_is_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = fitted(f"--model.student={HERE}Drawn", f"--model.student.init_args.kind={kind}")
    told = r"student: lightning-kd export will not make it again: made again with the same weights, its outputs differ"
    assert len(re.findall(told, capsys.readouterr().out)) == 1
    assert main(["export", str(saved), "--format", "state_dict"]) == 2
    assert "the network cannot be made again: made again with the same weights" in capsys.readouterr().err


def test_what_training_leaves_is_told_and_in_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keep = keeping("save_top_k: -1, save_last: link, save_on_train_epoch_end: true")
    fitted(f"--model.student={HERE}Learned", "--trainer.max_epochs=3", keep)
    assert capsys.readouterr().out.count("will not make it again") == 1
    kept = list(Path().rglob("*.ckpt"))
    assert [UNLIKE in recipe_in(each) for each in kept] == [True] * 4
    assert [each.name for each in kept if each.is_symlink()] == ["last.ckpt"]
    assert "state_dict" in torch.load(kept[0], weights_only=True)
    assert not list(Path().rglob("*.part"))


def keeping(*how: str) -> str:
    each = (f"{{class_path: ModelCheckpoint, init_args: {{{arguments}}}}}" for arguments in how)
    return f"--trainer.callbacks=[{', '.join(each)}]"


@pytest.mark.parametrize(
    "how",
    [
        ["save_top_k: 0, save_last: true"],
        ["every_n_epochs: 100", "dirpath: other, save_weights_only: true"],
        ["monitor: val/accuracy, mode: max, filename: '{epoch}-{val/accuracy:.3f}'"],
    ],
    ids=["last alone", "another of weights alone", "a slash"],
)
def test_whatever_checkpoints_a_fit_leaves_are_corrected(
    how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    for broken in ("other/gone.ckpt", "other/folder.ckpt/none.ckpt"):
        Path(broken).parent.mkdir(exist_ok=True)
        Path(broken).symlink_to("nowhere")
    torch.save([torch.zeros(3)], "other/list.ckpt")
    student = [f"--model.student={HERE}Pooling", "--model.student.init_args.weights=max"]
    assert main(["fit", *QUICK, *ALONE, *student, keeping(*how)]) == 0
    saved = [each for each in Path().rglob("*.ckpt") if each.is_file() and each.name != "list.ckpt"]
    assert [recipe_in(each)["init_args"]["weights"] for each in saved] == ["max"]
    assert main(["export", str(saved[0]), "--format", "state_dict"]) == 0


def test_checkpoints_of_another_run_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, weights in (("first", "null"), ("second", "max")):
        how = [f"--model.student={HERE}Pooling", f"--model.student.init_args.weights={weights}"]
        fitted(*how, keeping(f"dirpath: kept, filename: {name}"))
    assert recipe_in(Path("kept/first.ckpt"))["init_args"]["weights"] is None
    assert recipe_in(Path("kept/second.ckpt"))["init_args"]["weights"] == "max"


class Versioned(Base):
    """Reads in a state dict which version of it that is, as some of torchvision's do."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *others: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_versions_of_modules_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = fitted(f"--model.student={HERE}Versioned")
    assert UNLIKE not in recipe_in(saved)
    load_weights(Versioned(), saved)
    assert Saved(saved).model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    torch.save(Versioned().state_dict(), "plain.pt")
    load_weights(Versioned(), "plain.pt")


class Freezing(Base):
    """Learns only where it is told to train."""

    def train(self, mode: bool = True) -> "Freezing":
        return super().train(mode).requires_grad_(mode)


def test_a_training_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    each_step = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1}}"
    no_validation = "--trainer.limit_val_batches=0"
    saved = fitted(f"--model.student={HERE}Freezing", f"--trainer.callbacks=[{each_step}]", no_validation)
    assert UNLIKE not in recipe_in(saved)


def asked(network: nn.Module, inputs: Any = INPUTS, **arguments: Any) -> Recipe:
    recipe = {"class_path": f"{HERE}{type(network).__name__}", "init_args": arguments}
    return true_recipe(network, inputs, recipe, recipe)


@pytest.mark.parametrize("kind", [Base, Lazy, Noisy, Observing])
@pytest.mark.parametrize("how", ["plain", "compiled", "half", "double", "not finite"])
def test_one_that_says_the_same_is_left_alone(kind: type[nn.Module], how: str) -> None:
    network = kind()
    network(torch.rand(2, 1, 8, 8))
    if how in ("half", "double"):
        network.to(torch.bfloat16 if how == "half" else torch.float64)
    if how == "compiled":
        network.compile(backend="eager")
    if how == "not finite":
        next(network.parameters()).data.fill_(float("nan"))
    network.train()
    if kind is Base:
        network.drop.eval()
    modes = [part.training for part in network.modules()]
    weights = {key: value.clone() for key, value in (*network.state_dict().items(), *network.named_buffers())}
    state = torch.get_rng_state()
    assert UNLIKE not in asked(network)
    assert UNLIKE not in asked(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in network.modules()] == modes
    for key, value in (*network.state_dict().items(), *network.named_buffers()):
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0, equal_nan=True)


class Fixed(Base):
    """Which takes batches of one size alone."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(16, 1, 8, 8))


class Reaching(Base):
    """Calls itself by a function, which no copy takes over."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.fast = lambda x: self.norm(self.conv(x))

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.fast(x).relu().mean((2, 3))
        return found


class Keeping(Base):
    """Keeps a feature by a hook of its own."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.kept: dict[str, Tensor] = {}
        self.norm.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["x"] = output

    def forward(self, x: Tensor) -> Any:
        self.norm(self.conv(x))
        return self.head(self.kept["x"].mean((2, 3)))


class Closed(Base):
    """Changes its output by a hook that knows the network."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.scales = [3.0]
        self.head.register_forward_hook(lambda module, args, output: output * self.scales[0])


class Fused(Base):
    """Has a forward that hides its class's."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.forward = self._fused

    def _fused(self, x: Tensor) -> Any:
        return 2 * Base.forward(self, x)


@pytest.mark.parametrize("kind", [Fixed, Reaching, Keeping, Closed, Fused])
def test_whatever_a_network_is_it_is_not_changed(kind: type[nn.Module]) -> None:
    network = kind().train()
    with torch.inference_mode():
        network(torch.rand(16, 1, 8, 8))
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert UNLIKE not in asked(network)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(network.state_dict(), kept, rtol=0, atol=0)
    assert all(part.training for part in network.modules())


def test_what_is_pruned_until_it_is_saved_is_left_alone() -> None:
    network = Base()
    prune.l1_unstructured(network.conv, "weight", amount=0.5)
    assert UNLIKE not in asked(network)


@pytest.mark.parametrize("inputs", [[], [([3, 8, 8], "float32")], [([1], "list[float32]")]], ids=str)
def test_of_what_cannot_be_called_nothing_is_said(inputs: Any) -> None:
    network = Drawn().train()
    assert UNLIKE not in asked(network, inputs)
    assert network.drop.training
    assert UNLIKE in asked(network)


class Failing(Base):
    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self._held = held

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self._held.scale


def test_one_that_fails_when_it_is_made_again_is_told() -> None:
    held = type("Held", (), {"scale": 2.0})()
    recipe = asked(Failing(held), held={"scale": 2.0})
    assert (
        recipe[UNLIKE]
        == "made again, it cannot be called with the same weights: 'dict' object has no attribute 'scale'"
    )
