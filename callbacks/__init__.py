"""Callbacks for LightningModules that are not changed, one per file: some distil, some schedule their terms."""

from lightning_kd.callbacks.distillation import Distillation
from lightning_kd.callbacks.ema_teacher import EMATeacher
from lightning_kd.callbacks.mutual_distillation import MutualDistillation
from lightning_kd.callbacks.teacher_cache import TeacherCache
from lightning_kd.callbacks.temperature_scheduler import TemperatureScheduler
from lightning_kd.callbacks.weight_scheduler import WeightScheduler

__all__ = [
    "Distillation",
    "EMATeacher",
    "MutualDistillation",
    "TeacherCache",
    "TemperatureScheduler",
    "WeightScheduler",
]
