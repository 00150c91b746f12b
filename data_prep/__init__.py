"""From text to a tokenised corpus to masked shards, with numpy and the tokenizer libraries; no GPU and no torch."""
