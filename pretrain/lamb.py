"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2), exact under ZeRO 0-3 and tensor
parallelism.

LAMB scales each tensor's update by its trust ratio |w| / |update|. ZeRO gives the optimizer flat partitions that may
begin and end inside a tensor, and tensor parallelism gives it slices. Trust ratios of these pieces would be silently
wrong. So `Lamb.bind(engine)` records where each tensor lies in the partitions. A step sums the squared norms of each
tensor over the ranks, in one or two small all-reduces per parameter group, and every rank scales its parts by the
ratios of the whole tensors:

    flat partition of rank 0   [ word embedding .................. | query 0 ... ]
    flat partition of rank 1   [ ... query 0 | key 0 | value 0 | ... | padding ]

This file needs only torch and works in any DeepSpeed project: build `Lamb` as a client optimizer with
"zero_allow_untested_optimizer": true, then call `deepspeed.initialize`, `optimizer.bind(engine)` and
`engine.load_checkpoint`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """The part of one tensor in one flat partition, `flat[start : start + numel]`; empty if `numel` is 0."""

    name: str
    start: int
    numel: int
    tensor_start: int  # where the part begins in this tensor-parallel rank's slice of the tensor, flattened
    is_split: bool  # over tensor-parallel ranks, so its squared norm is a sum over them

    def of(self, flat: Tensor) -> Tensor:
        """This part as a view of its partition."""
        return flat.view(-1)[self.start : self.start + self.numel]


def param_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices with weight decay, vectors and scalars without.

    In BERT, the second holds biases and LayerNorm (google-research/bert, `exclude_from_weight_decay`).
    """
    decayed, plain = [], []
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under deepspeed.zero.Init every parameter is flat
        (decayed if len(shape) > 1 else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def fragments_by_partition(engine) -> dict[Tensor, list[Fragment]]:
    """The fragments of a group's tensors in each flat partition of the optimizer, in the same order on all ranks.

    Without ZeRO each tensor is a partition. ZeRO 1 and 2 cut a group's concatenated tensors into equal partitions. ZeRO
    3 cuts each tensor separately and pads the last rank's part.
    """
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return {flat: _stage3_fragments(tensors, names, engine) for flat, tensors in groups}
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        groups = enumerate(optimizer.single_partition_of_fp32_groups)
        return {flat: _stage12_fragments(optimizer, index, len(flat), names) for index, flat in groups}
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # ZeRO 1 in bf16 with fp32 accumulation
        groups = zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True)
        return {flat: [_linked_fragment(tensor, names[tensor]) for tensor in tensors] for flat, tensors in groups}
    if hasattr(optimizer, "fp32_groups"):  # no ZeRO, 16 bit: whole fp32 copies
        groups = zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
        pairs = [pair for copies, tensors in groups for pair in zip(copies, tensors, strict=True)]
    else:
        pairs = [(parameter, parameter) for parameter in names]
    return {copy: [Fragment(names[tensor], 0, tensor.numel(), 0, _is_split(tensor))] for copy, tensor in pairs}


def _is_split(tensor: Tensor) -> bool:
    """Whether Megatron's attribute, which DeepSpeed's gradient norm reads too, marks the tensor as split over tp."""
    return getattr(tensor, "tensor_model_parallel", False)


def _stage12_fragments(optimizer, group: int, size: int, names: dict) -> list[Fragment]:
    """The fragments of a group under ZeRO 1 and 2, from each tensor's offset in the concatenated group.

    The offsets follow the order of `round_robin_gradients`; the addresses that DeepSpeed links to the tensors do not.
    """
    start = dist.get_rank(optimizer.real_dp_process_group[group]) * size
    tensors, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
    fragments = []
    for tensor, offset in zip(tensors, offsets, strict=True):
        first, last = max(offset, start), min(offset + tensor.numel(), start + size)
        place = Fragment(names[tensor], first - start, last - first, first - offset, _is_split(tensor))
        fragments.append(place if first < last else Fragment(names[tensor], 0, 0, 0, _is_split(tensor)))
    return fragments


def _linked_fragment(tensor: Tensor, name: str) -> Fragment:
    """The fragment that DeepSpeed's bf16 optimizer links to a tensor; empty if this rank holds no part of it."""
    link = tensor._hp_mapping
    if link is None:
        return Fragment(name, 0, 0, 0, _is_split(tensor))
    address = link.get_hp_fragment_address()
    return Fragment(name, address.start, address.numel, link.lp_fragment_address.start, _is_split(tensor))


def _stage3_fragments(tensors: Iterable[Tensor], names: dict, engine) -> list[Fragment]:
    """The fragments of a group under ZeRO 3, which concatenates one padded part per tensor."""
    rank = dist.get_rank(engine.optimizer.dp_process_group)
    fragments, start = [], 0
    for tensor in tensors:
        size = tensor.partition_numel()
        valid = min(max(tensor.ds_numel - rank * size, 0), size)
        fragments.append(Fragment(names[tensor], start, valid, rank * size, _is_split(tensor)))
        start += size
    return fragments


class Lamb(torch.optim.Optimizer):
    """LAMB with the trust ratios of whole tensors, however a DeepSpeed engine has partitioned them.

    Args:
        params: parameters or groups of them, such as `param_groups(module, weight_decay)`
        lr, betas, eps, weight_decay: as in the paper
        bias_correction: of both moments (on in NVIDIA's recipe, off in DeepSpeed's)
        use_nvlamb: also scale groups without weight decay (biases and LayerNorm) by trust ratios; off in the authors'
            code (`exclude_from_layer_adaptation`) and in NVIDIA's
        min_trust_ratio, max_trust_ratio: limits of the ratio (none in the paper, 0.01 and 0.3 in DeepSpeed's recipe)

    The ratio is 1 if the weight or the update is zero. `weight_norms`, `update_norms` and `trust_ratios` hold the last
    step's values by tensor name, the same on all ranks.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        bias_correction=True,
        use_nvlamb=False,
        min_trust_ratio=0.0,
        max_trust_ratio=None,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.bias_correction = bias_correction
        self.use_nvlamb = use_nvlamb
        self.min_trust_ratio, self.max_trust_ratio = min_trust_ratio, max_trust_ratio
        # Reused, because on a CPU the page faults of new tensors cost more than the whole step.
        self._updates: dict[Tensor, Tensor] = {}
        self.weight_norms: dict[str, Tensor] = {}
        self.update_norms: dict[str, Tensor] = {}
        self.trust_ratios: dict[str, Tensor] = {}
        self.fragments = {
            tensor: [Fragment(str(index), 0, tensor.numel(), 0, False)]
            for index, tensor in enumerate(tensor for group in self.param_groups for tensor in group["params"])
            if not _is_split(tensor)
        }
        self.partition_group = self.split_group = None

    def bind(self, engine) -> None:
        """Record where each tensor lies. Call it once, after `deepspeed.initialize` and before `load_checkpoint`."""
        self.fragments = fragments_by_partition(engine)
        self._updates.clear()
        self.partition_group = getattr(engine.optimizer, "dp_process_group", None)
        self.split_group = engine.mpu.get_model_parallel_group() if engine.mpu is not None else None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the parameters that have gradients. Collective. RuntimeError if a tensor's partition is unknown."""
        assert closure is None, "LAMB does not re-evaluate the loss"
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict) -> None:
        flats = [tensor for tensor in group["params"] if tensor.grad is not None]
        if any(flat not in self.fragments for flat in flats):
            if not any(flat.grad.any() for flat in flats):
                return  # without ZeRO, DeepSpeed's 16-bit optimizer takes a step with zero gradients in initialize
            raise RuntimeError(
                "LAMB is not bound to the tensors it is asked to update: ZeRO or tensor parallelism cut them, and trust"
                " ratios of the pieces would be silently wrong. Call optimizer.bind(engine) after deepspeed.initialize,"
                " and again for a new engine."
            )
        if not flats:
            return
        updates = self._updates_of(flats, group)
        if group["weight_decay"] or self.use_nvlamb:
            self._move_by_trust_ratios(flats, updates, group["lr"])
        else:
            torch._foreach_add_(flats, updates, alpha=-group["lr"])

    def _updates_of(self, flats: list[Tensor], group: dict) -> list[Tensor]:
        """Update the moments and return algorithm 2's r + lambda w for each flat tensor w. r is the bias-corrected
        first moment over the root of the second.

        torch's fused AdamW makes one pass over memory and computes p (1 - lr d) - lr r. On a copy p of w, with lr = -1
        and d = lambda - 1, the result is lambda w + r.
        """
        for flat in flats:
            if not self.state[flat]:
                zeros = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
                self.state[flat].update(step=torch.zeros(()), **zeros)
            self.state[flat]["step"] = self.state[flat]["step"].to(flat.device)  # on the CPU after loading a checkpoint
            if flat not in self._updates:
                self._updates[flat] = torch.empty_like(flat)
        states = [self.state[flat] for flat in flats]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        if not self.bias_correction:
            steps = [torch.full_like(step, torch.inf) for step in steps]  # 1 - beta ** inf = 1
        updates = [self._updates[flat] for flat in flats]
        torch._foreach_copy_(updates, flats)
        torch._fused_adamw_(
            updates,
            [flat.grad for flat in flats],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=-1.0,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"] - 1.0,
            amsgrad=False,
            maximize=False,
        )
        return updates

    def _move_by_trust_ratios(self, flats: list[Tensor], updates: list[Tensor], lr: float) -> None:
        """Update each part of a tensor, scaled by the trust ratio of the whole tensor."""
        fragments, weights, steps = [], [], []
        for flat, update in zip(flats, updates, strict=True):
            for fragment in self.fragments[flat]:
                fragments.append(fragment)
                weights.append(fragment.of(flat))
                steps.append(fragment.of(update))
        ratios = self._trust_ratios(fragments, weights, steps)
        torch._foreach_addcmul_(weights, steps, list(ratios.unbind()), value=-lr)

    def _trust_ratios(self, fragments: list[Fragment], weights: list[Tensor], steps: list[Tensor]) -> Tensor:
        """[n] The trust ratios |w| / |update| of n whole tensors, from this rank's parts of them. Collective."""
        norms = [torch.stack(torch._foreach_norm(parts)) for parts in (weights, steps)]  # [n] each
        squares = torch.stack(norms).double() ** 2  # [2, n]
        if self.partition_group is not None:
            dist.all_reduce(squares, group=self.partition_group)
        split = [index for index, fragment in enumerate(fragments) if fragment.is_split]
        if split and self.split_group is not None:
            columns = torch.tensor(split, device=squares.device)
            shared = squares[:, columns].contiguous()
            dist.all_reduce(shared, group=self.split_group)
            squares[:, columns] = shared
        weight_norms, update_norms = squares.sqrt().float()
        ratios = (weight_norms / update_norms).clamp(self.min_trust_ratio, self.max_trust_ratio)
        ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
        names = [fragment.name for fragment in fragments]
        self.weight_norms.update(zip(names, weight_norms, strict=True))
        self.update_norms.update(zip(names, update_norms, strict=True))
        self.trust_ratios.update(zip(names, ratios, strict=True))
        return ratios
