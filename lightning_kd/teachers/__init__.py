"""Teachers: where the other side's knowledge comes from."""

from lightning_kd.teachers.base import Teacher
from lightning_kd.teachers.cached import Cached
from lightning_kd.teachers.ema import EMA
from lightning_kd.teachers.ensemble import Ensemble
from lightning_kd.teachers.frozen import Frozen
from lightning_kd.teachers.itself import Itself
from lightning_kd.teachers.label_noise import LabelNoise
from lightning_kd.teachers.past import PastSelf
from lightning_kd.teachers.peers import Peers
from lightning_kd.teachers.renormalize import Renormalize
from lightning_kd.teachers.router import Router
from lightning_kd.teachers.weights import load_weights

__all__ = [
    "EMA",
    "Cached",
    "Ensemble",
    "Frozen",
    "Itself",
    "LabelNoise",
    "PastSelf",
    "Peers",
    "Renormalize",
    "Router",
    "Teacher",
    "load_weights",
]
