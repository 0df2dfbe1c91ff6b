"""Models that the shipped configurations name, and makers of those of other libraries."""

from lightning_kd.models.anomaly import AnomalyNet, Shrunk, SqueezeNetFeatures
from lightning_kd.models.cifar_resnet import CifarResNet
from lightning_kd.models.detectors import FCOS, FasterRCNN, RetinaNet, pyramid
from lightning_kd.models.efficient_ad import (
    EfficientADDetector,
    EfficientADStudent,
    FeatureDescriber,
    PatchDescriber,
    Standardized,
)
from lightning_kd.models.embedder import Embedder, SmallEmbedder
from lightning_kd.models.memory_bank import MemoryBank, PatchCore
from lightning_kd.models.mmdet import MMDetModel
from lightning_kd.models.part_experts import PartExperts
from lightning_kd.models.pose import PoseNet
from lightning_kd.models.reverse_distillation import ResidualReverseDistillation, ReverseDistillation
from lightning_kd.models.side_by_side import SideBySide
from lightning_kd.models.text_embedder import TextEmbedder
from lightning_kd.models.timm import Timm
from lightning_kd.models.torchvision import Torchvision

__all__ = [
    "FCOS",
    "AnomalyNet",
    "CifarResNet",
    "EfficientADDetector",
    "EfficientADStudent",
    "Embedder",
    "FasterRCNN",
    "FeatureDescriber",
    "MMDetModel",
    "MemoryBank",
    "PartExperts",
    "PatchCore",
    "PatchDescriber",
    "PoseNet",
    "ResidualReverseDistillation",
    "RetinaNet",
    "ReverseDistillation",
    "Shrunk",
    "SideBySide",
    "SmallEmbedder",
    "SqueezeNetFeatures",
    "Standardized",
    "TextEmbedder",
    "Timm",
    "Torchvision",
    "pyramid",
]
