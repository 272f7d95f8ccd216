"""Files, progress, signals, threads, processes and errors: what every other package builds on."""
