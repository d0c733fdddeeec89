"""Schedules for training several adapters on one base model."""

from .pack import pack_microbatches
from .schedule import Microbatch, Schedule, ScheduleStats

__all__ = ["Microbatch", "Schedule", "ScheduleStats", "pack_microbatches"]
