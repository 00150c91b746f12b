"""What a run reports: metrics.jsonl, TensorBoard, optionally Weights & Biases, a progress bar, throughput and model
FLOPs utilisation (MFU). Only rank 0 writes. `python -m evaluation.report` draws the curves.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_prep.files import read_json
from pretrain.costs import find_device
from pretrain.data import StepBatch
from pretrain.layout import Layout
from pretrain.metrics_file import flattened, read_rows, write_rows
from pretrain.model_config import ModelConfig

LOGS = ("metrics.jsonl", "tensors.jsonl", "launches.jsonl")
EVENTS = "events.out.tfevents."
LAYER_NUMBER = re.compile(r"^.*\blayer\.\d+\.")


class RunLog:
    """The files and the progress bar of a run; does nothing on ranks other than 0.

    A resumed run drops the rows after the step that it resumes from, so that each step has one row.
    """

    def __init__(self, folder: Path, layout: Layout, first_step: int, total_steps: int, project: str | None = None):
        self.path = folder / "metrics.jsonl"
        self.active = layout.rank == 0
        self.num_ranks = layout.dp_size * layout.tp_size
        if not self.active:
            return
        for path in (self.path, folder / "tensors.jsonl"):
            if path.exists():
                write_rows(path, [row for row in read_rows(path) if row["step"] <= first_step])
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open for the whole run)
        keep_in_order(folder / "tensorboard")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.wandb = start_wandb(project, folder) if project else None
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", desc="pretrain", dynamic_ncols=True, smoothing=0.05
        )

    def write(self, kind: str, step: int, values: dict) -> None:
        """Write a row of metrics.jsonl, and each number to TensorBoard."""
        if not self.active:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        if self.wandb:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def train(self, step: int, values: dict) -> None:
        """Write the row of a training step and advance the progress bar."""
        self.write("train", step, values)
        if self.active:
            self.bar.update(step - self.bar.n)
            shown = {"loss": f"{values['loss']:.3f}", "samples_per_s": f"{values['samples_per_s']:.0f}"}
            self.bar.set_postfix(shown)

    def evaluation(self, step: int, values: dict) -> None:
        """Write the row of an evaluation and print its loss."""
        self.write("eval", step, values)
        loss, entropy = values["mlm_loss"], values["unigram_entropy"]
        self.say(f"step {step}: held-out MLM loss {loss:.3f} (unigram entropy {entropy:.3f} nat)")

    def write_tensors(self, step: int, optimizer) -> None:
        """Write LAMB's norms and ratios: to TensorBoard by kind of tensor, and to tensors.jsonl by tensor."""
        if not (self.active and getattr(optimizer, "trust_ratios", None)):
            return
        rows = {}
        for title in ("weight_norms", "update_norms", "trust_ratios"):
            values = getattr(optimizer, title)
            for kind, numbers in grouped_by_kind(values).items():
                self.board.add_histogram(f"{title}/{kind}", numbers, step)
            rows[title] = {name: value.item() for name, value in values.items()}
        with open(self.path.with_name("tensors.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rows}) + "\n")

    def launched(self, step: int, warnings: list[str], settings: dict) -> None:
        """Write and print a row of launches.jsonl: time, host, versions, settings, their changes, warnings."""
        if not self.active:
            return
        path = self.path.with_name("launches.jsonl")
        rows = read_rows(path) if path.exists() else []
        row = {"time": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}", "step": step, **whereabouts(self.num_ranks)}
        self.say(", ".join(f"{name} {value}" for name, value in row.items()))
        now, before = flattened(settings), flattened(rows[-1].get("settings", settings) if rows else settings)
        keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        changed = {key: [before.get(key), now.get(key)] for key in keys}
        row |= {"settings": settings, "changed": changed, "warnings": warnings}
        write_rows(path, [*rows, row])
        for name, (old, new) in changed.items():
            self.say(f"changed since the last start: {name} from {old} to {new}")
        for warning in warnings:
            self.say(f"WARNING: {warning}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar and flush stdout, which may be a file."""
        if self.active:
            self.bar.write(line)
            sys.stdout.flush()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.board.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()


def keep_in_order(folder: Path) -> None:
    """Rename event files of earlier launches whose time lies in the future because the clock was set back.

    TensorBoard reads the files in the order of their names, which contain the time in seconds.
    """
    files = sorted(folder.glob(f"{EVENTS}*"))
    for age, path in zip(range(len(files), 0, -1), files, strict=True):
        made, dot, rest = path.name.removeprefix(EVENTS).partition(".")
        latest = int(time.time()) - age
        if made.isdecimal() and int(made) > latest:
            path.rename(path.with_name(f"{EVENTS}{latest:010d}{dot}{rest}"))


def start_wandb(project: str, folder: Path):
    """Start or resume the Weights & Biases run of a run folder. Address and key are configured in wandb itself. With
    WANDB_MODE=offline it writes to the folder, for `wandb sync`.
    """
    import wandb  # an optional extra

    run_id = hashlib.sha256(bytes(folder.resolve())).hexdigest()[:16]
    config = read_json(folder / "run.json")
    return wandb.init(project=project, name=folder.name, id=run_id, resume="allow", dir=folder, config=config)


def whereabouts(num_ranks: int) -> dict:
    """Host, process, number of ranks, versions, and the state of the git checkout that holds the sources."""
    state = ""
    if git := shutil.which("git"):
        command = [git, "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
        state = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    row = {"host": platform.node(), "process": os.getpid(), "ranks": num_ranks, "python": platform.python_version()}
    row |= {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")}
    return row | {"git": state or "not a checkout"}


class Throughput:
    """Samples, real tokens and MFU (Chowdhery et al. 2022, appendix B) since the last report."""

    def __init__(self, config: ModelConfig, layout: Layout):
        self.config, self.layout = config, layout
        self.peak = peak_flops(layout.device) * layout.dp_size * layout.tp_size
        self.reset()

    def reset(self) -> None:
        self.start, self.samples, self.steps = time.perf_counter(), 0, 0
        self.counts = torch.zeros(2, dtype=torch.float64)  # tokens and FLOPs of this data-parallel rank

    def add(self, batch: StepBatch) -> None:
        self.samples += batch.num_samples
        self.steps += 1
        for micro_batch in batch.micro_batches:
            lengths = torch.diff(micro_batch.sequences.cu_seqlens).tolist()
            flops = self.config.training_flops(lengths, len(micro_batch.masked_lm_labels))
            self.counts += torch.tensor([sum(lengths), flops], dtype=torch.float64)

    def report(self) -> dict:
        """Rates since the last report. Collective over the data-parallel ranks."""
        tokens, flops = self.layout.sum_over_data_parallel(self.counts).tolist()
        seconds = time.perf_counter() - self.start
        rates = {
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": tokens / seconds,
            "step_ms": 1e3 * seconds / self.steps,
            "mfu": flops / seconds / self.peak,
            "memory_gib": memory_gib(self.layout.device),
        }
        self.reset()
        return rates


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of a device: from costs.DEVICES, else measured by a large product (bfloat16; float32 on a CPU)."""
    if device.type == "cuda" and (known := find_device(torch.cuda.get_device_name(device))):
        return known.peak_16_bit
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def trust_ratio_summary(trust_ratios: dict) -> dict:
    """Minimum, median and maximum trust ratio of a LAMB step; empty if there are none."""
    if not trust_ratios:
        return {}
    ratios = torch.stack(list(trust_ratios.values())).float()
    return {f"trust_ratio_{name}": getattr(ratios, name)().item() for name in ("min", "median", "max")}


def grouped_by_kind(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One number per tensor -> one vector per kind: `attention.self.query.weight` has those of all layers."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, value in values.items():
        kinds.setdefault(LAYER_NUMBER.sub("", name), []).append(value)
    return {kind: torch.stack(numbers).float().cpu() for kind, numbers in kinds.items()}
