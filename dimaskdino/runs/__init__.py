"""Run folders, training processes, papermill, and what notebooks show while they run."""

from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.live import Summary, show_training
from dimaskdino.runs.processes import TrainingProcess, project_root

__all__ = ["RunFolder", "Summary", "TrainingProcess", "project_root", "show_training"]
