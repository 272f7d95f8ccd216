"""Time and memory of the model, the data loader, COCO AP and the explorers. Each module is a command."""
