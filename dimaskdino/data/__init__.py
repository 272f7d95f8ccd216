"""COCO-format datasets, augmentation, loading, and the built-in shapes data.

Section numbers are those of docs/model.md.
"""
