"""Callbacks that distil in LightningModules that are not changed, one per file."""

from lightning_kd.callbacks.distillation import Distillation

__all__ = ["Distillation"]
