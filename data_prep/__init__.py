"""Text to tokenised corpus to masked shards. Needs neither a GPU nor torch: numpy and the tokenizer libraries."""
