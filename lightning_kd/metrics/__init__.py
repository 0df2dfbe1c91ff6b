"""Metrics that torchmetrics lacks."""

from lightning_kd.metrics.anomaly import AnomalyQuality
from lightning_kd.metrics.boundary_f1 import BoundaryF1
from lightning_kd.metrics.retrieval import RetrievalQuality

__all__ = ["AnomalyQuality", "BoundaryF1", "RetrievalQuality"]
