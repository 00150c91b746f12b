"""The tasks that a model is fine-tuned on: their files, features, heads and metrics."""
