"""Build the chapters, the documentation site and the assignments from their sources."""
