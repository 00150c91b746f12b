"""From a checkpoint to scores: tasks and their readers, heads, the one fine-tuning loop, predictions, export, baselines,
metrics and the report.
"""
