"""The plan against real runs: bytes that torch allocated, bytes that gloo sent, published times."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import BertConfig
from transformers import BertForPreTraining as HuggingFaceBert

from data_prep.cli import parse
from pretrain.costs import (
    DEVICES,
    PlannedRun,
    communication,
    find_device,
    fits,
    held_parameters,
    layouts,
    memory,
    step_seconds,
)
from pretrain.engine import initialize_engine
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining, init_weights
from pretrain.model_config import ModelConfig, load_model_config
from pretrain.parameter_table import num_parameters
from pretrain.plan import PlanOptions, main, plan_run
from tests.pretrain.test_model import make_batch
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
EQUAL, UNEQUAL = [64] * 8, [40, 64] * 4
PREDICTIONS = 7  # make_batch: a seventh of the tokens


def train_config(stage: int, dtype: str, num_micro_batches: int, lengths: list[int], dp_size: int) -> dict:
    """A DeepSpeed file. Under ZeRO 3 no weights stay gathered, as in models above its limit."""
    zero = {"stage": stage, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": num_micro_batches * len(lengths) * dp_size,
        "train_micro_batch_size_per_gpu": len(lengths),
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupPolynomialLR", "params": {"total_num_steps": 2}},
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
    }


def measured(config, deepspeed, tp_size, lengths, sequence_parallel, recompute, folder: Path) -> dict:
    """Two real steps of this rank: the most bytes that torch's allocator held at once, and the values that gloo was
    given to reduce and to gather in the second step.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as trace:
        layout = init_layout(tp_size, sequence_parallel)
        module = BertForPreTraining(config, layout, recompute)
        init_weights(module, seed=1)
        engine, _ = initialize_engine(module, deepspeed, layout)
        batch = make_batch(lengths, config)
        for step in range(2):
            with record_function(f"step {step}"):
                for index in range(engine.gradient_accumulation_steps()):
                    mlm_loss, _, pair_loss, _ = engine(batch, (1, step, index, layout.dp_rank))
                    engine.backward(mlm_loss.mean() + pair_loss.mean())
                    del mlm_loss, pair_loss
                    engine.step()
    path = folder / f"{layout.rank}.json"
    trace.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    # The running total includes frees on gloo's threads, which have no events.
    held = sorted((event["ts"], index) for index, event in enumerate(events) if event.get("name") == "[memory]")
    totals = [events[index]["args"]["Total Allocated"] for _, index in held]
    before = totals[0] - events[held[0][1]]["args"]["Bytes"]
    (second,) = [event for event in events if event.get("name") == "step 1" and event.get("cat") == "user_annotation"]
    values = {"gloo:all_reduce": 0, "gloo:all_gather": 0}
    for event in events:
        if event.get("name") in values and event["ts"] >= second["ts"]:
            values[event["name"]] += sum(math.prod(shape) for shape in event["args"]["Input Dims"] if shape)
    return {"peak": max(totals) - before, **values}


CASES = [  # ranks, tensor parallel, ZeRO, precision, micro-batches, lengths, sequence parallel, recompute
    (1, 1, 0, "fp32", 1, EQUAL, False, "none"),
    (1, 1, 0, "fp32", 1, UNEQUAL, False, "selective"),
    (1, 1, 0, "fp32", 1, EQUAL, False, "full"),
    (2, 1, 1, "fp32", 2, EQUAL, False, "none"),
    (2, 1, 1, "bf16", 2, EQUAL[:2], False, "none"),
    (2, 1, 2, "bf16", 2, EQUAL, False, "none"),
    (2, 2, 1, "bf16", 1, EQUAL, False, "none"),
    (2, 2, 1, "bf16", 2, UNEQUAL, True, "none"),
    (2, 2, 3, "fp32", 1, UNEQUAL, False, "none"),
    (2, 1, 3, "fp32", 1, EQUAL, False, "none"),
    (2, 2, 0, "fp32", 1, EQUAL, False, "none"),
    (2, 2, 1, "fp32", 1, EQUAL, True, "full"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            (2, 1, 3, "bf16", 2, EQUAL, False, "none"),
            (4, 2, 2, "bf16", 2, EQUAL[:4], False, "none"),
            (4, 1, 3, "fp32", 2, EQUAL[:4], False, "selective"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (*case[:5], *case[6:]))))
def test_memory_and_traffic_are_those_of_a_real_run(case, tmp_path):
    world_size, tp_size, stage, dtype, num_micro_batches, lengths, sequence_parallel, recompute = case
    config = ModelConfig(1000, 128, 4, 4, 512)
    deepspeed = train_config(stage, dtype, num_micro_batches, lengths, world_size // tp_size)
    mean = sum(lengths) / len(lengths)
    run = PlannedRun(
        *(config, deepspeed, 1, world_size, tp_size, max(lengths), mean, round(mean / PREDICTIONS), DEVICES["cpu"]),
        *(sequence_parallel, recompute),
        on_gpu=False,
    )
    settings = (config, deepspeed, tp_size, lengths, sequence_parallel, recompute, tmp_path)
    real = run_ranks(measured, world_size, *settings)[0]
    print(f"predicted / allocated: {memory(run)['peak'] / real['peak']:.3f}")
    if sequence_parallel:
        # gloo has no reduce-scatter: it sends something else than NCCL, and its threads free copies of split
        # activations late. Measured in five sessions: 0.83 to 1.01 of what was allocated.
        assert memory(run)["peak"] == pytest.approx(real["peak"], rel=0.25)
        return
    assert memory(run)["peak"] == pytest.approx(real["peak"], rel=0.1)
    sent, dp_size = communication(run), world_size // tp_size
    if dp_size == 2 and tp_size == 1:  # on two ranks, a value that is reduced or gathered is sent once
        gradients = sent["data parallel, gradients"] * (2 if stage == 3 else 1)  # gloo: an all-reduce there too
        assert gradients / run.value_bytes == pytest.approx(real["gloo:all_reduce"], rel=0.01)
        assert sent["data parallel, weights"] / run.value_bytes == pytest.approx(real["gloo:all_gather"], rel=0.01)
    if dp_size == 1 and tp_size == 2 and stage:
        forward, backward = sent["tensor parallel, forward"], sent["tensor parallel, backward"]
        alone = held_parameters(run)  # DeepSpeed reduces over a data-parallel group of one rank too
        assert (forward + backward) / run.value_bytes + alone == pytest.approx(real["gloo:all_reduce"], rel=0.02)


def published(model: str, config: str, device: str, num_nodes: int, gpus_per_node: int, *more: str) -> PlannedRun:
    argv = ["--model", model, "--deepspeed_config", str(ROOT / "ds_configs" / config), "--device", device]
    argv += ["--nodes", str(num_nodes), "--gpus-per-node", str(gpus_per_node), *more]
    return plan_run(parse(PlanOptions, "pretrain.plan", argv))


# Sequences of BERT-large a second on all devices: NVIDIA, DeepLearningExamples, BERT for PyTorch, on DGX-1 (V100 32G)
# and DGX A100 (80G), mixed precision, containers of 2021. One efficiency a device, set at one GPU and 128 tokens.
@pytest.mark.parametrize(
    ("device", "num_nodes", "gpus_per_node", "micro_batch", "rate", "factor"),
    [
        ("a100-80g", 1, 1, 256, 580, 1.02),
        ("a100-80g", 1, 8, 256, 4553, 1.05),
        ("a100-80g", 8, 8, 256, 35774, 1.1),
        ("a100-80g", 32, 8, 256, 138294, 1.1),
        ("v100-32g", 1, 1, 64, 224, 1.02),
        ("v100-32g", 1, 8, 64, 1746, 1.05),
    ],
)
def test_times_at_128_are_those_published(device, num_nodes, gpus_per_node, micro_batch, rate, factor):
    more = ["--set", f"train_micro_batch_size_per_gpu={micro_batch}"]
    run = published("large", "large_lamb_phase1.json", device, num_nodes, gpus_per_node, *more)
    predicted = run.deepspeed["train_batch_size"] / step_seconds(run)["step"]
    assert 1 / factor < predicted / rate < factor


@pytest.mark.parametrize(
    ("device", "num_nodes", "rate"), [("a100-40g", 1, 620), ("v100-32g", 1, 586), ("a100-80g", 32, 49663)]
)
def test_times_at_512_are_within_a_factor_of_two(device, num_nodes, rate):
    """52 a GPU is DeepSpeed's of 2020, 620 NVIDIA's of 2020; the others are NVIDIA's of 2021, binned by length, so that
    they compute fewer than 512 tokens a sequence. Measured: 1.01, 1.78, 0.72 and 0.70 of the published rates.
    """
    more = ["--seq-length", "512", "--max-predictions", "80"]
    run = published("large", "large_lamb_phase2.json", device, num_nodes, 8, *more)
    predicted = run.deepspeed["train_batch_size"] / step_seconds(run)["step"]
    assert 1 / 2 < predicted / rate < 2


def test_both_phases_on_256_gpus_take_about_as_long_as_published():
    """Published: 1.2 h (NVIDIA, 32 DGX A100). Phase 2 is predicted too slow: theirs computes less padding."""
    seconds = 0.0
    for config, more in (
        ("large_lamb_phase1.json", ["--set", "train_micro_batch_size_per_gpu=256"]),
        ("large_lamb_phase2.json", ["--seq-length", "512", "--max-predictions", "80"]),
    ):
        run = published("large", config, "a100-80g", 32, 8, *more)
        seconds += run.num_steps * step_seconds(run)["step"]
    assert 1.2 / 1.25 < seconds / 3600 < 1.2 * 1.25


@pytest.mark.parametrize("preset", ["tiny", "base", "large"])
def test_parameters_are_those_of_transformers(preset):
    config = load_model_config(preset, 30522)
    with torch.device("meta"):
        theirs = HuggingFaceBert(BertConfig(**config.to_json()))
    assert num_parameters(config) == sum(parameter.numel() for parameter in theirs.parameters())


def test_what_does_not_fit_is_said():
    run = published("3.9b", "large_lamb_phase1.json", "v100-16g", 1, 8)
    assert not fits(run)
    assert {(other.tp_size, other.recompute) for other in layouts(run) if fits(other)} == {(8, "full")}


def test_the_command_prints_the_whole_answer(capsys):
    phase = str(ROOT / "ds_configs/large_lamb_phase1.json")
    main(["--model", "large", "--deepspeed-config", phase, "--nodes", "8", "--tensor-parallel", "2"])
    printed = capsys.readouterr().out
    assert "336,226,108" in printed and "time to train, 7,038 steps" in printed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        *[(f"NVIDIA {name}", None) for name in ("H100 PCIe", "H100 NVL", "L40S", "A100 80GB PCIe", "GH200 480GB")],
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, kind):
    assert find_device(name) == (DEVICES[kind] if kind else None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tensor-parallel", "3"], "cannot be split over --tensor-parallel 3"),
        (["--gpus-per-node", "4", "--tensor-parallel", "8"], "--tensor-parallel 8 does not divide --gpus-per-node 4"),
        (["--sequence-parallel"], "--sequence-parallel needs --tensor-parallel"),
        (["--seq-length", "1024"], "--seq-length 1024 exceeds max_position_embeddings=512"),
        (["--mean-length", "200"], "--mean-length 200 is not between 1 and --seq-length 128"),
        (["--mean-length", "0"], "--mean-length 0 is not between 1 and --seq-length 128"),
        *[
            (["--max-predictions", number], f"--max-predictions {number} is not between 1 and --seq-length 128")
            for number in ("-7", "0", "129", "100000")
        ],
        (["--set", "gradient_clipping=1", "--set", "bf16=true"], "bf16=True must be an object"),
        (["--set", "bf16=true", "--set", "gradient_clipping=1"], "bf16=True must be an object"),
        (["--efficiency", "1.5"], "argument --efficiency: 1.5 is not between 0 and 1"),
        (["--nodes", "7"], "train_batch_size=65536 is not a multiple"),
        (["--nodes", "0"], "argument --nodes: 0 is below 1"),
    ],
)
def test_wrong_input_is_refused(more, message):
    config = ROOT / "ds_configs" / "large_lamb_phase1.json"
    with pytest.raises(ValueError, match=message):
        main(["--model", "large", "--deepspeed_config", str(config), *more])
