"""Run folders, and launching training and notebooks."""
