"""The models whose training steps are compared. Each has its own process, so that its peak memory can be measured, and
they take turns, so that only one of them runs at a time.

Ours and transformers' start from the same weights, which `first_loss` shows. Megatron-core's `BertModel` has the same
sizes but cannot have the same weights: it has a LayerNorm before each block, and Q, K and V in one matrix.
"""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import high_water_mark
from pretrain.engine import initialize_engine
from pretrain.layout import Layout, init_layout
from pretrain.model import BertForPreTraining, PretrainingBatch, init_weights
from pretrain.model_config import ModelConfig

OURS, PLAIN, COMPILED = "ours", "transformers, SDPA", "transformers, compiled"
MEGATRON = "megatron-core, same sizes only"
NUM_KERNELS = 10


@dataclass
class Job:
    """What all competitors receive: sizes, batches and the content of the DeepSpeed file."""

    config: ModelConfig
    batches: list[PretrainingBatch]
    deepspeed: dict
    length: int  # maximum length of a sequence
    recompute: str = "none"  # for our model only


class Workload(NamedTuple):
    """A model, its batches in the form that it takes, and `loss_of(engine, batch, seed)`."""

    module: nn.Module
    batches: list
    loss_of: Callable


def padded(batch: PretrainingBatch, length: int | None = None) -> dict[str, Tensor]:
    """The batch for transformers, padded to its longest sequence or `length`; labels are -100 without a prediction."""
    sequences = batch.sequences
    lengths = torch.diff(sequences.cu_seqlens)  # [B]
    real = torch.arange(length or sequences.max_seqlen) < lengths[:, None]  # [B, S]
    labels = torch.full_like(sequences.token_ids, -100)
    labels = labels.scatter(0, batch.masked_lm_rows, batch.masked_lm_labels)

    def rectangle(values: Tensor, fill: int) -> Tensor:
        return torch.full(real.shape, fill).masked_scatter(real, values)

    return {
        "input_ids": rectangle(sequences.token_ids, 0),
        "token_type_ids": rectangle(sequences.segment_ids, 0),
        "attention_mask": real.long(),
        "labels": rectangle(labels, -100),
        "next_sentence_label": batch.pair_labels,
    }


def our_model(job: Job, layout: Layout) -> Workload:
    model = BertForPreTraining(job.config, layout, job.recompute)
    init_weights(model, seed=0)

    def loss_of(engine: nn.Module, batch: PretrainingBatch, seed: int | None) -> Tensor:
        output = engine(batch, None if seed is None else (0, seed, 0, 0))
        return output.mlm_loss.mean() + output.pair_loss.mean()

    return Workload(model, job.batches, loss_of)


def transformers_model(job: Job, layout: Layout, length: int | None = None) -> Workload:
    from transformers import BertConfig
    from transformers import BertForPreTraining as HuggingFaceBert

    model = HuggingFaceBert(BertConfig(**job.config.to_json(), attn_implementation="sdpa"))
    ours = dict(our_model(job, layout).module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours[name][: len(parameter)])  # our vocabulary is padded
    batches = [padded(batch, length) for batch in job.batches]
    return Workload(model, batches, lambda engine, batch, seed: engine(**batch).loss)


def megatron_model(job: Job, layout: Layout) -> Workload:
    """Megatron-core's model with its local layer spec, padding, and the masked-language-model head at all positions. On
    a GPU it uses the fusions that Megatron-LM enables by default.
    """
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    on_gpu, is_bf16, sizes = layout.device.type == "cuda", job.deepspeed["bf16"]["enabled"], job.config
    model_parallel_cuda_manual_seed(0) if on_gpu else without_cuda()
    config = TransformerConfig(
        num_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        ffn_hidden_size=sizes.intermediate_size,
        hidden_dropout=sizes.hidden_dropout_prob,
        attention_dropout=sizes.attention_probs_dropout_prob,
        use_cpu_initialization=not on_gpu,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
    )
    options = {"num_tokentypes": 2, "share_embeddings_and_output_weights": True}
    vocab_size = sizes.padded_vocab_size(1)
    model = BertModel(config, transformer_layer_spec=bert_layer_local_spec, vocab_size=vocab_size,
                      max_sequence_length=sizes.max_position_embeddings, **options)  # fmt: skip
    model = model.bfloat16() if is_bf16 else model  # some parameters are float32 whatever `params_dtype` says

    def loss_of(engine: nn.Module, batch: dict[str, Tensor], seed: int | None) -> Tensor:
        hidden = batch["labels"] != -100  # [B, S]
        labels = batch["labels"].clamp(min=0)
        losses, pair = engine(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], labels)
        mlm_loss = (losses * hidden).sum() / hidden.sum()
        return mlm_loss + F.cross_entropy(pair.float(), batch["next_sentence_label"], ignore_index=-1)

    return Workload(model, [padded(batch) for batch in job.batches], loss_of)


def without_cuda() -> None:
    """Replace two calls that Megatron makes to CUDA even without a GPU: for a buffer's device, and around dropout."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: "cpu"
    CudaRNGStatesTracker.fork = lambda self: contextlib.nullcontext()


class Trainer:
    """One competitor in its own process. The parent calls its methods by name."""

    def __init__(self, name: str, job: Job) -> None:
        self.layout = init_layout()
        self.device = self.layout.device
        if name == OURS:
            workload = our_model(job, self.layout)
        elif name == MEGATRON:
            workload = megatron_model(job, self.layout)
        else:
            workload = transformers_model(job, self.layout, job.length if name == COMPILED else None)
        self.loss_of, module = workload.loss_of, workload.module
        self.batches = [on_device(batch, self.device) for batch in workload.batches]
        with torch.no_grad():
            self.loss = self.loss_of(module.to(self.device).eval(), self.batches[0], None).item()
        module = torch.compile(module.train()) if name == COMPILED else module.train()
        self.engine, _ = initialize_engine(module, job.deepspeed, self.layout)

    def first_loss(self) -> float:
        """The loss before the first step, without dropout."""
        return self.loss

    def step(self, batch) -> None:
        self.engine.backward(self.loss_of(self.engine, batch, self.engine.global_steps))
        self.engine.step()

    def turn(self) -> float:
        """Seconds per step, over one step with each batch. On a GPU an untimed step comes first, because the previous
        turn released its cached memory to the other competitors.
        """
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            self.step(self.batches[0])
            torch.cuda.synchronize()
        start = time.perf_counter()
        for batch in self.batches:
            self.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / len(self.batches)
        if on_gpu:
            torch.cuda.empty_cache()
        return seconds

    def peak_gib(self) -> float:
        """Peak memory: of the tensors on a GPU, of the whole process on a CPU."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else high_water_mark("self")
        return peak / 2**30

    def kernels(self) -> list[dict]:
        """The operators (on a GPU: kernels) that take longest in a step, with their share of the total time."""
        on_gpu = self.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as profile:
            self.turn()
        times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
                 for event in profile.key_averages()}  # fmt: skip
        total, num_steps = sum(times.values()), len(self.batches) + (1 if on_gpu else 0)  # `turn` warms up on a GPU
        longest = sorted(times, key=times.get, reverse=True)[:NUM_KERNELS]
        return [
            {"what": name[:80], "ms a step": times[name] / 1e3 / num_steps, "share, %": 100 * times[name] / total}
            for name in longest
        ]


def on_device(batch, device: torch.device):
    return {k: v.to(device) for k, v in batch.items()} if isinstance(batch, dict) else batch.to(device)


class Competitor:
    """The parent's side: `ask` calls a method of the Trainer and waits for its answer."""

    def __init__(self, name: str, job: Job) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name, (self.pipe, theirs) = name, spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, name, job), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str):
        """The method's result; OSError with its traceback if it raised."""
        self.pipe.send(method)
        try:
            answer, failure = self.pipe.recv()
        except EOFError:
            answer, failure = None, f"its process ended with exit code {self.process.exitcode}"
        if failure:
            raise OSError(f"{self.name}: {failure}")
        return answer

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


def serve(pipe, name: str, job: Job) -> None:
    """Build a competitor, and answer its parent's calls until the parent closes the pipe."""
    try:
        trainer = Trainer(name, job)
        while True:
            pipe.send((getattr(trainer, pipe.recv())(), None))
    except EOFError:
        return
    except Exception:  # reported to the parent
        pipe.recv()
        pipe.send((None, traceback.format_exc()))
