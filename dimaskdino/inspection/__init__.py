"""What a model did with one image, and diagnostics over many images."""
