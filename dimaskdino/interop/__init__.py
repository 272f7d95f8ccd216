"""The model in other tools: detectron2, the Hugging Face Hub and exported files. Each is optional."""
