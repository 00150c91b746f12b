"""All stages from raw text to a report, on this machine's own documentation and without a download.

Text -> vocabulary -> tokenised corpus -> masked shards -> `tiny` pretrained on several ranks, stopped half-way and
resumed -> Hugging Face -> fine-tuning and baselines -> report.

    make quickstart          or          python -m examples.quickstart [--output runs/quickstart]

Hardware: 2 CPU cores, or the GPUs of this machine. Time: under 12 minutes on 2 cores. Each stage is a command that can
also be run by hand. Complete stages are reused, so the same command resumes after a failure.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

from examples.stages import describe_machine, launch, module, num_gpus, run_stage

ROOT = Path(__file__).resolve().parents[1]
DS_CONFIG = ROOT / "ds_configs" / "quickstart.json"
VOCAB_SIZE = 8192
SEEDS = (0, 1, 2)
FINETUNING = ("--max-train-examples", "1000", "--epochs", "3", "--batch-size", "32", "--learning-rate", "3e-4")

# Run as `python -c`, so that it shows what any user of transformers would get from the folder.
LOAD_EXPORT = """
import sys
from transformers import AutoModel, logging, pipeline
logging.set_verbosity_error()  # AutoModel has no use for the heads, and says so at length
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder)
print(f"AutoModel.from_pretrained: {model.num_parameters():,} parameters")
fill_mask = pipeline("fill-mask", model=folder)
text = f"The function returns a new {fill_mask.tokenizer.mask_token} of the same shape."
print(text)
for guess in fill_mask(text):
    print(f"  {guess['score']:6.1%}  {guess['token_str']}")
"""


def prepare_shards(stage, output: Path) -> None:
    """Documentation -> vocabulary -> tokenised corpus -> masked shards, under `output`."""
    text = output / "text"
    stage("Text: the documentation on this machine", module("data_prep.python_docs", "--output", text))
    vocab = module("data_prep.vocab", "--input", text / "pretrain/train.jsonl", "--type", "sentencepiece")
    stage("Vocabulary: SentencePiece", [*vocab, "--size", str(VOCAB_SIZE), "--output", str(output / "vocab")])
    for split, duplicates in (("train", 5), ("heldout", 1)):
        source = ("--input", text / f"pretrain/{split}.jsonl", "--vocab", output / "vocab")
        corpus = module("data_prep.corpus", *source, "--output", output / "corpus" / split)
        stage(f"Corpus, {split}: sentences as tokens", corpus)
        options = ("--seq-length", 128, "--max-predictions", 20, "--duplicates", duplicates, "--pair-task", "nsp")
        build = module("data_prep.build", "--corpus", output / "corpus" / split, "--output", output / "shards" / split)
        stage(f"Shards, {split}: pairs and masks", [*build, *map(str, options)])
    stage("Shards, shown", module("data_prep.show", output / "shards/train", "--records", 2, "--stats"))


def pretrain(stage, output: Path) -> None:
    """Pretrain `tiny` on 2 tensor-parallel ranks (on one GPU: 1 rank). Stop after half of the steps, then resume."""
    num_ranks = 1 if num_gpus() == 1 else 2
    num_steps = json.loads(DS_CONFIG.read_text())["scheduler"]["params"]["total_num_steps"]
    command = launch(
        num_ranks, "pretrain.train", "--model", "tiny", "--data", output / "shards/train",
        "--eval-data", output / "shards/heldout", "--deepspeed_config", DS_CONFIG, "--output", output / "pretrain",
        "--tensor-parallel", num_ranks, "--eval-interval", 400,
        "--dropout", 0,  # the run makes hardly one pass over the text, so it cannot overfit
    )  # fmt: skip
    stage = partial(stage, num_ranks=num_ranks)
    stage("Pretraining, first half", [*command, "--stop-after", str(num_steps // 2)])
    stage("Pretraining, resumed", command)


def finetune(stage, output: Path) -> list[Path]:
    """Fine-tune on a task made of the same documentation, with three seeds: pretrained, random and two baselines."""
    runs = []
    for name in ("pretrained", "random", "ngram", "majority"):
        checkpoint = output / "pretrain" if name == "pretrained" else name
        command = module("evaluation.finetune", "--task", "classification", "--data-dir", output / "text/task")
        command += ["--checkpoint", str(checkpoint), "--output", str(output / "finetune" / name)]
        if name == "random":
            command += ["--model", "tiny", "--vocab", str(output / "vocab")]
        stage(f"Fine-tuning, {name}", [*command, *FINETUNING, "--seeds", *map(str, SEEDS)])
        runs.append(output / "finetune" / name)
    return runs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    output = parser.parse_args(argv).output
    started = time.monotonic()
    stage = partial(run_stage, started)
    print(f"From raw text to scores on {describe_machine()}; everything goes to {output}/")
    prepare_shards(stage, output)
    pretrain(stage, output)
    export = output / "hf"
    stage("Export to Hugging Face", module("pretrain.convert", "--checkpoint", output / "pretrain", "--output", export))
    stage("The export, loaded by transformers", [sys.executable, "-c", LOAD_EXPORT, str(export)])
    runs = finetune(stage, output)
    report = output / "report.html"
    folders = [output / name for name in ("corpus/train", "shards/train", "shards/heldout", "pretrain")]
    stage("Report", module("evaluation.report", *folders, *runs, "--output", report))
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes. Open {report}")


if __name__ == "__main__":
    main()
