"""COCO-format datasets, augmentation, and the built-in shapes data; section numbers are those of docs/model.md."""
