"""Matching, losses, optimisation and the training loop. Section numbers are those of docs/model.md."""
