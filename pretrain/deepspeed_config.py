"""How a model is trained: batch, precision, ZeRO, optimizer and schedule, all in one DeepSpeed JSON.

The file is checked before any rank starts to train: every key by its name, every value by its kind and range, also
those that only DeepSpeed reads. Nothing here edits what the user wrote: a wrong value raises a ValueError that names
it, the rule and the way out.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from pretrain.model_config import nearest, read_json
from pretrain.schedule import COMMON_KEYS, SCHEDULES, check_schedule, is_number, num_warmup_steps

OPTIMIZER_DEFAULTS = {
    "Lamb": {
        "lr": None,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        "bias_correction": True,
        "use_nvlamb": False,
        "min_trust_ratio": 0.0,
        "max_trust_ratio": None,
    },
    "AdamW": {"lr": None, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
}
REQUIRED_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "scheduler")
PRECISIONS = ("fp32", "fp16", "bf16")
# Keys that may stand in the file beside the required ones, with DeepSpeed's defaults, which also say of what kind a
# value is. Left out are deprecated keys, those that need an optimizer of DeepSpeed's own, and `compute_grad_norm`.
ENGINE_DEFAULTS = {
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "prescale_gradients": False,
    "communication_data_type": None,  # that of the weights
    "data_types": {"grad_accum_dtype": None},  # that of the weights
    "bf16": {
        "enabled": False,
        "immediate_grad_update": False,
        "check_grad_overflow": True,
    },
    "fp16": {
        "enabled": False,
        "auto_cast": False,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    },
    "zero_optimization": {
        "stage": 0,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500_000_000,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "allgather_bucket_size": 500_000_000,
        "overlap_comm": False,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "offload_param": {
            "device": "none",
            "nvme_path": "",
            "buffer_count": 5,
            "buffer_size": 100_000_000,
            "max_in_cpu": 1_000_000_000,
            "pin_memory": True,
        },
        "offload_optimizer": {
            "device": "none",
            "nvme_path": "",
            "buffer_count": 4,
            "pin_memory": True,
            "pipeline_read": False,
            "pipeline_write": False,
            "fast_init": False,
        },
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_model_persistence_threshold": 2**63 - 1,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "stage3_allgather_sequential": False,
        "ignore_unused_parameters": True,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "memory_efficient_linear": True,
        "pipeline_loading_checkpoint": False,
        "override_module_apply": True,
        "log_trace_cache_warnings": False,
        "enable_sanity_checks": False,
    },
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "dump_state": False,
    "memory_breakdown": False,
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True,
    "comms_logger": {"enabled": False, "prof_all": True, "prof_ops": [], "verbose": False, "debug": False},
    "flops_profiler": {
        "enabled": False,
        "recompute_fwd_factor": 0.0,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
        "output_file": "",
    },
    "aio": {
        "block_size": 1048576,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
    },
}
CHOICES = {
    "stage": (0, 1, 2, 3),
    "device": ("none", "cpu", "nvme"),
    "communication_data_type": (None, *PRECISIONS),
    "grad_accum_dtype": (None, *PRECISIONS),
}
LOWEST = {"reduce_bucket_size": 1, "loss_scale_window": 1, "min_loss_scale": 1, "gradient_accumulation_steps": 1}


def load_deepspeed_config(path: str | Path, overrides: list[str] = ()) -> dict:
    """The DeepSpeed JSON of one phase, with `a.b=value` overrides from the command line, checked.

    Raises ValueError for a missing key, a misspelt one (and names the nearest), a value of the wrong kind, or a batch
    that does not add up.
    """
    config = read_with_overrides(path, overrides)
    check_deepspeed_config(config, str(path))
    return config


def read_with_overrides(path: str | Path | None, overrides: Iterable[str]) -> dict:
    """The content of a DeepSpeed file (`None`: an empty one) with overrides `a.b=value`, not checked otherwise."""
    config = {} if path is None else read_json(path)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override}: expected KEY=VALUE, as in --set optimizer.params.lr=0.004")
        target = config
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override}: {parent} is a value in {path}, it has no {last}")
        target[last] = parse_value(value)
    return config


def parse_value(text: str):
    """A JSON value from the command line; what is not JSON is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_deepspeed_config(config: dict, path: str) -> None:
    """Raises ValueError for what DeepSpeed would accept silently or refuse late."""
    check_keys(config, (*REQUIRED_KEYS, *ENGINE_DEFAULTS), path)
    for key in REQUIRED_KEYS:
        if key not in config:
            raise ValueError(f"{path}: {key!r} is missing; see ds_configs/README.md for a complete file")
    check_engine_settings({key: value for key, value in config.items() if key not in REQUIRED_KEYS}, path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key}={config[key]!r} is not a positive whole number")
    kind, params = named_block(config, "optimizer", OPTIMIZER_DEFAULTS, path)
    check_keys(params, OPTIMIZER_DEFAULTS[kind], f"{path}: optimizer.params")
    check_optimizer({**OPTIMIZER_DEFAULTS[kind], **params}, f"{path}: optimizer.params")
    kind, params = named_block(config, "scheduler", SCHEDULES, path)
    check_keys(params, (*COMMON_KEYS, *SCHEDULES[kind]), f"{path}: scheduler.params")
    check_schedule(kind, params, f"{path}: scheduler.params")


def check_engine_settings(config: dict, path: str) -> None:
    """Raises ValueError for a setting beside the required ones, at any depth, that DeepSpeed does not know, that is of
    another kind than its default, or out of its range; and for precisions that do not go together.
    """
    check_values(config, ENGINE_DEFAULTS, path, "")
    zero, precision = config.get("zero_optimization", {}), precision_of(config)
    stage = zero.get("stage", 0)
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(key, {}).get("device", "none")
        if device != "none" and stage < lowest:
            raise ValueError(
                f"{path}: zero_optimization.{key} does nothing at stage {stage}; it needs stage"
                f" {lowest}{' to 3' if lowest < 3 else ''}, or leave it out"
            )
        if device == "nvme" and not zero[key].get("nvme_path"):
            raise ValueError(f"{path}: zero_optimization.{key}.device='nvme' needs nvme_path, a folder on that disk")
    if all(config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        raise ValueError(f"{path}: bf16 and fp16 are both enabled; a model has one precision: disable one")
    if stage == 0 and precision != "fp32":
        raise ValueError(
            f"{path}: 16 bits at zero_optimization.stage=0: DeepSpeed's wrapper for that takes a first step before the"
            " optimizer knows its tensors; choose stage 1, which on one device is the same work"
        )
    if stage == 0 and config.get("data_types", {}).get("grad_accum_dtype") not in (None, precision):
        raise ValueError(
            f"{path}: data_types.grad_accum_dtype at zero_optimization.stage=0 can only be {precision!r}, the model's;"
            " leave it out, or choose stage 1, 2 or 3"
        )


def precision_of(config: dict) -> str:
    """The precision of weights and activations, one of PRECISIONS."""
    return next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), "fp32")


def check_values(values: object, defaults: dict, path: str, place: str) -> None:
    """Raises ValueError for the first value of a block that is not as its default; `place` is the block's own key."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {place}={values!r} must be an object with keys of its own: {', '.join(defaults)}")
    check_keys(values, defaults, f"{path}: {place}" if place else path)
    for key, value in values.items():
        default, name = defaults[key], f"{place}.{key}" if place else key
        if isinstance(default, dict):
            check_values(value, default, path, name)
        elif rule := broken_rule(key, value, default):
            raise ValueError(f"{path}: {name}={value!r} must be {rule}")


def broken_rule(key: str, value: object, default: object) -> str | None:
    """What a value of DeepSpeed's must be, if it is not: one of its choices, or of the kind of its default and in its
    range. A whole number may be written as 5e8.
    """
    if key in CHOICES:
        is_choice = any(value == choice and type(value) is type(choice) for choice in CHOICES[key])
        return None if is_choice else f"one of {', '.join(map(json.dumps, CHOICES[key]))}"
    if not isinstance(default, int | float) or isinstance(default, bool):
        kinds = {bool: "true or false", str: "a text", list: "a list"}
        return None if type(value) is type(default) else kinds[type(default)]
    lowest = LOWEST.get(key, min(0, default))
    if is_number(value) and value >= lowest and (isinstance(default, float) or value == int(value)):
        return None
    return f"a {'' if isinstance(default, float) else 'whole '}number of at least {lowest}"


def check_optimizer(params: dict, where: str) -> None:
    """Raises ValueError for the first value that LAMB or AdamW would take and go wrong with."""
    betas, lowest, highest = params["betas"], params.get("min_trust_ratio"), params.get("max_trust_ratio")
    are_betas = isinstance(betas, list | tuple) and len(betas) == 2
    rules = {
        "lr": (is_number(params["lr"]) and params["lr"] >= 0, "a learning rate: a number such as 0.004"),
        "betas": (are_betas and all(is_number(beta) and 0 <= beta < 1 for beta in betas), "two numbers from 0 to 1"),
        "eps": (is_number(params["eps"]) and params["eps"] > 0, "a small number such as 1e-6"),
        "weight_decay": (is_number(params["weight_decay"]) and params["weight_decay"] >= 0, "0 or a number above it"),
        "min_trust_ratio": (lowest is None or (is_number(lowest) and lowest >= 0), "0 or a number above it"),
        "max_trust_ratio": (
            highest is None or (is_number(highest) and highest > (lowest or 0)),
            "a number above min_trust_ratio, or null",
        ),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{where}.{name}={params[name]!r} must be {rule}")


def named_block(config: dict, name: str, known, path: str) -> tuple[str, dict]:
    """The type and the params of an `optimizer` or `scheduler` block."""
    block = config[name]
    if not isinstance(block, dict) or not isinstance(block.get("params"), dict):
        raise ValueError(f'{path}: {name} must be {{"type": ..., "params": {{...}}}}')
    check_keys(block, ("type", "params"), f"{path}: {name}")
    if not isinstance(block.get("type"), str) or block["type"] not in known:
        kind, kinds = block.get("type"), ", ".join(known)
        raise ValueError(f"{path}: {name}.type={kind!r} is unknown; choose {kinds}{nearest(str(kind), known)}")
    return block["type"], block["params"]


def check_keys(values: dict, known, where: str) -> None:
    """Raises ValueError for the first key that is not known, naming the nearest."""
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def num_accumulation_steps(config: dict, dp_size: int) -> int:
    """Micro-batches a rank runs in one step; ValueError if the batch does not divide by the ranks."""
    batch, micro_batch = config["train_batch_size"], config["train_micro_batch_size_per_gpu"]
    steps, rest = divmod(batch, micro_batch * dp_size)
    if rest or steps == 0:
        raise ValueError(
            f"train_batch_size={batch} is not a multiple of train_micro_batch_size_per_gpu={micro_batch} x {dp_size}"
            f" data-parallel ranks; choose a multiple of {micro_batch * dp_size}, or another micro-batch with"
            " --set train_micro_batch_size_per_gpu=N"
        )
    stated = config.get("gradient_accumulation_steps", steps)
    if stated != steps:
        raise ValueError(
            f"gradient_accumulation_steps={stated}, but {batch} / ({micro_batch} x {dp_size}) = {steps}; leave it out"
        )
    return steps


def engine_config(config: dict) -> dict:
    """What DeepSpeed is given: the file without the optimizer and the schedule, which are built here, and with the keys
    that this needs.
    """
    derived = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
    return {
        "steps_per_print": 10**9,
        **derived,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def settings_of_results(config: dict) -> dict:
    """What of a checked file decides the numbers that a run computes, beyond rounding: batch, optimizer, schedule,
    clipping and precision, with every default stated.

    The rest decides where and how the same is computed: ZeRO's stage and buffers, offload, how a batch is cut up.
    """
    optimizer, scheduler, precision = config["optimizer"], config["scheduler"], precision_of(config)
    schedule = {**COMMON_KEYS, **SCHEDULES[scheduler["type"]], **scheduler["params"]}
    schedule["warmup_num_steps"] = num_warmup_steps(schedule)
    del schedule["warmup_proportion"]
    zero, sent = config.get("zero_optimization", {}), config.get("communication_data_type")
    accumulated = config.get("data_types", {}).get("grad_accum_dtype")
    return {
        "train_batch_size": config["train_batch_size"],
        "optimizer": {**optimizer, "params": {**OPTIMIZER_DEFAULTS[optimizer["type"]], **optimizer["params"]}},
        "scheduler": {**scheduler, "params": schedule},
        "gradient_clipping": config.get("gradient_clipping", 0.0),
        "prescale_gradients": config.get("prescale_gradients", False),
        "precision": precision,
        "precision_settings": {
            key: value
            for key, value in config.get(precision, {}).items()
            if key != "enabled" and value != ENGINE_DEFAULTS[precision][key]
        },
        "grad_accum_dtype": None if accumulated == precision else accumulated,
        "communication_data_type": None if sent == precision else sent,
        "quantized": sorted(key for key, value in zero.items() if key.startswith("zero_quantized") and value),
    }
