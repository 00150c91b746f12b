"""From a file of a corpus to token ids: readers, cleaning, filters, sentences, tokenizer."""
