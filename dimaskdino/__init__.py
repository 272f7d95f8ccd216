"""DI-MaskDINO: joint object detection and instance segmentation, to read, to ablate and to teach."""

__version__ = "0.1.0"
