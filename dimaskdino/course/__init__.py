"""The course: exercises' checks, and the making of its notebooks."""
