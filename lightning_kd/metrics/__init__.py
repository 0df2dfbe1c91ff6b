"""Metrics that torchmetrics lacks."""

from lightning_kd.metrics.boundary_f1 import BoundaryF1

__all__ = ["BoundaryF1"]
