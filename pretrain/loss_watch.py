"""Checks of each step's loss: not finite, a spike, or repeated overflow in fp16."""

import math

SPIKE_MEMORY = 0.99  # decay of the running mean of the loss, which covers about the last hundred steps
DEFAULT_SCALE_POWER = 16  # DeepSpeed's initial fp16 loss scale is 2 to this power


class LossWatch:
    """Checks every step's loss, and whether fp16 skipped its update because a gradient overflowed.

    `mean` is the running mean of the loss from the checkpoint, if the run resumes from one.
    """

    def __init__(self, fp16: dict, spike_factor: float | None, mean: float | None = None):
        self.max_overflows = fp16.get("initial_scale_power", DEFAULT_SCALE_POWER)
        self.min_scale = fp16.get("min_loss_scale", 1)
        self.spike_factor = spike_factor
        self.mean = mean
        self.num_overflows = 0  # consecutive

    def fault(self, loss: float, overflowed: bool, loss_scale: float) -> str | None:
        """Why the run cannot continue; None if it can.

        Each overflow halves the loss scale. Once it has fallen to 1 or to its minimum, a smaller one would not help.
        """
        self.num_overflows = self.num_overflows + 1 if overflowed else 0
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if overflowed and (self.num_overflows >= self.max_overflows or loss_scale <= self.min_scale):
            return f"the gradients overflowed in {self.num_overflows} consecutive steps, loss scale {loss_scale:g}"
        return None

    def spike(self, loss: float) -> float | None:
        """Update the running mean. Returns the previous mean if `loss` exceeds `spike_factor` times it, else None.

        Spikes count in the mean too, so a loss that stays high counts as a spike for only about a hundred steps.
        """
        before = self.mean
        self.mean = loss if before is None else SPIKE_MEMORY * before + (1 - SPIKE_MEMORY) * loss
        is_spike = self.spike_factor is not None and before is not None and loss > self.spike_factor * before
        return before if is_spike else None
