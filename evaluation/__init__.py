"""From a checkpoint to scores: tasks, the fine-tuning loop, predictions, export, baselines and the report."""
