"""CLI: predictions of a finished fine-tuning run for the examples of a file.

    python -m evaluation.predict --run runs/rte --file glue/RTE/test.tsv

Predictions for a file NAME go to RUN/predictions/NAME/ in the task's format and, for GLUE, also in the benchmark's.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from data_prep.cli import at_least, option, parse, run_cli
from data_prep.files import claim_output, mark_finished, read_json
from data_prep.text.tokenizer import load_tokenizer
from evaluation.inference import find_seeds, mean_logits, seed_weights
from evaluation.options import sha256_of
from evaluation.run_folder import RESULTS_FILE, percent, score_rank, scores_of
from evaluation.tasks.by_name import restore_task
from evaluation.tasks.glue import write_submission
from pretrain.layout import init_lone_layout


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Predict the examples of a file with the model that a finished fine-tuning run kept.

    Labels in the file are ignored.
    """

    run: Path = option("the --output folder of a finished fine-tuning run", metavar="DIR")
    file: Path = option("file of the run's task, with or without labels", metavar="FILE")
    seeds: tuple[int, ...] = option(
        "seeds to predict with; the logits of several are averaged (default: the one with the best dev score)",
        default=(),
        type=at_least(0),
        metavar="N",
    )


def main(argv: list[str] | None = None) -> None:
    options = parse(PredictOptions, "evaluation.predict", argv)
    predict_file(options.run, options.file, options.seeds)


def predict_file(run: Path, file: Path, seeds: tuple[int, ...] = ()) -> None:
    """Write a run's predictions for the examples of `file`. The logits of several seeds are averaged; without `seeds`,
    the one with the best dev score is used. Scores and thresholds are those of the epoch whose weights were kept.

    Raises ValueError for a folder without a fine-tuned model, for a file that does not fit the task, and if predictions
    of other seeds, or for another file of the same name, exist.
    """
    settings, rows = find_seeds(run)
    epoch = settings["keep_weights"]
    rows = _answering_seeds(run, rows, seeds, epoch)
    task = restore_task(settings["task"], _mean_scores(rows, epoch))
    examples = task.read(file, False)
    weights = seed_weights(run, rows)
    tokenizer = load_tokenizer(weights[0].home / settings["vocab"]["file"])
    output, answering = run / "predictions" / file.name, ", ".join(str(row["seed"]) for row in rows)
    identity = {"file": file.name, "sha256": sha256_of(file), "seed": answering, "epoch": epoch}
    identity["weights"] = [one.identity() for one in weights]
    if claim_output(output, "evaluation.predict", identity) == "done":
        return
    layout = init_lone_layout()
    features = task.encode(tokenizer, examples, settings["seq_length"], file.name)
    predictions = task.decode(examples, features, mean_logits(weights, task, features, layout))
    task.write(output, examples, predictions)
    if note := write_submission(output, task, file.stem, predictions):
        print(note)
    layout.close()
    mark_finished(output, num_examples=len(examples))
    print(f"{file}: {len(examples):,} examples ({features.note}), predicted by seed {answering}: {output}")


def _mean_scores(rows: list[dict], epoch: str) -> dict[str, float | None]:
    """Each dev score, averaged over the seeds at their "last" or "best" epoch. An ensemble takes its threshold here."""
    scores = [scores_of(row, epoch) for row in rows]
    values = {name: [score.get(name) for score in scores] for name in scores[0]}
    return {name: None if None in values[name] else fmean(values[name]) for name in values}


def _answering_seeds(run: Path, kept: list[dict], seeds: tuple[int, ...], epoch: str) -> list[dict]:
    """The results of `seeds`, or of the seed with the best score at its "last" or "best" epoch. Prints their scores."""
    rows = {row["seed"]: row for row in kept}
    if absent := [seed for seed in seeds if seed not in rows]:
        raise ValueError(
            f"--seeds {absent[0]}: {run} has the weights of seed {', '.join(map(str, rows))}; name one of them"
        )
    metric = read_json(run / RESULTS_FILE)["metrics"][0]
    scores = {seed: scores_of(row, epoch)[metric] for seed, row in rows.items()}
    chosen = seeds or (max(rows, key=lambda seed: score_rank(scores[seed])),)
    for seed in chosen:
        print(f"seed {seed}: dev {metric} {percent(scores[seed])} at its {epoch} epoch")
    return [rows[seed] for seed in chosen]


if __name__ == "__main__":
    run_cli(main)
