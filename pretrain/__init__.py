"""Shards -> checkpoints: a tensor-parallel BERT trained by DeepSpeed with an exact LAMB."""
