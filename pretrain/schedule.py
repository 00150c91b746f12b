"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

The `scheduler` block of a DeepSpeed file is {"type", "params"}. COMMON_KEYS apply to every type; some types have more.
The peak rate is `optimizer.params.lr`. After the warm-up, the distance from `end_lr` to the peak is multiplied by

    WarmupPolynomialLR    (1 - step / total) ** degree      google-research/bert (degree 1), NVIDIA's LAMB recipe (0.5)
    WarmupLinearLR        1 - step / total
    WarmupConstantLR      1
    WarmupCosineLR        (1 + cos(pi x)) / 2, x the share of the steps after the warm-up (Loshchilov and Hutter 2017)
    WarmupInverseSqrtLR   (warmup / step) ** 0.5            Vaswani et al. 2017, section 5.3
    WarmupExponentialLR   decay_rate ** ((step - warmup) / decay_steps)

WarmupExponentialLR is DeepSpeed's published schedule for BERT (DeepSpeedExamples, bing_bert, --lr_schedule EE): a
warm-up with the square of the step (`warmup_degree` 2), then a continuous decay by 10 % per 250 steps. Its --lr_offset
of 1e-3 is added to all rates; here it is `warmup_min_lr` and `end_lr`, and the peak includes it.
"""

import math
from collections.abc import Mapping

from pretrain.json_values import check_number

COMMON_KEYS = {
    "total_num_steps": None,
    "warmup_num_steps": None,
    "warmup_proportion": 0.0,
    "warmup_degree": 1.0,
    "warmup_min_lr": 0.0,
    "end_lr": 0.0,
}
SCHEDULES = {
    "WarmupPolynomialLR": {"degree": 1.0},
    "WarmupLinearLR": {},
    "WarmupConstantLR": {},
    "WarmupCosineLR": {},
    "WarmupInverseSqrtLR": {},
    "WarmupExponentialLR": {"decay_rate": None, "decay_steps": None},
}
LIMITS = {  # of keys that do not accept every number of at least 0
    "total_num_steps": {"low": 1, "whole": True},
    "warmup_num_steps": {"whole": True},
    "warmup_proportion": {"high": 1},
    "decay_rate": {"high": 1, "exclude": 0},
    "decay_steps": {"exclude": 0},
}


def learning_rate(scheduler: Mapping, peak_lr: float, step: int) -> float:
    """The learning rate of step `step`, counted from 0: warm-up to `peak_lr`, then decay to `end_lr`.

    Polynomial and linear decay count from step 0, as in google-research/bert (`create_optimizer`), so they start below
    the peak when the warm-up ends. The rate of the first step is already above zero.
    """
    kind, params = scheduler["type"], {**COMMON_KEYS, **SCHEDULES[scheduler["type"]], **scheduler["params"]}
    warmup = num_warmup_steps(params)
    if step < warmup:
        start, share = params["warmup_min_lr"], ((step + 1) / warmup) ** params["warmup_degree"]
        return start + (peak_lr - start) * share
    return params["end_lr"] + (peak_lr - params["end_lr"]) * _decay(kind, params, warmup, step)


def _decay(kind: str, params: Mapping, warmup: int, step: int) -> float:
    """The factor in [0, 1] on the distance from `end_lr` to the peak, for a step after the warm-up."""
    total = params["total_num_steps"]
    match kind:
        case "WarmupConstantLR":
            return 1.0
        case "WarmupCosineLR":
            return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2
        case "WarmupInverseSqrtLR":
            return math.sqrt(max(1, warmup) / max(1, step))
        case "WarmupExponentialLR":
            return params["decay_rate"] ** ((step - warmup) / params["decay_steps"])
    return max(0.0, 1 - step / total) ** params.get("degree", 1.0)


def num_warmup_steps(params: Mapping) -> int:
    """Warm-up steps, from `warmup_num_steps` or from `warmup_proportion` of the total."""
    if params.get("warmup_num_steps") is not None:
        return int(params["warmup_num_steps"])
    return round(params.get("warmup_proportion", 0.0) * params["total_num_steps"])


def check_schedule(kind: str, params: Mapping, where: str) -> None:
    """Raise ValueError for missing, invalid or conflicting keys; `where` names the file and the block."""
    for key in ("total_num_steps", *SCHEDULES[kind]):
        if key not in params and SCHEDULES[kind].get(key) is None:
            raise ValueError(f"{where}.{key} is missing; {kind} needs it")
    for key, value in params.items():
        check_number(value, f"{where}.{key}", **LIMITS.get(key, {}))
    if "warmup_num_steps" in params and "warmup_proportion" in params:
        raise ValueError(f"{where} has warmup_num_steps and warmup_proportion; leave one out")
