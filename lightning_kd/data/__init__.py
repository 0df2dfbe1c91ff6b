"""Data of the shipped configurations, and readers of the usual folders."""

from lightning_kd.data.anomaly_folder import AnomalyFolder
from lightning_kd.data.box_scenes import BoxScenes
from lightning_kd.data.coco import CocoJson
from lightning_kd.data.cranfield import Cranfield
from lightning_kd.data.digits_cifar import CIFAR10_CLASSES, Cifar10, Digits
from lightning_kd.data.image_mask_folder import ImageMaskFolder
from lightning_kd.data.keypoint_csv import KeypointCsv
from lightning_kd.data.keypoint_scenes import KeypointScenes
from lightning_kd.data.mask_scenes import MaskScenes
from lightning_kd.data.replayed import Replayed
from lightning_kd.data.tensor_images import RandomShift
from lightning_kd.data.textures import Textures
from lightning_kd.data.unrelated import UnrelatedImages
from lightning_kd.data.unseen_classes import Omniglot, UnseenDigits
from lightning_kd.data.voc import VocFolder

__all__ = [
    "CIFAR10_CLASSES",
    "AnomalyFolder",
    "BoxScenes",
    "Cifar10",
    "CocoJson",
    "Cranfield",
    "Digits",
    "ImageMaskFolder",
    "KeypointCsv",
    "KeypointScenes",
    "MaskScenes",
    "Omniglot",
    "RandomShift",
    "Replayed",
    "Textures",
    "UnrelatedImages",
    "UnseenDigits",
    "VocFolder",
]
