"""Callbacks for LightningModules that are not changed, one per file: those that distil, and schedules of their terms."""

from lightning_kd.callbacks.distillation import Distillation
from lightning_kd.callbacks.ema_teacher import EMATeacher
from lightning_kd.callbacks.temperature_scheduler import TemperatureScheduler
from lightning_kd.callbacks.weight_scheduler import WeightScheduler

__all__ = ["Distillation", "EMATeacher", "TemperatureScheduler", "WeightScheduler"]
