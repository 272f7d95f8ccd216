"""Run folders, and launching training and notebooks."""

from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.launch import TrainingProcess, project_root
from dimaskdino.runs.live import show_training

__all__ = ["RunFolder", "TrainingProcess", "project_root", "show_training"]
