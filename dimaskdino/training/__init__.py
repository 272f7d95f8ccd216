"""Matching, losses, optimisation and the training loop."""
