"""What only a maintainer runs: benchmarks, the course's build, and the numbers and figures of README and docs."""
