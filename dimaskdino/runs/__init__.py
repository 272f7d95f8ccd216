"""Run folders, training processes, papermill, and what notebooks show while they run."""

from dimaskdino.runs.folder import RunFolder, distinct_names
from dimaskdino.runs.notebooks import Summary, show_training
from dimaskdino.runs.processes import TrainingProcess, project_root

__all__ = ["RunFolder", "Summary", "TrainingProcess", "distinct_names", "project_root", "show_training"]
