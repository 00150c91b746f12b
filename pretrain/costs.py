"""The cost of a run per device: memory, communication and time, calculated from the model, the layout and the DeepSpeed
file. Nothing here imports torch or starts anything; `pretrain.plan` prints it.

Memory follows the allocations of DeepSpeed 0.19 and torch; tests/pretrain/test_plan.py holds it within 10 % of real
engines. Times are sums of compute, communication and optimizer without overlap, from the data sheets in DEVICES and one
measured efficiency per device; the same tests compare them with published runs. Letters follow the legend in model.py.
"""

import dataclasses
import math
from dataclasses import dataclass

from pretrain.deepspeed_config import num_accumulation_steps
from pretrain.model_config import ModelConfig
from pretrain.parameter_table import rank_shape, tensor_table

# Share of a link's data-sheet rate that large collectives reach. An assumption, close to what nccl-tests shows.
LINK_EFFICIENCY = 0.8
# Bytes of memory traffic per parameter and optimizer step: reads and writes of the passes in lamb.py, 4 bytes each.
OPTIMIZER_TRAFFIC = {"Lamb": 56, "AdamW": 28}
# Temporary float32 values per parameter in the optimizer step: AdamW's square roots.
OPTIMIZER_TEMPORARIES = {"Lamb": 0, "AdamW": 1}


@dataclass(frozen=True)
class Device:
    """One device by its data sheet: rates in FLOP/s and bytes/s, links per direction."""

    name: str  # from torch.cuda.get_device_name, without the vendor
    memory: float  # bytes
    peak_16_bit: float  # dense tensor-core FLOP/s
    peak_fp32: float
    bandwidth: float  # of its memory
    node_link: float  # to the other devices of its node
    network: float  # to other nodes, per device
    efficiency: float  # measured share of the peak in BERT's forward and backward pass


# Sources: NVIDIA's data sheets of V100, A100, H100 and H200 (SXM): memory, dense peaks, memory bandwidth, NVLink (half
# of the bidirectional sum). Network: the InfiniBand of DGX-1 (4 x 100 Gbit/s for 8 GPUs), DGX A100 (8 x 200), DGX H100
# and H200 (8 x 400). Efficiency is measured sequences/s of BERT-large x `ModelConfig.training_flops` / peak, from
# - V100: 224/s at length 128 on one GPU, A100: 580/s (NVIDIA DeepLearningExamples, BERT for PyTorch, 2021 containers);
# - H100: 975/s, H200: 996/s per GPU, packed to 512 (MLPerf training 3.0 and 4.0, NVIDIA's tuned code: hard to match).
# The CPU is one core with AVX2: two FMA units x 8 values x 2 operations x 3 GHz. `make smoke` measured its efficiency
# (docs/results.md). Its bandwidths are round numbers for shared desktop or cloud memory.
DEVICES = {
    "v100-16g": Device("Tesla V100-SXM2-16GB", 16e9, 125e12, 15.7e12, 900e9, 150e9, 6.25e9, 0.43),
    "v100-32g": Device("Tesla V100-SXM2-32GB", 32e9, 125e12, 15.7e12, 900e9, 150e9, 6.25e9, 0.43),
    "a100-40g": Device("A100-SXM4-40GB", 40e9, 312e12, 19.5e12, 1555e9, 300e9, 25e9, 0.45),
    "a100-80g": Device("A100-SXM4-80GB", 80e9, 312e12, 19.5e12, 2039e9, 300e9, 25e9, 0.45),
    "h100": Device("H100 80GB HBM3", 80e9, 989e12, 67e12, 3350e9, 450e9, 50e9, 0.49),
    "h200": Device("H200", 141e9, 989e12, 67e12, 4800e9, 450e9, 50e9, 0.50),
    "cpu": Device("cpu", 8e9, 96e9, 96e9, 10e9, 5e9, 1e9, 0.33),
}


def find_device(name: str) -> Device | None:
    """The device named `name` by torch.cuda.get_device_name; None if it is not in DEVICES.

    Only the whole name matches, because a PCIe card is slower than the SXM module of the same chip.
    """
    return next((device for device in DEVICES.values() if device.name == name.removeprefix("NVIDIA ")), None)


@dataclass(frozen=True)
class PlannedRun:
    """One phase of pretraining on a grid of devices."""

    model: ModelConfig
    deepspeed: dict
    num_nodes: int
    gpus_per_node: int
    tp_size: int
    seq_length: int
    mean_length: float  # real tokens per sequence: padding is not computed
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
        """Bytes per weight, gradient and activation."""
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


def held_parameters(run: PlannedRun) -> int:
    """Number of parameters on one rank, including the rows that pad the vocabulary."""
    shapes = (rank_shape(name, whole, run.model, run.tp_size) for name, whole in tensor_table(run.model).items())
    return sum(map(math.prod, shapes))


def memory(run: PlannedRun) -> dict[str, float]:
    """Bytes per device by purpose; "peak" is the most allocated at once, in the backward pass or the optimizer step."""
    held, value, accumulates = held_parameters(run), run.value_bytes, run.num_micro_batches > 1
    sharded = held / run.dp_size
    states = held if run.stage == 0 else sharded  # float32 weights and moments on this device
    weights = value * (held if run.stage < 3 else sharded)
    masters = 4 * states if run.stage > 0 or run.is_16_bit else 0
    num_buckets = 0 if run.stage == 0 else 2 if run.stage < 3 and run.zero("overlap_comm", False) else 1
    parts = {
        "weights": weights,
        "gathered weights": _gathered_parameters(run) * value,
        "gradients": value * (held if run.stage == 0 or (run.stage == 1 and accumulates) else sharded),
        "float32 weights": masters,
        "moments": 8 * states,
        "reduction buckets": num_buckets * value * run.zero("reduce_bucket_size", 5e8),
        "activations": activation_bytes(run, run.recompute),
        "LAMB's updates": 4 * states if run.optimizer == "Lamb" else 0,
        "optimizer step": masters + 4 * states * OPTIMIZER_TEMPORARIES[run.optimizer],
    }
    resident = weights + masters + parts["moments"] + parts["LAMB's updates"]
    passing = parts["activations"] + parts["gathered weights"]
    if run.stage == 3:  # ZeRO 3 keeps its bucket
        resident += parts["reduction buckets"]
    else:
        passing += parts["reduction buckets"]
    if accumulates or run.stage == 3:  # otherwise the backward pass starts without gradients
        passing += parts["gradients"]
    stepping = parts["optimizer step"] + value * states
    return parts | {"peak": resident + max(passing, stepping)}


def _gathered_parameters(run: PlannedRun) -> float:
    """Weights that ZeRO 3 holds whole at once: those kept for reuse, up to a limit, and a prefetch buffer if dp > 1."""
    if run.stage < 3:
        return 0
    held = held_parameters(run)
    prefetched = min(held, run.zero("stage3_prefetch_bucket_size", 5e7)) if run.dp_size > 1 else 0
    return min(held, run.zero("stage3_max_live_parameters", 1e9)) + prefetched


def activation_bytes(run: PlannedRun, recompute: str) -> float:
    """Activation bytes of one micro-batch's backward pass with logits, after Korthikanti et al. 2022, section 4."""
    config, value, tp = run.model, run.value_bytes, run.tp_size
    tokens, hidden = run.micro_batch * run.mean_length, config.hidden_size
    rows = tokens / tp if run.sequence_parallel else tokens
    mask = 0 if not config.hidden_dropout_prob else 1 if run.on_gpu else value  # bytes per value of a dropout mask
    core = _attention_bytes(run)
    kept = rows * hidden * (4 * value + 2 * mask)  # inputs of products and LayerNorms, and two dropout masks
    split = tokens * hidden * value / tp  # one [T, H/tp]
    kept += split  # attention's output
    kept += 2 * tokens * config.intermediate_size * value / tp  # before and after GELU
    kept += 3 * hidden**2 * value / tp  # Q, K and V concatenated
    layer = kept + (3 * split if recompute == "selective" else core)
    layers = config.num_hidden_layers * layer
    if recompute == "full":  # one recomputed layer, and gradients before and after its GELU
        again = layer + 2 * tokens * config.intermediate_size * value / tp
        if run.sequence_parallel:  # a product's gathered input, and its gradient before and after scattering
            again += 3 * tokens * hidden * value
        layers = config.num_hidden_layers * rows * hidden * value + again
    elif recompute == "selective":
        layers += core
    embeddings = rows * hidden * (value + mask)
    predictions = run.micro_batch * run.max_predictions
    vocab = config.padded_vocab_size(tp) // tp
    heads = predictions * (4 * hidden * value + 8 * vocab)  # logits, and their float32 copy or unmasked original
    heads += vocab * hidden * value  # the decoder's gradient, which is computed first
    return layers + embeddings + heads


def _attention_bytes(run: PlannedRun) -> float:
    """Bytes kept by the attention core. A fused kernel keeps queries, keys, values and the context.

    The CPU's fused kernel has no dropout. With dropout, the padded queries, keys and values, the scores after softmax,
    their mask and their product are kept in float32. If lengths differ, the unpadded inputs are kept too.
    """
    config = run.model
    tokens = run.micro_batch * run.mean_length
    width = tokens * config.hidden_size / run.tp_size
    if run.on_gpu:
        return 4 * width * run.value_bytes
    padded = width * run.seq_length / run.mean_length
    unpadded = 3 * width * run.value_bytes if run.mean_length < run.seq_length else 0
    if not config.attention_probs_dropout_prob:
        return unpadded + 4 * padded * run.value_bytes
    scores = run.micro_batch * run.seq_length**2 * config.num_attention_heads / run.tp_size
    return unpadded + 4 * (3 * padded + 3 * scores)


def training_flops(run: PlannedRun) -> float:
    """Floating-point operations per step over all devices, without recomputation, as MFU counts them."""
    one = run.model.training_flops([round(run.mean_length)], run.max_predictions)
    return run.deepspeed["train_batch_size"] * one


def communication(run: PlannedRun) -> dict[str, float]:
    """Bytes that one device sends per step, by axis and purpose. On a ring, an all-reduce of n bytes over r ranks sends
    2 n (r - 1) / r per rank; a gather or a reduce-scatter sends half of that.
    """
    config, value = run.model, run.value_bytes
    tp, dp = (run.tp_size - 1) / run.tp_size, (run.dp_size - 1) / run.dp_size
    hidden_bytes = run.micro_batch * run.mean_length * config.hidden_size * value
    prediction_bytes = run.micro_batch * run.max_predictions * (config.hidden_size * value + 20)
    forward = 4 * config.num_hidden_layers * hidden_bytes  # two all-reduces per layer
    again = forward if run.recompute == "full" else 0
    backward = forward
    if run.sequence_parallel:  # inputs gathered again for weight gradients; gradients of embeddings and heads
        backward += forward / 2 + 2 * hidden_bytes
    held = held_parameters(run)
    weights = held * value
    reductions = run.num_micro_batches if run.stage >= 2 else 1  # ZeRO 2 and 3 reduce gradients after every micro-batch
    gathers = min(run.stage, 1)
    if run.stage == 3:  # once per micro-batch if weights stay from forward to backward, else twice
        gathers = run.num_micro_batches * (1 if held <= run.zero("stage3_max_live_parameters", 1e9) else 2)
    norms = 16 * len(tensor_table(config)) if run.optimizer == "Lamb" else 0
    return {
        "tensor parallel, forward": run.num_micro_batches * tp * (forward + again + 2 * hidden_bytes),
        "tensor parallel, backward": run.num_micro_batches * tp * (backward + 2 * prediction_bytes),
        "data parallel, gradients": reductions * dp * weights * (1 if run.stage == 3 else 2),
        "data parallel, weights": gathers * dp * weights,
        "LAMB's norms": 2 * norms * (dp + tp),
    }


def step_seconds(run: PlannedRun) -> dict[str, float]:
    """Predicted seconds per step by purpose, and their sum as "step"."""
    device, sent = run.device, communication(run)
    peak = device.peak_16_bit if run.is_16_bit else device.peak_fp32
    recomputed = 4 / 3 if run.recompute == "full" else 1.0  # one more forward pass
    across_tp = sum(size for name, size in sent.items() if name.startswith("tensor"))
    across_dp = sum(size for name, size in sent.items() if name.startswith("data"))
    # Each member of a data-parallel group in a node adds its own network adapter to the link between nodes.
    members = max(1, run.gpus_per_node // run.tp_size)
    dp_link = device.node_link if run.num_nodes == 1 else min(device.node_link, device.network * members)
    updated = held_parameters(run) / (run.dp_size if run.stage else 1)
    parts = {
        "compute": recomputed * training_flops(run) / (run.dp_size * run.tp_size * peak * device.efficiency),
        "tensor parallel": across_tp / (device.node_link * LINK_EFFICIENCY),
        "data parallel": across_dp / (dp_link * LINK_EFFICIENCY),
        "optimizer": updated * OPTIMIZER_TRAFFIC[run.optimizer] / device.bandwidth,
    }
    return parts | {"step": sum(parts.values())}


def layouts(run: PlannedRun) -> list[PlannedRun]:
    """The run at each possible tensor-parallel size within a node, ZeRO stage and recomputation; 16 bits need ZeRO."""
    found = []
    for tp_size in range(1, run.gpus_per_node + 1):
        try:
            run.model.check_tensor_parallel(tp_size)
            num_accumulation_steps(run.deepspeed, run.num_nodes * run.gpus_per_node // tp_size)
        except ValueError:
            continue
        if run.gpus_per_node % tp_size:
            continue
        for stage in range(1 if run.is_16_bit else 0, 4):
            zero = {**run.deepspeed.get("zero_optimization", {}), "stage": stage}
            deepspeed = {**run.deepspeed, "zero_optimization": zero}
            for recompute in dict.fromkeys(("none", run.recompute, "full")):
                change = {"tp_size": tp_size, "deepspeed": deepspeed, "recompute": recompute}
                change["sequence_parallel"] = run.sequence_parallel and tp_size > 1
                found.append(dataclasses.replace(run, **change))
    return found


def fits(run: PlannedRun) -> bool:
    """Whether the peak leaves a tenth of the memory for the runtime, collective buffers and fragmentation."""
    return memory(run)["peak"] <= 0.9 * run.device.memory
