"""What a run costs, by arithmetic alone: parameters, memory, communication and time of one device, from the shape of
the model, the layout and the DeepSpeed file. Nothing here imports torch or starts anything; `pretrain.plan` prints it.

Memory is counted as DeepSpeed 0.19 and torch allocate it, and held within 10 % of real engines by
tests/pretrain/test_plan.py. Times are compute + communication + optimizer, nothing overlapped, from the data sheets in
DEVICES and one measured efficiency each; the same tests compare them with published runs.

Letters as in model.py: T tokens, H hidden, F feed-forward, N heads, S sequence, P predictions, V vocabulary.
"""

import dataclasses
import math
from dataclasses import dataclass

from pretrain.deepspeed_config import num_accumulation_steps
from pretrain.model_config import ModelConfig
from pretrain.parameter_table import rank_shape, tensor_table

# Share of a link's data-sheet rate that large collectives reach. An assumption, close to what nccl-tests shows.
LINK_EFFICIENCY = 0.8
# Bytes moved for each parameter by one optimizer step: reads and writes of the passes in lamb.py, 4 bytes each.
OPTIMIZER_TRAFFIC = {"Lamb": 56, "AdamW": 28}
# New float32 values for each parameter while the optimizer steps: AdamW's roots.
OPTIMIZER_TEMPORARIES = {"Lamb": 0, "AdamW": 1}


@dataclass(frozen=True)
class Device:
    """One device by its data sheet; rates in FLOP/s and bytes/s, links in one direction."""

    memory: float  # bytes
    peak_16_bit: float  # dense tensor-core FLOP/s
    peak_fp32: float
    bandwidth: float  # of its memory
    node_link: float  # to the other devices of a node
    network: float  # to other nodes, this device's share
    efficiency: float  # share of the peak that BERT reached, forward and backward: measured, by the source named


GB, TFLOPS = 1e9, 1e12
# Sources: NVIDIA's data sheets of V100, A100, H100 and H200 (SXM): memory, dense peaks, memory bandwidth, NVLink (half
# of the bidirectional sum). Network: the InfiniBand of DGX-1 (4 x 100 Gbit/s for 8 GPUs), DGX A100 (8 x 200), DGX H100
# and H200 (8 x 400). Efficiency: sequences/s of BERT-large x `ModelConfig.training_flops` / peak, from
# - V100: 224/s at 128 on one GPU, A100: 580/s (NVIDIA, DeepLearningExamples BERT for PyTorch, containers of 2021);
# - H100: 975/s and H200: 996/s of packed 512 a GPU (MLPerf training 3.0 and 4.0, NVIDIA's own code: hard to reach).
# The CPU is one core with AVX2: two FMA units x 8 values x 2 operations x 3 GHz; its efficiency was measured by `make
# smoke` (docs/results.md); its bandwidths are round numbers for a shared desktop or cloud memory.
DEVICES = {
    "v100-16g": Device(16 * GB, 125 * TFLOPS, 15.7 * TFLOPS, 900 * GB, 150 * GB, 6.25 * GB, 0.43),
    "v100-32g": Device(32 * GB, 125 * TFLOPS, 15.7 * TFLOPS, 900 * GB, 150 * GB, 6.25 * GB, 0.43),
    "a100-40g": Device(40 * GB, 312 * TFLOPS, 19.5 * TFLOPS, 1555 * GB, 300 * GB, 25 * GB, 0.45),
    "a100-80g": Device(80 * GB, 312 * TFLOPS, 19.5 * TFLOPS, 2039 * GB, 300 * GB, 25 * GB, 0.45),
    "h100": Device(80 * GB, 989 * TFLOPS, 67 * TFLOPS, 3350 * GB, 450 * GB, 50 * GB, 0.49),
    "h200": Device(141 * GB, 989 * TFLOPS, 67 * TFLOPS, 4800 * GB, 450 * GB, 50 * GB, 0.50),
    "cpu": Device(8 * GB, 0.096 * TFLOPS, 0.096 * TFLOPS, 10 * GB, 5 * GB, 1 * GB, 0.33),
}


@dataclass(frozen=True)
class Job:
    """A phase of pretraining on a grid of devices."""

    model: ModelConfig
    deepspeed: dict
    num_nodes: int
    gpus_per_node: int
    tp_size: int
    seq_length: int
    mean_length: float  # real tokens of a sequence: padding is not computed
    max_predictions: int
    device: Device
    sequence_parallel: bool = False
    recompute: str = "none"
    on_gpu: bool = True

    @property
    def dp_size(self) -> int:
        return self.num_nodes * self.gpus_per_node // self.tp_size

    @property
    def stage(self) -> int:
        return self.zero("stage", 0)

    def zero(self, key: str, default):
        """A value of the file's `zero_optimization`, or DeepSpeed's default."""
        return self.deepspeed.get("zero_optimization", {}).get(key, default)

    @property
    def optimizer(self) -> str:
        return self.deepspeed["optimizer"]["type"]

    @property
    def is_16_bit(self) -> bool:
        return any(self.deepspeed.get(name, {}).get("enabled") for name in ("bf16", "fp16"))

    @property
    def value_bytes(self) -> int:
        """Of a weight, a gradient, an activation."""
        return 2 if self.is_16_bit else 4

    @property
    def micro_batch(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def num_micro_batches(self) -> int:
        return num_accumulation_steps(self.deepspeed, self.dp_size)

    @property
    def num_steps(self) -> int:
        return self.deepspeed["scheduler"]["params"]["total_num_steps"]


def held_parameters(job: Job) -> int:
    """Parameters of one rank's model, the padding of the vocabulary with them."""
    shapes = (rank_shape(name, whole, job.model, job.tp_size) for name, whole in tensor_table(job.model).items())
    return sum(map(math.prod, shapes))


def memory(job: Job) -> dict[str, float]:
    """Bytes of one device by purpose; "peak" is the most that is allocated at once, in the backward pass or in the
    optimizer's step.
    """
    held, value, accumulates = held_parameters(job), job.value_bytes, job.num_micro_batches > 1
    sharded = held / job.dp_size
    states = held if job.stage == 0 else sharded  # what of masters and moments this device holds
    has_masters = job.stage > 0 or job.is_16_bit
    weights = held * value if job.stage < 3 else sharded * value
    parts = {"weights": weights, "gathered weights": _gathered_parameters(job) * value}
    parts["gradients"] = value * (held if job.stage == 0 or (job.stage == 1 and accumulates) else sharded)
    parts["float32 weights"] = 4 * states if has_masters else 0
    parts["moments"] = 8 * states
    num_buckets = 0 if job.stage == 0 else 2 if job.stage < 3 and job.zero("overlap_comm", False) else 1
    parts["reduction buckets"] = num_buckets * value * job.zero("reduce_bucket_size", 5e8)
    parts["activations"] = activation_bytes(job, job.recompute)
    parts["LAMB's updates"] = 4 * states if job.optimizer == "Lamb" else 0
    parts["optimizer step"] = parts["float32 weights"] + 4 * states * OPTIMIZER_TEMPORARIES[job.optimizer]
    resident = weights + parts["float32 weights"] + parts["moments"] + parts["LAMB's updates"]
    passing = parts["activations"] + parts["gathered weights"]
    if job.stage == 3:  # its bucket stays
        resident += parts["reduction buckets"]
    else:
        passing += parts["reduction buckets"]
    if accumulates or job.stage == 3:  # else the backward pass begins without gradients
        passing += parts["gradients"]
    stepping = parts["optimizer step"] + value * states
    return parts | {"peak": resident + max(passing, stepping)}


def _gathered_parameters(job: Job) -> float:
    """ZeRO 3: weights held whole at once, which stay for their next use while they are not too many, and, over several
    ranks, the buffer into which the next ones are gathered before they are put together.
    """
    if job.stage < 3:
        return 0
    held = held_parameters(job)
    coming = min(held, job.zero("stage3_prefetch_bucket_size", 5e7)) if job.dp_size > 1 else 0
    return min(held, job.zero("stage3_max_live_parameters", 1e9)) + coming


def activation_bytes(job: Job, recompute: str) -> float:
    """Bytes that the backward pass of one micro-batch needs, and the logits beside them (after Korthikanti et al. 2022,
    section 4, counted for this model).
    """
    config, value, tp = job.model, job.value_bytes, job.tp_size
    tokens, hidden = job.micro_batch * job.mean_length, config.hidden_size
    rows = tokens / tp if job.sequence_parallel else tokens
    mask = 0 if not config.hidden_dropout_prob else 1 if job.on_gpu else value  # bytes of one value's dropout mask
    core = _attention_bytes(job)
    kept = rows * hidden * (4 * value + 2 * mask)  # inputs of products and LayerNorms; two dropout masks
    split = tokens * hidden * value / tp  # one [T, H/tp]
    kept += split  # attention's result
    kept += 2 * tokens * config.intermediate_size * value / tp  # before and after GELU
    kept += 3 * hidden**2 * value / tp  # Q, K and V concatenated
    layer = kept + (3 * split if recompute == "selective" else core)
    layers = config.num_hidden_layers * layer
    if recompute == "full":  # beside the layer that is computed again, gradients before and after its GELU
        again = layer + 2 * tokens * config.intermediate_size * value / tp
        if job.sequence_parallel:  # a product's gathered input, and its gradient before and after it is scattered
            again += 3 * tokens * hidden * value
        layers = config.num_hidden_layers * rows * hidden * value + again
    elif recompute == "selective":
        layers += core
    embeddings = rows * hidden * (value + mask)
    predictions = job.micro_batch * job.max_predictions
    vocab = config.padded_vocab_size(tp) // tp
    heads = predictions * (4 * hidden * value + 8 * vocab)  # logits, and their float32 copy or the unmasked ones
    heads += vocab * hidden * value  # the decoder's gradient, the first that comes
    return layers + embeddings + heads


def _attention_bytes(job: Job) -> float:
    """Between the QKV product and attention's result: queries, keys, values and the context from a fused kernel.

    The CPU has a fused kernel without dropout only: with it queries, keys, values, scores after softmax, their mask and
    their product are kept, in float32; and where sequences are shorter than others, Q, K and V before they are padded.
    """
    config = job.model
    tokens = job.micro_batch * job.mean_length
    width = tokens * config.hidden_size / job.tp_size
    if job.on_gpu:
        return 4 * width * job.value_bytes
    padded = width * job.seq_length / job.mean_length
    unpadded = 3 * width * job.value_bytes if job.mean_length < job.seq_length else 0
    if not config.attention_probs_dropout_prob:
        return unpadded + 4 * padded * job.value_bytes
    scores = job.micro_batch * job.seq_length**2 * config.num_attention_heads / job.tp_size
    return unpadded + 4 * (3 * padded + 3 * scores)


def training_flops(job: Job) -> float:
    """Floating-point operations of one step over all devices, without recomputation: what MFU counts."""
    batch = job.deepspeed["train_batch_size"]
    one = job.model.training_flops([round(job.mean_length)], job.max_predictions)
    return batch * one


def communication(job: Job) -> dict[str, float]:
    """Bytes that one device sends in a step, by axis and purpose, on rings: an all-reduce of n bytes over r ranks sends
    2 n (r - 1) / r, a gather or a reduce-scatter half of it.
    """
    config, value = job.model, job.value_bytes
    tp, dp = (job.tp_size - 1) / job.tp_size, (job.dp_size - 1) / job.dp_size
    hidden_bytes = job.micro_batch * job.mean_length * config.hidden_size * value
    prediction_bytes = job.micro_batch * job.max_predictions * (config.hidden_size * value + 20)
    forward = 4 * config.num_hidden_layers * hidden_bytes  # two all-reduces a layer
    again = forward if job.recompute == "full" else 0
    backward = forward
    if job.sequence_parallel:  # inputs are gathered again for the weights' gradients; embeddings' and heads' gradients
        backward += forward / 2 + 2 * hidden_bytes
    weights = held_parameters(job) * value
    reductions = job.num_micro_batches if job.stage >= 2 else 1  # ZeRO 2 and 3 keep no whole gradients to add to
    gathers = {0: 0, 1: 1, 2: 1}.get(job.stage, job.num_micro_batches * _gathers_of_stage_3(job))
    norms = 16 * len(tensor_table(config)) if job.optimizer == "Lamb" else 0
    return {
        "tensor parallel, forward": job.num_micro_batches * tp * (forward + again + 2 * hidden_bytes),
        "tensor parallel, backward": job.num_micro_batches * tp * (backward + 2 * prediction_bytes),
        "data parallel, gradients": reductions * dp * weights * (1 if job.stage == 3 else 2),
        "data parallel, weights": gathers * dp * weights,
        "LAMB's norms": 2 * norms * (dp + tp),
    }


def _gathers_of_stage_3(job: Job) -> int:
    """In a micro-batch: once if the weights may stay from forward to backward, else twice."""
    return 1 if held_parameters(job) <= job.zero("stage3_max_live_parameters", 1e9) else 2


def step_seconds(job: Job) -> dict[str, float]:
    """Predicted seconds of one step by purpose, and their sum."""
    device, sent = job.device, communication(job)
    peak = device.peak_16_bit if job.is_16_bit else device.peak_fp32
    num_devices = job.dp_size * job.tp_size
    recomputed = 4 / 3 if job.recompute == "full" else 1.0  # forward once more
    across_tp = sum(size for name, size in sent.items() if name.startswith("tensor"))
    across_dp = sum(size for name, size in sent.items() if name.startswith("data"))
    # The members of a data-parallel group in one node share the way to the next: each has its own adapter.
    members = max(1, job.gpus_per_node // job.tp_size)
    dp_link = device.node_link if job.num_nodes == 1 else min(device.node_link, device.network * members)
    updated = held_parameters(job) / (job.dp_size if job.stage else 1)
    parts = {
        "compute": recomputed * training_flops(job) / (num_devices * peak * device.efficiency),
        "tensor parallel": across_tp / (device.node_link * LINK_EFFICIENCY),
        "data parallel": across_dp / (dp_link * LINK_EFFICIENCY),
        "optimizer": updated * OPTIMIZER_TRAFFIC[job.optimizer] / device.bandwidth,
    }
    return parts | {"step": sum(parts.values())}


def layouts(job: Job) -> list[Job]:
    """The same work at every layout that the model, the batch and the machine allow: tensor parallel inside a node,
    each ZeRO stage, with and without recomputation. 16 bits without ZeRO has no float32 weights to bind LAMB to.
    """
    found = []
    for tp_size in range(1, job.gpus_per_node + 1):
        try:
            job.model.check_tensor_parallel(tp_size)
            num_accumulation_steps(job.deepspeed, job.num_nodes * job.gpus_per_node // tp_size)
        except ValueError:
            continue
        if job.gpus_per_node % tp_size:
            continue
        for stage in range(1 if job.is_16_bit else 0, 4):
            zero = {**job.deepspeed.get("zero_optimization", {}), "stage": stage}
            deepspeed = {**job.deepspeed, "zero_optimization": zero}
            for recompute in dict.fromkeys(("none", job.recompute, "full")):
                change = {"tp_size": tp_size, "deepspeed": deepspeed, "recompute": recompute}
                change["sequence_parallel"] = job.sequence_parallel and tp_size > 1
                found.append(dataclasses.replace(job, **change))
    return found


def fits(job: Job) -> bool:
    """Whether the peak leaves a tenth of the memory to the runtime, the collectives' buffers and fragmentation."""
    return memory(job)["peak"] <= 0.9 * job.device.memory
