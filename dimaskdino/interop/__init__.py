"""The model in other tools: detectron2, supervision and the Hugging Face Hub. Each is optional."""
