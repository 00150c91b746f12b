"""The one place that calls `deepspeed.initialize`: pretraining and fine-tuning both get their engine here."""

import logging
import math

import torch
from torch import nn

from pretrain.deepspeed_config import OPTIMIZER_DEFAULTS, engine_config
from pretrain.lamb import Lamb, param_groups
from pretrain.layout import Layout

logging.disable(logging.WARNING)  # importing DeepSpeed warns that there is no GPU
import deepspeed  # noqa: E402
from deepspeed.runtime.utils import clip_grad_norm_  # noqa: E402

logging.disable(logging.NOTSET)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def build_optimizer(module: nn.Module, block: dict) -> torch.optim.Optimizer:
    """Lamb or torch's AdamW from the file's `optimizer` block, without weight decay for biases and LayerNorm."""
    params = {**OPTIMIZER_DEFAULTS[block["type"]], **block["params"]}
    groups = param_groups(module, params.pop("weight_decay"))
    return Lamb(groups, **params) if block["type"] == "Lamb" else torch.optim.AdamW(groups, **params)


def initialize_engine(
    module: nn.Module, config: dict, layout: Layout
) -> tuple[deepspeed.DeepSpeedEngine, torch.optim.Optimizer]:
    """The DeepSpeed engine of a module and its optimizer; a Lamb is bound to the engine's partitions."""
    optimizer = build_optimizer(module, config["optimizer"])
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=engine_config(config), mpu=layout)
    if isinstance(optimizer, Lamb):
        optimizer.bind(engine)
    return engine, optimizer


def update_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Run the `engine.step()` that updates the weights. Collective.

    Afterwards `engine.get_global_grad_norm()` is the norm before clipping, also without ZeRO in fp32, where DeepSpeed
    computes the norm but does not keep it.
    """
    if engine.optimizer is engine.basic_optimizer:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), math.inf, mpu=engine.mpu)
    engine.step()


def step_without_update(engine: deepspeed.DeepSpeedEngine) -> None:
    """End a step on all ranks without updating weights or moments.

    DeepSpeed runs its complete step, at every ZeRO stage, but with an optimizer step that does nothing.
    """
    engine.basic_optimizer.step = lambda: None  # shadows the method of the class
    update_weights(engine)
    del engine.basic_optimizer.step
    if engine.was_step_applied():  # DeepSpeed has already counted a step that overflowed
        engine.skipped_steps += 1  # updates = all steps - skipped steps
