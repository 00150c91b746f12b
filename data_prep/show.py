"""Command line: inspect a shard folder (records as text, statistics as a table and plots, checksums)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from data_prep.cli import at_least, option, parse, run_cli
from data_prep.shards import Records, Shards, entropy, unigram_counts, verify
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

PAIR_NAMES = {
    "nsp": {0: "B follows A", 1: "B is from another document"},
    "sop": {0: "A and B in order", 1: "A and B swapped"},
    "none": {-1: "no pair task"},
}
HISTOGRAMS = {
    "lengths": "tokens per sequence",
    "num_predictions": "predictions per sequence",
    "segment_b_lengths": "tokens of segment B",
}


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Look into a folder of masked shards. Without options, three records are printed.

    A masked token is shown as [MASK→original], one that was replaced at random as [other→original], and one that is
    predicted but was left as it is as [=original].
    """

    folder: Path = option("a folder made by data_prep.build", flags=("folder",), metavar="DIR")
    records: int = option("print this many records", default=0, type=at_least(0))
    first: int = option("number of the first record to print", default=0, type=at_least(0), metavar="I")
    stats: bool = option("print a table of lengths, masks, duplicates, pairs and entropy", default=False)
    plots: Path | None = option("write histograms as PNG files into DIR", default=None, metavar="DIR")
    verify: bool = option("compare every shard with its sha256", default=False)


def main(argv: list[str] | None = None) -> None:
    options = parse(ShowOptions, "data_prep.show", argv)
    shards = Shards(options.folder)
    if options.verify:
        verify(shards, progress=partial(tqdm, desc="verify", unit="shard"))
        print(f"all {len(shards.manifest['shards'])} shards match their checksums")
    if options.stats or options.plots:
        statistics = collect_statistics(shards)
        if options.stats:
            print(tabulate(statistics_table(shards, statistics), disable_numparse=True))
        if options.plots:
            print(*plot_statistics(statistics, options.plots), sep="\n")
    num_records = options.records or (0 if options.stats or options.plots or options.verify else 3)
    if num_records:
        tokenizer = load_tokenizer(shards.vocab_file)
        for sample in range(options.first, min(options.first + num_records, shards.num_sequences)):
            print(format_record(shards, sample, tokenizer))


def format_record(shards: Shards, sample: int, tokenizer: Tokenizer) -> str:
    """Sequence number `sample` as text: a headline, then a line for each segment with its predictions marked."""
    record = shards.gather(np.array([sample]))
    pair = PAIR_NAMES[shards.manifest["config"]["pair_task"]][int(record.pair_labels[0])]
    headline = f"#{sample}: {record.lengths[0]} tokens, {record.num_predictions[0]} predictions, {pair}"
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
    """A space if the piece begins a word: in WordPiece it lacks the prefix ##, in SentencePiece it begins with ▁."""
    return " " if piece.startswith("▁") or (kind == "wordpiece" and not piece.startswith("##")) else ""


def _bare(piece: str) -> str:
    return piece.replace("##", "").replace("▁", "")


def collect_statistics(shards: Shards) -> dict[str, np.ndarray]:
    """The numbers behind the table and the plots, from the N sequences of the folder.

    lengths, num_predictions, pair_labels, segment_b_lengths  int64 [N]
    fingerprints    int64 [N], equal for sequences that are equal before masking
    fate            int64 [3], predictions that became [MASK], were kept, became a random token
    unigram_counts  int64 [V]
    """
    blocks: list[dict[str, np.ndarray]] = []
    fate = np.zeros(3, np.int64)
    mask_id = shards.manifest["vocab"]["mask_id"]
    for records in tqdm(shards.blocks(), "read", -(-shards.num_sequences // 8192), unit="block"):
        blocks.append(
            {
                "lengths": records.lengths,
                "num_predictions": records.num_predictions,
                "pair_labels": records.pair_labels,
                "segment_b_lengths": np.maximum(records.lengths - records.segment_b_start - 1, 0),
                "fingerprints": _fingerprints(records),
            }
        )
        shown = records.token_ids[records.masked_lm_rows()]
        is_mask, is_kept = shown == mask_id, shown == records.masked_lm_labels
        fate += (is_mask.sum(), is_kept.sum(), (~is_mask & ~is_kept).sum())
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return columns | {"fate": fate, "unigram_counts": unigram_counts(shards)}


def _fingerprints(records: Records) -> np.ndarray:
    """int64 [B]: hashes of the original tokens, comparable only within this process."""
    sequences = np.split(records.original_token_ids(), np.cumsum(records.lengths)[:-1])
    return np.array([hash(sequence.tobytes()) for sequence in sequences])


def statistics_table(shards: Shards, statistics: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """The table's rows (name, value), formatted as text."""
    manifest, lengths = shards.manifest, statistics["lengths"]
    config, num_tokens, num_predictions = manifest["config"], manifest["num_tokens"], manifest["num_predictions"]
    num_bytes = sum(entry["num_bytes"] for entry in manifest["shards"])
    share_full = (lengths == config["seq_length"]).mean()
    share_repeated = 1 - len(np.unique(statistics["fingerprints"])) / shards.num_sequences
    fate = statistics["fate"] / max(1, statistics["fate"].sum())
    rows = {
        "sequences": f"{shards.num_sequences:,} in {len(manifest['shards'])} shards",
        "tokens": f"{num_tokens:,}",
        "bytes": f"{num_bytes:,}, {num_bytes / num_tokens:.3f} per token, masks included",
        "length": f"mean {lengths.mean():.1f}, minimum {lengths.min()}, {_percent(share_full)} are full",
        "predictions": f"{num_predictions:,}, mean {statistics['num_predictions'].mean():.2f} per sequence, "
        f"{_percent(num_predictions / num_tokens)} of the tokens",
        "  became [MASK] / kept / random": " / ".join(map(_percent, fate)),
        "sequences that repeat an earlier one": f"{_percent(share_repeated)} (duplicates={config['duplicates']})",
    }
    for label, name in PAIR_NAMES[config["pair_task"]].items():
        rows[name] = _percent((statistics["pair_labels"] == label).mean())
    rows["unigram entropy"] = f"{entropy(statistics['unigram_counts']):.4f} nat"
    return list(rows.items())


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def plot_statistics(statistics: dict[str, np.ndarray], folder: Path) -> list[Path]:
    """Write PNG plots of lengths, predictions, segment B and token frequencies, and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in (*HISTOGRAMS, "unigrams"):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        if name in HISTOGRAMS:
            axes.hist(statistics[name], bins=np.arange(statistics[name].max() + 2) - 0.5)
            axes.set(xlabel=HISTOGRAMS[name], ylabel="sequences", yscale="log")
        else:
            counts = np.sort(statistics["unigram_counts"][statistics["unigram_counts"] > 0])[::-1]
            axes.loglog(np.arange(1, len(counts) + 1), counts)
            axes.set(xlabel="rank of the token", ylabel="occurrences")
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


if __name__ == "__main__":
    run_cli(main)
