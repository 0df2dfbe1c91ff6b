"""What tests of paths, taps and compiled networks share: outputs of every kind, and a network of four layers."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_kd import Distiller, Term


@dataclass
class Fields:
    logits: Any
    hidden: Any = None


class ModelOutput(OrderedDict):
    """Like that of transformers: keys, attributes and integer positions."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Net(nn.Module):
    def __init__(self, width: int = 4, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.act = nn.ReLU(inplace=inplace)
        self.blocks = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.first(x))))


class Counter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def hint(student: str, teacher: str | None = None) -> Term:
    return Term(nn.MSELoss(), student=student, teacher=teacher or student)


def distil(student: nn.Module, teacher: nn.Module, x: Tensor, **terms: Term) -> tuple[dict[str, Tensor], Distiller]:
    distiller = Distiller(terms, teacher)
    distiller.attach(student)
    with distiller.watch() as calls:
        student(x)
    return distiller(calls), distiller
