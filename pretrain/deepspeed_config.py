"""The DeepSpeed JSON file of a run: batch, precision, ZeRO, optimizer and schedule.

Every key and value is checked before training starts, including those that only DeepSpeed reads. Nothing is corrected:
a wrong value raises a ValueError that names it, the rule and the fix.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import read_json
from pretrain.json_values import check_keys, check_number, nearest
from pretrain.schedule import COMMON_KEYS, SCHEDULES, check_schedule, num_warmup_steps

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
DEVICES = ("none", "cpu", "nvme")
# DeepSpeed's defaults for the settings of each precision, besides "enabled".
PRECISION_DEFAULTS = {
    "bf16": {"immediate_grad_update": False, "check_grad_overflow": True},
    "fp16": {
        "auto_cast": False,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    },
    "fp32": {},
}
ZERO_SWITCHES = """
    contiguous_gradients reduce_scatter allgather_partitions overlap_comm use_multi_rank_bucket_allreduce
    round_robin_gradients parameter_alignment load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint
    ignore_unused_parameters memory_efficient_linear override_module_apply log_trace_cache_warnings enable_sanity_checks
    stage3_gather_16bit_weights_on_model_save stage3_allgather_sequential stage3_use_all_reduce_for_fetch_params
    zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
"""
ZERO_SIZES = """
    allgather_bucket_size sub_group_size zero_hpz_partition_size stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_module_granularity_threshold
    stage3_max_live_parameters stage3_max_reuse_distance
"""
# Optional keys and the rules for their values: a tuple lists the choices, an int is the minimum of an integer, a float
# the minimum of any number, a type stands for itself, and a dict is a nested block. Deprecated keys, keys that need one
# of DeepSpeed's own optimizers, and `compute_grad_norm` are left out.
ENGINE_SETTINGS = {
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "prescale_gradients": bool,
    "communication_data_type": (None, *PRECISIONS),
    "data_types": {"grad_accum_dtype": (None, *PRECISIONS)},
    "bf16": {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool},
    "fp16": {
        **dict.fromkeys(("enabled", "auto_cast", "consecutive_hysteresis"), bool),
        **dict.fromkeys(("initial_scale_power", "hysteresis"), 0),
        **dict.fromkeys(("loss_scale_window", "min_loss_scale"), 1),
        "loss_scale": 0.0,
    },
    "zero_optimization": {
        "stage": (0, 1, 2, 3),
        "reduce_bucket_size": 1,
        **dict.fromkeys(ZERO_SIZES.split(), 0),
        **dict.fromkeys(ZERO_SWITCHES.split(), bool),
        "offload_param": {
            "device": DEVICES,
            "nvme_path": str,
            "pin_memory": bool,
            **dict.fromkeys(("buffer_count", "buffer_size", "max_in_cpu"), 0),
        },
        "offload_optimizer": {
            "device": DEVICES,
            "nvme_path": str,
            "buffer_count": 0,
            **dict.fromkeys(("pin_memory", "pipeline_read", "pipeline_write", "fast_init"), bool),
        },
    },
    "steps_per_print": 0,
    **dict.fromkeys(("wall_clock_breakdown", "dump_state", "memory_breakdown"), bool),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), bool),
    "comms_logger": {"prof_ops": list, **dict.fromkeys(("enabled", "prof_all", "verbose", "debug"), bool)},
    "flops_profiler": {
        **dict.fromkeys(("enabled", "detailed"), bool),
        **dict.fromkeys(("profile_step", "top_modules"), 0),
        "module_depth": -1,
        "recompute_fwd_factor": 0.0,
        "output_file": str,
    },
    "aio": {
        **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), 0),
        **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), bool),
    },
}
KINDS = {bool: "true or false", str: "a string", list: "a list"}


def load_deepspeed_config(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The checked content of a phase's DeepSpeed file, with overrides `a.b=value` from the command line.

    Raises ValueError for a missing or unknown key and for a value of the wrong kind or range.
    """
    config = read_with_overrides(path, overrides)
    check_deepspeed_config(config, str(path))
    return config


def read_with_overrides(path: str | Path | None, overrides: Sequence[str]) -> dict:
    """The unchecked content of a DeepSpeed file ({} for None) with overrides `a.b=value`."""
    config = {} if path is None else read_json(path, dict)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override}: expected KEY=VALUE, as in --set optimizer.params.lr=0.004")
        target = config
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override}: {parent} is a value, not a block, so it cannot contain {last}")
        target[last] = _json_or_text(value)
    return config


def _json_or_text(text: str) -> Any:
    """The value of a JSON text; other text unchanged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_deepspeed_config(config: dict, path: str) -> None:
    """Raise ValueError for what DeepSpeed would silently accept or reject only later."""
    check_keys(config, (*REQUIRED_KEYS, *ENGINE_SETTINGS), path)
    for key in REQUIRED_KEYS:
        if key not in config:
            raise ValueError(f"{path}: {key!r} is missing; see ds_configs/README.md for a complete file")
    check_engine_settings({key: value for key, value in config.items() if key not in REQUIRED_KEYS}, path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        check_number(config[key], f"{path}: {key}", low=1, whole=True)
    kind, params = _named_block(config, "optimizer", OPTIMIZER_DEFAULTS, path)
    check_keys(params, OPTIMIZER_DEFAULTS[kind], f"{path}: optimizer.params")
    _check_optimizer({**OPTIMIZER_DEFAULTS[kind], **params}, f"{path}: optimizer.params")
    kind, params = _named_block(config, "scheduler", SCHEDULES, path)
    check_keys(params, (*COMMON_KEYS, *SCHEDULES[kind]), f"{path}: scheduler.params")
    check_schedule(kind, params, f"{path}: scheduler.params")


def check_engine_settings(config: dict, path: str) -> None:
    """Raise ValueError for unknown keys, values that ENGINE_SETTINGS does not allow, and settings that conflict."""
    check_keys(config, ENGINE_SETTINGS, path)
    for key, value in config.items():
        _check_setting(value, ENGINE_SETTINGS[key], f"{path}: {key}")
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
        raise ValueError(f"{path}: bf16 and fp16 are both enabled; disable one")
    if stage == 0 and precision != "fp32":
        raise ValueError(
            f"{path}: 16-bit training is not supported at zero_optimization.stage=0, where DeepSpeed's optimizer takes"
            " a first step before LAMB is bound; choose stage 1, which costs the same on one device"
        )
    if stage == 0 and config.get("data_types", {}).get("grad_accum_dtype") not in (None, precision):
        raise ValueError(
            f"{path}: data_types.grad_accum_dtype at zero_optimization.stage=0 can only be {precision!r}, the model's;"
            " leave it out, or choose stage 1, 2 or 3"
        )


def precision_of(config: dict) -> str:
    """The precision of weights and activations, one of PRECISIONS."""
    return next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), "fp32")


def _check_setting(value: Any, rule: Any, name: str) -> None:
    """Raise ValueError unless `value` fits its rule in ENGINE_SETTINGS. An integer may be written as 5e8."""
    if isinstance(rule, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name}={value!r} must be an object with keys of its own: {', '.join(rule)}")
        check_keys(value, rule, name)
        for key in value:
            _check_setting(value[key], rule[key], f"{name}.{key}")
    elif isinstance(rule, tuple):
        if not any(value == choice and type(value) is type(choice) for choice in rule):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(json.dumps, rule))}")
    elif rule in KINDS:
        if type(value) is not rule:
            raise ValueError(f"{name}={value!r} must be {KINDS[rule]}")
    elif isinstance(rule, int) and isinstance(value, float) and value.is_integer():
        check_number(int(value), name, rule, whole=True)
    else:
        check_number(value, name, rule, whole=isinstance(rule, int))


def _check_optimizer(params: dict, where: str) -> None:
    """Raise ValueError for the first invalid value of LAMB or AdamW."""
    check_number(params["lr"], f"{where}.lr")
    check_number(params["eps"], f"{where}.eps", exclude=0)
    check_number(params["weight_decay"], f"{where}.weight_decay")
    betas, lowest, highest = params["betas"], params.get("min_trust_ratio"), params.get("max_trust_ratio")
    if not (isinstance(betas, list | tuple) and len(betas) == 2):
        raise ValueError(f"{where}.betas={betas!r} must be two numbers, such as [0.9, 0.999]")
    for beta in betas:
        check_number(beta, f"{where}.betas", high=1, exclude=1)
    if lowest is not None:
        check_number(lowest, f"{where}.min_trust_ratio")
    if highest is not None:
        check_number(highest, f"{where}.max_trust_ratio", low=lowest or 0, exclude=lowest or 0)


def _named_block(config: dict, name: str, known: Iterable[str], path: str) -> tuple[str, dict]:
    """The type and the params of an `optimizer` or `scheduler` block."""
    block = config[name]
    if not isinstance(block, dict) or not isinstance(block.get("params"), dict):
        raise ValueError(f'{path}: {name} must be {{"type": ..., "params": {{...}}}}')
    check_keys(block, ("type", "params"), f"{path}: {name}")
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in known:
        choices = ", ".join(known)
        raise ValueError(f"{path}: {name}.type={kind!r} is unknown; choose {choices}{nearest(str(kind), known)}")
    return kind, block["params"]


def num_accumulation_steps(config: dict, dp_size: int) -> int:
    """Micro-batches per rank and step; ValueError if the batch cannot be divided evenly over the ranks."""
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
    """DeepSpeed's config: the file without optimizer and scheduler, plus the keys that a client optimizer needs."""
    derived = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
    return {
        "steps_per_print": 10**9,
        **derived,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def settings_of_results(config: dict) -> dict:
    """The settings that determine a run's results, with defaults filled in.

    All others (ZeRO, offload, micro-batches) decide where and how the same numbers are computed, up to rounding.
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
            if key != "enabled" and value != PRECISION_DEFAULTS[precision][key]
        },
        "grad_accum_dtype": None if accumulated == precision else accumulated,
        "communication_data_type": None if sent == precision else sent,
        "quantized": sorted(key for key, value in zero.items() if key.startswith("zero_quantized") and value),
    }
