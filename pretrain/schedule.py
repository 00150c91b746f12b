"""Step -> learning rate: a pure function, so that a resume needs no state.

`scheduler` blocks of the DeepSpeed file: {"type": "WarmupPolynomialLR", "params": {"total_num_steps",
"warmup_proportion" or "warmup_num_steps", "degree", "end_lr"}}. The peak rate has one home, `optimizer.params.lr`.
"""

from collections.abc import Mapping

DEFAULTS = {"total_num_steps": None, "warmup_num_steps": None, "warmup_proportion": 0.0, "degree": 1.0, "end_lr": 0.0}


def learning_rate(params: Mapping, peak_lr: float, step: int) -> float:
    """Rate of step `step` (0-based): linear warm-up to `peak_lr`, then (1 - step / total) ** `degree` of it, not below
    `end_lr`.

    The decay is counted from step 0, as in google-research/bert (`create_optimizer`, degree 1) and in NVIDIA's LAMB
    recipe (degree 0.5, warm-up 0.2843): it starts below the peak when the warm-up ends. The first step already has a
    rate above zero.
    """
    params = {**DEFAULTS, **params}
    total = params["total_num_steps"]
    warmup = num_warmup_steps(params)
    if step < warmup:
        return peak_lr * (step + 1) / warmup
    remaining = max(0.0, 1 - step / total)
    return params["end_lr"] + (peak_lr - params["end_lr"]) * remaining ** params["degree"]


def num_warmup_steps(params: Mapping) -> int:
    """Warm-up in steps, from `warmup_num_steps` or `warmup_proportion` of the total."""
    if params.get("warmup_num_steps") is not None:
        return int(params["warmup_num_steps"])
    return round(params.get("warmup_proportion", 0.0) * params["total_num_steps"])
