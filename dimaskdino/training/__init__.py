"""Matching, losses, optimisation and the training loop; section numbers are those of docs/model.md."""
