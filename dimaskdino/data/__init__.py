"""COCO-format datasets, augmentation, and the built-in shapes data."""
