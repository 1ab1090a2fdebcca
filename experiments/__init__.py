"""Runnable experiments: compose, build, run, report."""

from experiments.running import sweep
from experiments.tasks import models

__all__ = ["models", "sweep"]
