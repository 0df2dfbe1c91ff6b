"""Schedules: how a number changes over a run, as a function of the fraction of the run that is done.

A schedule is called with a number from 0 (first step) to 1 (end of the run), so that it means the same
for every length of training.
"""

from lightning_kd.schedules.base import Custom, Moment, Schedule
from lightning_kd.schedules.parts import ByEpoch, WarmUp
from lightning_kd.schedules.points import Piecewise, Step
from lightning_kd.schedules.ramps import Constant, Cosine, Exponential, Linear

__all__ = [
    "ByEpoch",
    "Constant",
    "Cosine",
    "Custom",
    "Exponential",
    "Linear",
    "Moment",
    "Piecewise",
    "Schedule",
    "Step",
    "WarmUp",
]
