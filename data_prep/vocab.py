"""Command line: train a vocabulary on a sample of the corpus.

    python -m data_prep.vocab --input books/ --type sentencepiece --size 8000 --output vocab/
    python -m data_prep.vocab --input de/ en/ is/ --smoothing 0.7 --output vocab/

Several corpora or languages, each an --input, can be weighted: with an exponent s each has the share size**s of the
sample (Devlin et al., multilingual BERT, 0.7; Conneau and Lample 2019, section 3.1, 0.5), so that small ones get more
than their size. A corpus smaller than its share is taken whole.

Leaves DIR/spm.model or DIR/vocab.txt, beside run.json (the options) and manifest.json (what came out). Beside a
vocab.txt tokenizer_config.json says whether it is cased; a SentencePiece model says it itself.
The same input and options give the same bytes.
"""

import argparse
import io
import re
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data_prep.cli import run_cli
from data_prep.files import claim_output, finished_file, mark_finished, write_json
from data_prep.text.cleaning import normalise, paragraphs
from data_prep.text.documents import (
    Document,
    add_input_arguments,
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
SCORE_STEPS = 1024  # per unit of a score: exact in sums down to -16384, some 2,000 pieces
ALPHABET_SIZE = 1000  # characters of a WordPiece vocabulary, as in BERT's own; rarer ones become [UNK]


def train_sentencepiece(sample: list[str], size: int, model_type: str = "unigram", lowercase: bool = True) -> bytes:
    """The bytes of a SentencePiece model (`unigram` or `bpe`) with pieces [PAD]=0 [UNK]=1 [CLS]=2 [SEP]=3 [MASK]=4.

    Text is normalised by NFKC and, with `lowercase`, case folding. One thread, since more make the result vary. Scores
    are rounded so that their sums are exact in float32: otherwise rounding decides between "II I" and "I II", and
    differs from that of programs with float64.
    Raises ValueError when the sample is too small for `size`.
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
            max_sentence_length=1 << 16,  # bytes, where SentencePiece skips a paragraph; a sample's pieces are shorter
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].partition(" Please")[0].partition(" Increase")[0]
        limit = f"; ask for {most[1]} at most" if (most := re.search(r"value <= (\d+)", str(error))) else ""
        raise ValueError(f"SentencePiece cannot make --size {size} of this input: {reason}{limit}") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(content.getvalue())
    for piece in model.pieces:
        piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
    return model.SerializeToString(deterministic=True)


def train_wordpiece(sample: list[str], size: int, lowercase: bool = True) -> list[str]:
    """The tokens of a WordPiece vocabulary in the order of `vocab.txt`, special tokens first.

    The library's trainer numbers characters by the order of a hash map and breaks ties by number; naming the
    characters first makes it deterministic. Raises ValueError when the alphabet alone is larger than `size`.
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
    """The most frequent characters, sorted, then those that continue a word, as "##c"."""
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


def _read_sample(args: argparse.Namespace, files: list[Path]) -> list[str]:
    """Cleaned paragraphs of an even sample of the input, read behind a progress bar."""
    corpora = [files] if args.smoothing == 1 else [find_files([path]) for path in args.input]
    shares = smoothed_shares([input_bytes(corpus) for corpus in corpora], args.smoothing)
    sample: list[Document] = []
    with tqdm(desc="sample", total=input_bytes(files), unit="B", unit_scale=True) as bar:
        skip = count_skips(Counter(), bar.write)
        for corpus, share in zip(corpora, shares, strict=True):
            documents = read_documents(corpus, args.format, args.text_key, skip, bar.update)
            sample += sample_documents(documents, int(share * args.sample_mb * 1e6))
    return [block for piece in sample for block in paragraphs(normalise(piece.text), one_a_line=piece.is_split)]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.vocab", description="Train a vocabulary on a sample of a corpus."
    )
    add_input_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder for spm.model or vocab.txt")
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="sentencepiece",
        help="sentencepiece (unigram, the default), sentencepiece-bpe, or BERT's wordpiece",
    )
    parser.add_argument("--size", type=int, default=30_000, metavar="N", help="number of tokens (default: 30000)")
    parser.add_argument("--cased", action="store_true", help="keep capital letters and accents; folded away by default")
    parser.add_argument(
        "--sample-mb",
        type=float,
        default=32.0,
        metavar="MB",
        help="train on an even sample of this much text (default: 32)",
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=1.0,
        metavar="S",
        help="sample each --input by its size to the power of S: 1 as it is (default), 0.7 for many languages, 0 alike",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.smoothing <= 1:
        raise ValueError(f"--smoothing {args.smoothing} is not between 0 (all alike) and 1 (by size)")
    if not 100 <= args.size <= 1_000_000:
        raise ValueError(f"--size {args.size} is not between 100 and 1000000")
    if args.sample_mb <= 0:
        raise ValueError(f"--sample-mb {args.sample_mb} must be more than 0")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    files, input_settings = input_config(args)
    require_text(files, args.format, args.text_key)
    config = {**input_settings, "type": args.type, "size": args.size}
    config |= {"cased": args.cased, "sample_mb": args.sample_mb, "smoothing": args.smoothing}
    if claim_output(args.output, "data_prep.vocab", config) == "done":
        return
    sample = _read_sample(args, files)
    num_bytes = sum(len(text.encode()) for text in sample)
    print(f"training {args.type} with {args.size} tokens on {num_bytes / 1e6:.1f} MB of text")
    if args.type == "wordpiece":
        content = "".join(f"{token}\n" for token in train_wordpiece(sample, args.size, not args.cased)).encode()
    else:
        model_type = "bpe" if args.type == "sentencepiece-bpe" else "unigram"
        content = train_sentencepiece(sample, args.size, model_type, not args.cased)
    path = Path(args.output, TYPES[args.type])
    if args.type == "wordpiece":
        settings = {"do_lower_case": not args.cased, "strip_accents": not args.cased, "tokenize_chinese_chars": True}
        write_json(path.with_name(SETTINGS_FILE), settings)
    with finished_file(path) as file:
        file.write(content)
    tokenizer = load_tokenizer(path)
    write_json(path.with_name("manifest.json"), {"vocab": tokenizer.describe(), "num_sampled_bytes": num_bytes})
    mark_finished(args.output)
    print(f"{path}: {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    run_cli(main)
