"""From a checkpoint to scores: tasks and their readers, heads, the one fine-tuning loop, predictions and export,
baselines, metrics and the report.
"""
