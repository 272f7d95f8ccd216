"""Run folders, and launching training and notebooks."""

from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.launch import TrainingProcess, project_root
from dimaskdino.runs.live import Summary, show_training

__all__ = ["RunFolder", "Summary", "TrainingProcess", "project_root", "show_training"]
