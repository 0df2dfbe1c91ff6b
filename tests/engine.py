"""What tests of the engine share: two networks that meet, a term between them, a call that is watched."""

from typing import Any

from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def watched(distiller: Distiller, student: nn.Module, *args: Any, **kwargs: Any) -> Any:
    distiller.attach(student)
    with distiller.watch() as calls:
        student(*args, **kwargs)
    return calls


def hint(loss: nn.Module | None = None, **kwargs: Any) -> Term:
    return Term(loss or losses.FitNet(), **{"student": "stem", "teacher": "stem"} | kwargs)
