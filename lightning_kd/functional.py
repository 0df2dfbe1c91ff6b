"""The losses as pure functions; each is documented by its module in ``lightning_kd.losses``."""

from lightning_kd.losses._bank import crd_nce
from lightning_kd.losses.aloss import aloss
from lightning_kd.losses.at import at
from lightning_kd.losses.bdkd import bdkd
from lightning_kd.losses.bpkd import bpkd
from lightning_kd.losses.bsd import bsd
from lightning_kd.losses.cirkd import cirkd
from lightning_kd.losses.crd import crd
from lightning_kd.losses.cwd import cwd
from lightning_kd.losses.dist import dist
from lightning_kd.losses.dkd import dkd
from lightning_kd.losses.efficient_ad import efficient_ad
from lightning_kd.losses.fgd import fgd
from lightning_kd.losses.fitnet import fitnet
from lightning_kd.losses.giou import giou
from lightning_kd.losses.ifvd import ifvd
from lightning_kd.losses.info_nce import info_nce
from lightning_kd.losses.kd import kd
from lightning_kd.losses.ld import ld
from lightning_kd.losses.leaf import leaf
from lightning_kd.losses.margin_mse import margin_mse
from lightning_kd.losses.mgd import mgd
from lightning_kd.losses.nkd import nkd
from lightning_kd.losses.ofa import ofa
from lightning_kd.losses.pkd import pkd
from lightning_kd.losses.pkt import pkt
from lightning_kd.losses.pld import pld
from lightning_kd.losses.qfl import qfl
from lightning_kd.losses.rd4ad import rd4ad
from lightning_kd.losses.region_bsd import region_bsd
from lightning_kd.losses.rkd import rkd
from lightning_kd.losses.seed import seed
from lightning_kd.losses.skd import skd
from lightning_kd.losses.sp import sp
from lightning_kd.losses.standardize import standardize
from lightning_kd.losses.stfpm import stfpm
from lightning_kd.losses.vid import vid

__all__ = [
    "aloss",
    "at",
    "bdkd",
    "bpkd",
    "bsd",
    "cirkd",
    "crd",
    "crd_nce",
    "cwd",
    "dist",
    "dkd",
    "efficient_ad",
    "fgd",
    "fitnet",
    "giou",
    "ifvd",
    "info_nce",
    "kd",
    "ld",
    "leaf",
    "margin_mse",
    "mgd",
    "nkd",
    "ofa",
    "pkd",
    "pkt",
    "pld",
    "qfl",
    "rd4ad",
    "region_bsd",
    "rkd",
    "seed",
    "skd",
    "sp",
    "standardize",
    "stfpm",
    "vid",
]
