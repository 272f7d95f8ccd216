"""Published checkpoints and configurations, and the bridge to detectron2."""
