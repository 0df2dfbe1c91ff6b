"""Task adapters, one per file; ``TaskAdapter`` is what a new one derives from."""

from lightning_kd.task import TaskAdapter
from lightning_kd.tasks.classification import Classification

__all__ = ["Classification", "TaskAdapter"]
