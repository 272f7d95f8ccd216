"""COCO AP of one set of predictions and of every stage; speed, FLOPs and memory."""
