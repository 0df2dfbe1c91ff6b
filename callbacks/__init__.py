"""Callbacks that distil in LightningModules that are not changed, one per file."""

from lightning_kd.callbacks.distillation import Distillation
from lightning_kd.callbacks.ema_teacher import EMATeacher
from lightning_kd.callbacks.mutual_distillation import MutualDistillation

__all__ = ["Distillation", "EMATeacher", "MutualDistillation"]
