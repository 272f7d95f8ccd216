"""COCO AP of one set of predictions and of every stage, and predictions for single images."""
