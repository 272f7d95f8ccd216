"""Inspect a model: its intermediate results for one image, and diagnostics over many images."""
