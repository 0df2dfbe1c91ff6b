"""Distillation losses: ``loss(student, teacher[, target, mask]) -> scalar``, one per file."""

from lightning_kd.losses.aloss import ALoss
from lightning_kd.losses.at import AT
from lightning_kd.losses.bdkd import BDKD
from lightning_kd.losses.bpkd import BPKD
from lightning_kd.losses.bsd import BSD
from lightning_kd.losses.cirkd import CIRKD
from lightning_kd.losses.crd import CRD
from lightning_kd.losses.ctkd import CTKD
from lightning_kd.losses.cwd import CWD
from lightning_kd.losses.dist import DIST
from lightning_kd.losses.dkd import DKD
from lightning_kd.losses.dts import DTS
from lightning_kd.losses.efficient_ad import EfficientAD
from lightning_kd.losses.fgd import FGD
from lightning_kd.losses.fitnet import FitNet
from lightning_kd.losses.giou import GIoU
from lightning_kd.losses.ifvd import IFVD
from lightning_kd.losses.in_batch import InBatch
from lightning_kd.losses.info_nce import InfoNCE
from lightning_kd.losses.jointwise import Jointwise
from lightning_kd.losses.kd import KD
from lightning_kd.losses.ld import LD
from lightning_kd.losses.leaf import LEAF
from lightning_kd.losses.margin_mse import MarginMSE
from lightning_kd.losses.matryoshka import Matryoshka
from lightning_kd.losses.mgd import MGD
from lightning_kd.losses.nkd import NKD
from lightning_kd.losses.ofa import OFA
from lightning_kd.losses.pixelwise import Pixelwise
from lightning_kd.losses.pkd import PKD
from lightning_kd.losses.pkt import PKT
from lightning_kd.losses.pld import PLD
from lightning_kd.losses.qfl import QFL
from lightning_kd.losses.rd4ad import RD4AD
from lightning_kd.losses.region_bsd import RegionBSD
from lightning_kd.losses.rkd import RKD
from lightning_kd.losses.sample_temperature import SampleTemperature
from lightning_kd.losses.seed import SEED
from lightning_kd.losses.skd import SKD
from lightning_kd.losses.sp import SP
from lightning_kd.losses.standardize import Standardized
from lightning_kd.losses.stfpm import STFPM
from lightning_kd.losses.vid import VID

__all__ = [
    "AT",
    "BDKD",
    "BPKD",
    "BSD",
    "CIRKD",
    "CRD",
    "CTKD",
    "CWD",
    "DIST",
    "DKD",
    "DTS",
    "FGD",
    "IFVD",
    "KD",
    "LD",
    "LEAF",
    "MGD",
    "NKD",
    "OFA",
    "PKD",
    "PKT",
    "PLD",
    "QFL",
    "RD4AD",
    "RKD",
    "SEED",
    "SKD",
    "SP",
    "STFPM",
    "VID",
    "ALoss",
    "EfficientAD",
    "FitNet",
    "GIoU",
    "InBatch",
    "InfoNCE",
    "Jointwise",
    "MarginMSE",
    "Matryoshka",
    "Pixelwise",
    "RegionBSD",
    "SampleTemperature",
    "Standardized",
]
