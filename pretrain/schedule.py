"""Step -> learning rate: a pure function, so that a resume needs no state.

A `scheduler` block of the DeepSpeed file is {"type", "params"}. Every type has linear warm-up, the run's length and a
floor (COMMON_KEYS), some have keys of their own. The peak rate has one home, `optimizer.params.lr`. After the warm-up,
the way from `end_lr` to the peak is multiplied by

    WarmupPolynomialLR    (1 - step / total) ** degree      google-research/bert (degree 1), NVIDIA's LAMB recipe (0.5)
    WarmupLinearLR        1 - step / total
    WarmupConstantLR      1
    WarmupCosineLR        (1 + cos(pi x)) / 2, x the share of the steps after the warm-up (Loshchilov and Hutter 2017)
    WarmupInverseSqrtLR   (warmup / step) ** 0.5            Vaswani et al. 2017, 5.3
    WarmupExponentialLR   decay_rate ** ((step - warmup) / decay_steps)

The last is what DeepSpeed published for BERT (DeepSpeedExamples, bing_bert, --lr_schedule EE): 10 % less in every 250
steps, little by little, after a warm-up that grows with the square of the step (`warmup_degree` 2). Its --lr_offset of
1e-3 is added to all rates: here `warmup_min_lr` and `end_lr` are the offset, and the peak holds it too.
"""

import math
from collections.abc import Mapping

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


def learning_rate(scheduler: Mapping, peak_lr: float, step: int) -> float:
    """Rate of step `step` (0-based) by a `scheduler` block: warm-up to `peak_lr`, then decay, not below `end_lr`.

    Polynomial and linear decay are counted from step 0, as in google-research/bert (`create_optimizer`): they start
    below the peak when the warm-up ends. The first step already has a rate above zero.
    """
    kind, params = scheduler["type"], {**COMMON_KEYS, **SCHEDULES[scheduler["type"]], **scheduler["params"]}
    warmup = num_warmup_steps(params)
    if step < warmup:
        share = ((step + 1) / warmup) ** params["warmup_degree"]
        return params["warmup_min_lr"] + (peak_lr - params["warmup_min_lr"]) * share
    return params["end_lr"] + (peak_lr - params["end_lr"]) * _decay(kind, params, warmup, step)


def _decay(kind: str, params: Mapping, warmup: int, step: int) -> float:
    """What a step after the warm-up has of the way from the end rate to the peak, in [0, 1]."""
    total = params["total_num_steps"]
    if kind == "WarmupConstantLR":
        return 1.0
    if kind == "WarmupCosineLR":
        return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2
    if kind == "WarmupInverseSqrtLR":
        return math.sqrt(max(1, warmup) / max(1, step))
    if kind == "WarmupExponentialLR":
        return params["decay_rate"] ** ((step - warmup) / params["decay_steps"])
    degree = params["degree"] if kind == "WarmupPolynomialLR" else 1.0
    return max(0.0, 1 - step / total) ** degree


def num_warmup_steps(params: Mapping) -> int:
    """Warm-up in steps, from `warmup_num_steps` or `warmup_proportion` of the total."""
    if params.get("warmup_num_steps") is not None:
        return int(params["warmup_num_steps"])
    return round(params.get("warmup_proportion", 0.0) * params["total_num_steps"])


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number; it reads NaN and 1e400 as floats, and true is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_schedule(kind: str, params: Mapping, where: str) -> None:
    """Raises ValueError for values that make no schedule; `where` names the file and the block."""
    for key in ("total_num_steps", *(key for key, default in SCHEDULES[kind].items() if default is None)):
        if key not in params:
            raise ValueError(f"{where}.{key} is missing; {kind} needs it")
    whole = ("total_num_steps", "warmup_num_steps")
    for key, value in params.items():
        if not is_number(value) or value < 0 or (key in whole and type(value) is not int):
            raise ValueError(f"{where}.{key}={value!r} is not a positive {'whole ' if key in whole else ''}number")
    if params["total_num_steps"] < 1:
        raise ValueError(f"{where}.total_num_steps={params['total_num_steps']} is not a positive whole number")
    if "warmup_num_steps" in params and "warmup_proportion" in params:
        raise ValueError(f"{where} has warmup_num_steps and warmup_proportion; leave one out")
    if not params.get("warmup_proportion", 0) <= 1:
        raise ValueError(f"{where}.warmup_proportion={params['warmup_proportion']} is not a share in [0, 1]")
    if kind == "WarmupExponentialLR" and not (0 < params["decay_rate"] <= 1 and params["decay_steps"] > 0):
        raise ValueError(
            f"{where}.decay_rate={params['decay_rate']}, decay_steps={params['decay_steps']}: a share in (0, 1] that is"
            " left after a positive number of steps, as 0.9 after 250"
        )
