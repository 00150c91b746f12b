"""The one place that calls `deepspeed.initialize`: pretraining and fine-tuning both get their engine here."""

import logging
import math

import torch
from torch import nn

from pretrain.deepspeed_config import OPTIMIZER_DEFAULTS, engine_config
from pretrain.lamb import Lamb, param_groups
from pretrain.layout import Layout

logging.disable(logging.WARNING)  # its import warns that there is no GPU
import deepspeed  # noqa: E402
from deepspeed.runtime.utils import clip_grad_norm_  # noqa: E402

logging.disable(logging.NOTSET)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def build_optimizer(module: nn.Module, block: dict) -> torch.optim.Optimizer:
    """Lamb or torch's AdamW from the `optimizer` block of the DeepSpeed file; biases and LayerNorm are not decayed."""
    params = {**OPTIMIZER_DEFAULTS[block["type"]], **block["params"]}
    groups = param_groups(module, params.pop("weight_decay"))
    return Lamb(groups, **params) if block["type"] == "Lamb" else torch.optim.AdamW(groups, **params)


def initialize_engine(
    module: nn.Module, config: dict, layout: Layout
) -> tuple[deepspeed.DeepSpeedEngine, torch.optim.Optimizer]:
    """The DeepSpeed engine for a module and the content of a DeepSpeed file, and its optimizer.

    A Lamb is bound to the engine's partitions.
    """
    optimizer = build_optimizer(module, config["optimizer"])
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=engine_config(config), mpu=layout)
    if isinstance(optimizer, Lamb):
        optimizer.bind(engine)
    return engine, optimizer


def update_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """The last `engine.step()` of a step; collective.

    Afterwards `engine.get_global_grad_norm()` is the norm of the gradients before clipping at every ZeRO stage: without
    ZeRO, in fp32, DeepSpeed clips by that norm but does not keep it.
    """
    if engine.optimizer is engine.basic_optimizer:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), math.inf, mpu=engine.mpu)
    engine.step()


def step_without_update(engine: deepspeed.DeepSpeedEngine) -> None:
    """The end of a step whose gradients are dropped on all ranks; weights and moments stay as they are.

    DeepSpeed does all that belongs to a step, at every ZeRO stage, but calls an optimizer whose step does nothing.
    """
    engine.basic_optimizer.step = lambda: None  # shadows the method of the class
    update_weights(engine)
    del engine.basic_optimizer.step
    if engine.was_step_applied():  # a step that overflowed has been counted
        engine.skipped_steps += 1  # all steps minus the skipped ones are the updates
