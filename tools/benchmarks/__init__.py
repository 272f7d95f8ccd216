"""Time and memory of the model, the data loader and COCO AP, also beside other detectors. Each module is a command."""
