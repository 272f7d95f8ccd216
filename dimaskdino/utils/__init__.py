"""Helpers that every other package builds on: errors, files, progress, signals, threads, processes."""
