"""Task adapters, one per file; ``TaskAdapter`` is what a new one derives from."""

from lightning_kd.tasks.anomaly_detection import AnomalyDetection
from lightning_kd.tasks.classification import Classification
from lightning_kd.tasks.detection import Detection
from lightning_kd.tasks.efficient_ad import EfficientAD
from lightning_kd.tasks.label_assisted import LabelAssisted
from lightning_kd.tasks.mm_pseudo_boxes import MMPseudoBoxes
from lightning_kd.tasks.mmdetection import MMDetection
from lightning_kd.tasks.pose import Pose
from lightning_kd.tasks.pseudo_boxes import PseudoBoxes
from lightning_kd.tasks.retrieval import Retrieval
from lightning_kd.tasks.segmentation import Segmentation

from lightning_kd.task import TaskAdapter

__all__ = [
    "AnomalyDetection",
    "Classification",
    "Detection",
    "EfficientAD",
    "LabelAssisted",
    "MMDetection",
    "MMPseudoBoxes",
    "Pose",
    "PseudoBoxes",
    "Retrieval",
    "Segmentation",
    "TaskAdapter",
]
