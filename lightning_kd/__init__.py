"""Task-specific knowledge distillation for PyTorch Lightning: one engine behind a callback, a CLI and adapters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_kd.distiller import Distiller
from lightning_kd.term import Term

if TYPE_CHECKING:
    from lightning_kd import functional, losses, projectors, schedules, teachers
    from lightning_kd.callbacks import Distillation
    from lightning_kd.module import DistillationModule

__version__ = "0.1.0"

__all__ = [
    "Distillation",
    "DistillationModule",
    "Distiller",
    "Term",
    "functional",
    "losses",
    "projectors",
    "schedules",
    "teachers",
]

_DOORS = {"Distillation": "lightning_kd.callbacks", "DistillationModule": "lightning_kd.module"}


def __getattr__(name: str) -> Any:
    """Opens the doors late: the core imports neither callbacks nor tasks."""
    if name in _DOORS:
        return getattr(import_module(_DOORS[name]), name)
    if name in __all__:
        return import_module(f"lightning_kd.{name}")
    raise AttributeError(f"module 'lightning_kd' has no attribute {name!r}")
