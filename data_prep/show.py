"""CLI: look into a shard folder: records as readable text, statistics as a table and plots, checksums.

A masked token is shown as [MASK→cat], a token replaced at random as [dog→cat], one that is predicted but was left as
[=cat].
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from data_prep.cli import run_cli
from data_prep.shards import Records, Shards, entropy, unigram_counts, verify
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

PAIR_NAMES = {
    "nsp": {0: "B follows A", 1: "B is from another document"},
    "sop": {0: "A and B in order", 1: "A and B swapped"},
    "none": {-1: "no pair task"},
}


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    shards = Shards(args.folder)
    if args.records < 0 or args.first < 0:
        raise ValueError(f"--records {args.records} and --first {args.first} must not be negative")
    if args.verify:
        verify(shards, progress=partial(tqdm, desc="verify", unit="shard"))
        print(f"all {len(shards.manifest['shards'])} shards have the bytes that were written")
    if args.stats or args.plots:
        statistics = collect_statistics(shards)
        if args.stats:
            print(tabulate(statistics_table(shards, statistics), disable_numparse=True))
        if args.plots:
            for path in plot_statistics(statistics, args.plots):
                print(path)
    num_records = args.records if args.records else 0 if args.stats or args.plots or args.verify else 3
    if num_records:
        tokenizer = load_tokenizer(shards.vocab_file)
        for index in range(args.first, min(args.first + num_records, shards.num_sequences)):
            print(format_record(shards, index, tokenizer))


def format_record(shards: Shards, index: int, tokenizer: Tokenizer) -> str:
    """Sequence `index` as text: a headline, then a line for each segment with its predictions marked."""
    record = shards.gather(np.array([index]))
    pair = PAIR_NAMES[shards.manifest["config"]["pair_task"]][int(record.pair_labels[0])]
    headline = f"#{index}: {record.lengths[0]} tokens, {record.num_predictions[0]} predictions, {pair}"
    pieces = [tokenizer.tokens[token] for token in record.token_ids]
    for position, label in zip(record.masked_lm_positions, record.masked_lm_labels, strict=True):
        shown, original = pieces[position].strip("[]"), tokenizer.tokens[label]
        pieces[position] = f"[={original}]" if record.token_ids[position] == label else f"[{shown}→{original}]"
    originals = [tokenizer.tokens[token] for token in record.original_token_ids()]
    spaced = [_space_before(word, tokenizer.kind) + _bare(piece) for word, piece in zip(originals, pieces, strict=True)]
    split = int(record.segment_b_start[0])
    segments = [f"  {name} {''.join(part)}" for name, part in (("A", spaced[:split]), ("B", spaced[split:])) if part]
    return "\n".join([headline, *segments])


def _space_before(piece: str, kind: str) -> str:
    """A word-piece that continues a word begins with ##, a SentencePiece that follows a space with ▁."""
    return " " if piece.startswith("▁") or (kind == "wordpiece" and not piece.startswith("##")) else ""


def _bare(piece: str) -> str:
    return piece.replace("##", "").replace("▁", "")


def collect_statistics(shards: Shards) -> dict[str, np.ndarray]:
    """What the table and the plots are made of, from one pass over the folder:

    lengths, num_predictions, pair_labels, segment_b_lengths  int64 [N]
    fingerprints    int64 [N], equal where the sequences are, masks apart
    fate            int64 [3], predictions that became [MASK], were kept, became a random token
    unigram_counts  int64 [V]
    """
    columns: dict[str, list[np.ndarray]] = {}
    fate = np.zeros(3, np.int64)
    mask_id = shards.manifest["vocab"]["mask_id"]
    for records in tqdm(shards.blocks(), "read", -(-shards.num_sequences // 8192), unit="block"):
        block = {
            "lengths": records.lengths,
            "num_predictions": records.num_predictions,
            "pair_labels": records.pair_labels,
            "segment_b_lengths": np.maximum(records.lengths - records.segment_b_start - 1, 0),
            "fingerprints": _fingerprints(records),
        }
        for name, values in block.items():
            columns.setdefault(name, []).append(values)
        hidden = records.token_ids[records.masked_lm_rows()]
        is_mask, is_kept = hidden == mask_id, hidden == records.masked_lm_labels
        fate += (is_mask.sum(), is_kept.sum(), (~is_mask & ~is_kept).sum())
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return joined | {"fate": fate, "unigram_counts": unigram_counts(shards)}


def _fingerprints(records: Records) -> np.ndarray:
    """int64 [B]: hashes of the original tokens, comparable within this process."""
    sequences = np.split(records.original_token_ids(), np.cumsum(records.lengths)[:-1])
    return np.array([hash(sequence.tobytes()) for sequence in sequences])


def statistics_table(shards: Shards, statistics: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Rows (what, value) for people."""
    manifest, lengths = shards.manifest, statistics["lengths"]
    seq_length = manifest["config"]["seq_length"]
    num_bytes = sum(entry["num_bytes"] for entry in manifest["shards"])
    num_distinct = len(np.unique(statistics["fingerprints"]))
    share_masked, share_kept, share_random = statistics["fate"] / max(1, statistics["fate"].sum())
    rows = [
        ("sequences", f"{shards.num_sequences:,} in {len(manifest['shards'])} shards"),
        ("tokens", f"{manifest['num_tokens']:,}"),
        ("bytes", f"{num_bytes:,}, {num_bytes / manifest['num_tokens']:.3f} a token, masks included"),
        (
            "length",
            f"mean {lengths.mean():.1f}, least {lengths.min()}, {_percent((lengths == seq_length).mean())} are full",
        ),
        (
            "predictions",
            f"{manifest['num_predictions']:,}, mean {statistics['num_predictions'].mean():.2f} a sequence, "
            f"{_percent(manifest['num_predictions'] / manifest['num_tokens'])} of the tokens",
        ),
        ("  became [MASK] / kept / random", " / ".join(map(_percent, (share_masked, share_kept, share_random)))),
        (
            "sequences whose tokens occur before",
            f"{_percent(1 - num_distinct / shards.num_sequences)} (duplicates={manifest['config']['duplicates']})",
        ),
    ]
    for label, name in PAIR_NAMES[manifest["config"]["pair_task"]].items():
        rows.append((name, _percent((statistics["pair_labels"] == label).mean())))
    rows.append(("unigram entropy", f"{entropy(statistics['unigram_counts']):.4f} nat"))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def plot_statistics(statistics: dict[str, np.ndarray], folder: str | Path) -> list[Path]:
    """Write PNG histograms of lengths, predictions, segment B and token frequencies; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = {
        "lengths": "tokens a sequence",
        "num_predictions": "predictions a sequence",
        "segment_b_lengths": "tokens of segment B",
    }
    paths = []
    for name, label in labels.items():
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        axes.hist(statistics[name], bins=np.arange(statistics[name].max() + 2) - 0.5)
        axes.set(xlabel=label, ylabel="sequences", yscale="log")
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    counts = np.sort(statistics["unigram_counts"])[::-1]
    axes.loglog(np.arange(1, np.count_nonzero(counts) + 1), counts[counts > 0])
    axes.set(xlabel="rank of the token", ylabel="occurrences")
    paths.append(folder / "unigrams.png")
    figure.savefig(paths[-1], dpi=120)
    plt.close(figure)
    return paths


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.show",
        description="Look into a folder of masked shards. Without options, three records are printed. "
        "A masked token is shown as [MASK→original], one replaced at random as [other→original], "
        "one that is predicted but left as [=original].",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="what data_prep.build made")
    add("--records", type=int, default=0, metavar="N", help="print so many records")
    add("--first", type=int, default=0, metavar="I", help="beginning with number I")
    add("--stats", action="store_true", help="print a table of lengths, masks, duplicates, pairs and entropy")
    add("--plots", metavar="DIR", help="write histograms as PNG files into DIR")
    add("--verify", action="store_true", help="compare every shard with its sha256")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
