"""Studies: variants of a model trained with several seeds, compared with intervals, and reported."""
