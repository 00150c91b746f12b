"""A made-up vocabulary and tokenised corpora for the tests of instances, masks and shards."""

from pathlib import Path

import numpy as np

from data_prep.corpus import Corpus
from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from data_prep.text.vocab_files import SPECIAL_TOKENS

VOCAB_SIZE = 500


def make_tokenizer(folder: Path) -> Tokenizer:
    """WordPiece of 500 entries: the special tokens, then w5 w6 ..., every third one a continuation ##w."""
    words = [f"##w{i}" if i % 3 == 0 else f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCAB_SIZE)]
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n", encoding="utf-8")
    return load_tokenizer(path)


def make_bounds(num_documents: int, *, seed: int = 0, max_sentences: int = 40, max_words: int = 40) -> tuple:
    """(sentence_start, document_start) of documents of 1 .. max_sentences sentences of 1 .. max_words tokens."""
    random = np.random.default_rng(seed)
    num_sentences = random.integers(1, max_sentences + 1, num_documents)
    sentence_lengths = random.integers(1, max_words + 1, num_sentences.sum())
    return tuple(np.concatenate([[0], np.cumsum(lengths)]) for lengths in (sentence_lengths, num_sentences))


def make_corpus(folder: Path, tokenizer: Tokenizer, num_documents: int = 60, *, seed: int = 0) -> Corpus:
    """A corpus of random words whose tokens are stored in `folder`; its manifest names the vocabulary."""
    sentence_start, document_start = make_bounds(num_documents, seed=seed)
    tokens = np.random.default_rng(seed).integers(len(SPECIAL_TOKENS), VOCAB_SIZE, sentence_start[-1]).astype(np.uint16)
    tokens.tofile(Path(folder) / "corpus.bin")
    return Corpus(
        token_ids=np.memmap(Path(folder) / "corpus.bin", np.uint16, mode="r"),
        sentence_start=sentence_start,
        document_start=document_start,
        manifest={"vocab": {"sha256": tokenizer.sha256}},
    )
