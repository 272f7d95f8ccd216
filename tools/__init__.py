"""Programs for maintainers: benchmarks, the course's build, and the numbers and figures of README and docs."""
