"""Command line: train a vocabulary on a sample of the corpus.

    python -m data_prep.vocab --input books/ --type sentencepiece --size 8000 --output vocab/
    python -m data_prep.vocab --input de/ en/ is/ --smoothing 0.7 --output vocab/

Several corpora or languages, one per value of --input, can be weighted: with --smoothing s, each gets a share of the
sample proportional to size**s, which over-samples small ones (s = 0.7 in multilingual BERT, Devlin et al.; 0.5 in
Conneau and Lample 2019, section 3.1). A corpus smaller than its share is used completely.

The output folder holds spm.model or vocab.txt, run.json (the options) and manifest.json (the result). For a vocab.txt,
tokenizer_config.json says whether it is cased; a SentencePiece model contains that itself. The same input and options
give the same bytes.
"""

import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_prep.cli import InputOptions, between, number, option, parse, run_cli, share
from data_prep.files import claim_output, finished_file, mark_finished, write_json
from data_prep.text.cleaning import normalise, paragraphs
from data_prep.text.documents import (
    Document,
    count_skips,
    find_files,
    input_bytes,
    input_config,
    read_documents,
    require_text,
    sample_documents,
)
from data_prep.text.tokenizer import bert_pipeline, load_tokenizer
from data_prep.text.vocab_files import SETTINGS_FILE, SPECIAL_TOKENS, Folding

TYPES = {"sentencepiece": "spm.model", "sentencepiece-bpe": "spm.model", "wordpiece": "vocab.txt"}
SCORE_STEPS = 1024  # per unit of a score; float32 sums are exact down to -16384, some 2,000 pieces
ALPHABET_SIZE = 1000  # characters of a WordPiece vocabulary, as in BERT's own; rarer ones become [UNK]


@dataclass(frozen=True, kw_only=True)
class VocabOptions(InputOptions):
    """Train a vocabulary on a sample of a corpus."""

    output: Path = option("a new folder for spm.model or vocab.txt", metavar="DIR")
    type: str = option("unigram, BPE or WordPiece model", default="sentencepiece", choices=tuple(TYPES))
    size: int = option("number of tokens", default=30_000, type=between(100, 1_000_000))
    cased: bool = option("keep capital letters and accents, which are folded away by default", default=False)
    sample_mb: float = option("MB of text to train on, an even sample", default=32.0, type=number(above=0))
    smoothing: float = option(
        "sample each --input in proportion to its size to the power of X: 1 keeps the proportions, 0.7 is usual for "
        "many languages, 0 gives all of them the same share",
        default=1.0,
        type=share,
    )


def main(argv: list[str] | None = None) -> None:
    options = parse(VocabOptions, "data_prep.vocab", argv)
    files, config = input_config(options)
    require_text(files, options.format, options.text_key)
    config |= {name: getattr(options, name) for name in ("type", "size", "cased", "sample_mb", "smoothing")}
    if claim_output(options.output, "data_prep.vocab", config) == "done":
        return
    sample = _read_sample(options, files)
    num_bytes = sum(len(text.encode()) for text in sample)
    print(f"training {options.type} with {options.size} tokens on {num_bytes / 1e6:.1f} MB of text")
    path, is_uncased = options.output / TYPES[options.type], not options.cased
    if options.type == "wordpiece":
        content = "".join(f"{token}\n" for token in train_wordpiece(sample, options.size, is_uncased)).encode()
        settings = {"do_lower_case": is_uncased, "strip_accents": is_uncased, "tokenize_chinese_chars": True}
        write_json(path.with_name(SETTINGS_FILE), settings)
    else:
        model_type = "bpe" if options.type == "sentencepiece-bpe" else "unigram"
        content = train_sentencepiece(sample, options.size, model_type, is_uncased)
    with finished_file(path) as file:
        file.write(content)
    tokenizer = load_tokenizer(path)
    write_json(path.with_name("manifest.json"), {"vocab": tokenizer.describe(), "num_sampled_bytes": num_bytes})
    mark_finished(options.output)
    print(f"{path}: {tokenizer.vocab_size} tokens")


def train_sentencepiece(sample: list[str], size: int, model_type: str = "unigram", lowercase: bool = True) -> bytes:
    """The bytes of a SentencePiece model (`unigram` or `bpe`) with pieces [PAD]=0 [UNK]=1 [CLS]=2 [SEP]=3 [MASK]=4.

    Text is normalised by NFKC and, with `lowercase`, case folding. Training uses one thread, because the result varies
    with more. Scores are rounded so that their sums are exact in float32: otherwise rounding errors would decide
    between "II I" and "I II", and a program with float64 could decide differently.
    Raises ValueError if the sample is too small for `size`.
    """
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    content = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=content,
            model_type=model_type,
            vocab_size=size,
            pad_id=0,
            pad_piece="[PAD]",
            unk_id=1,
            unk_piece="[UNK]",
            bos_id=-1,
            eos_id=-1,
            control_symbols=list(SPECIAL_TOKENS[2:]),
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            max_sentence_length=1 << 16,  # bytes; SentencePiece skips longer paragraphs, and a sample has none
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].partition(" Please")[0].partition(" Increase")[0]
        limit = f"; ask for at most {most[1]}" if (most := re.search(r"value <= (\d+)", str(error))) else ""
        raise ValueError(f"SentencePiece cannot make --size {size} of this input: {reason}{limit}") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(content.getvalue())
    for piece in model.pieces:
        piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
    return model.SerializeToString(deterministic=True)


def train_wordpiece(sample: list[str], size: int, lowercase: bool = True) -> list[str]:
    """The tokens of a WordPiece vocabulary in the order of `vocab.txt`, special tokens first.

    The library's trainer numbers characters in the order of a hash map and breaks ties by these numbers. Passing the
    characters as its first tokens makes it deterministic. Raises ValueError if the alphabet is larger than `size`.
    """
    from tokenizers.trainers import WordPieceTrainer

    pipeline = bert_pipeline(SPECIAL_TOKENS, Folding(lowercase, lowercase))
    characters = _alphabet(sample, pipeline)
    first_tokens = [*SPECIAL_TOKENS, *characters]
    if size < len(first_tokens):
        raise ValueError(
            f"--size {size} is less than the {len(first_tokens)} special tokens and characters; ask for more"
        )
    trainer = WordPieceTrainer(
        vocab_size=size,
        special_tokens=first_tokens,
        initial_alphabet=[c for c in characters if len(c) == 1],
        limit_alphabet=sum(len(c) == 1 for c in characters),
        show_progress=False,
    )
    pipeline.train_from_iterator(sample, trainer)
    ids = pipeline.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def _alphabet(sample: list[str], pipeline) -> list[str]:
    """The most frequent characters, sorted; then "##c" for each of them that occurs after the start of a word."""
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in Counter(word for text in sample for word in text.split()).items():
        for part, _ in pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str(word)):
            inside.update(part[1:])
            for character in part:
                counts[character] += count
    kept = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET_SIZE])
    return kept + [f"##{c}" for c in kept if c in inside]


def smoothed_shares(sizes: list[int], smoothing: float) -> list[float]:
    """Shares of the sample, each proportional to size**smoothing; their sum is 1."""
    weights = [size**smoothing for size in sizes]
    return [weight / sum(weights) for weight in weights]


def _read_sample(options: VocabOptions, files: list[Path]) -> list[str]:
    """Cleaned paragraphs of an even sample of the input, read with a progress bar."""
    corpora = [files] if options.smoothing == 1 else [find_files([path]) for path in options.input]
    shares = smoothed_shares([input_bytes(corpus) for corpus in corpora], options.smoothing)
    sample: list[Document] = []
    with tqdm(desc="sample", total=input_bytes(files), unit="B", unit_scale=True) as bar:
        skip = count_skips(Counter(), bar.write)
        for corpus, portion in zip(corpora, shares, strict=True):
            documents = read_documents(corpus, options.format, options.text_key, skip, bar.update)
            sample += sample_documents(documents, int(portion * options.sample_mb * 1e6))
    return [block for piece in sample for block in paragraphs(normalise(piece.text), one_a_line=piece.is_split)]


if __name__ == "__main__":
    run_cli(main)
