"""The one place that calls `deepspeed.initialize`: pre-training and fine-tuning both get their engine here."""

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
    """Lamb or torch's AdamW from the `optimizer` block of the DeepSpeed file; bias and LayerNorm are not decayed."""
    params = {**OPTIMIZER_DEFAULTS[block["type"]], **block["params"]}
    groups = param_groups(module, params.pop("weight_decay"))
    if block["type"] == "Lamb":
        return Lamb(groups, **params)
    return torch.optim.AdamW(groups, **params)


def initialize_engine(module: nn.Module, config: dict, layout: Layout):
    """(DeepSpeed engine, its optimizer) for a module and a DeepSpeed file's content; a Lamb is bound to the engine's
    partitions.
    """
    optimizer = build_optimizer(module, config["optimizer"])
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=engine_config(config), mpu=layout)
    if isinstance(optimizer, Lamb):
        optimizer.bind(engine)
    return engine, optimizer


def update_weights(engine) -> None:
    """The last `engine.step()` of a step; then `engine.get_global_grad_norm()` is its gradients' norm before clipping
    at every ZeRO stage. Without ZeRO, in fp32, DeepSpeed itself clips by that norm and forgets it. Collective.
    """
    if engine.optimizer is engine.basic_optimizer:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), math.inf, mpu=engine.mpu)
    engine.step()


def step_without_update(engine) -> None:
    """The end of a step whose gradients are dropped, on all ranks: DeepSpeed does all that it does in a step, but the
    optimizer, which it tells to update, does nothing. So weights and moments stay as they are at every ZeRO stage.
    """
    engine.basic_optimizer.step = lambda: None  # hides the method of its class
    update_weights(engine)
    del engine.basic_optimizer.step
    engine.skipped_steps += int(engine.was_step_applied())  # steps less skipped ones are updates; overflows are counted
