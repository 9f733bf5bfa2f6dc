"""Batch norm over the joined batch of all workers, or over parts of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as timm_sync_batchnorm
from torch import Tensor, nn

from methods.parts.distributed import all_gather_small, all_reduce_sum, world_size
from methods.parts.numerics import upcast_half


# every batch norm of torch and, as their subclasses, of timm and of this file
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with training statistics over the rows of all workers: `(B, C)`, `(B, C, L)` or `(B, C, H, W)`, same shape out.

    With n_r, m_r, v_r the rows, mean and variance of worker r and N = sum n_r: m = sum n_r m_r / N,
    v = sum n_r (v_r + (m_r - m)^2) / N (Chan et al. 1983), which does not cancel as E[x^2] - m^2 does. Workers may hold
    different B. Without a process group, and in evaluation, it is torch's batch norm. torch's own SyncBatchNorm refuses
    CPU tensors.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return _local_batch_norm(self, input)
        out, mean, variance, rows = _SyncNormalize.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            _move_statistics(self, mean, variance * (rows / (rows - 1).clamp(min=1)))
        return out  # type: ignore[no-any-return]


class SyncBatchNormAct(SyncBatchNorm):
    """`SyncBatchNorm` in the place of timm's `BatchNormAct2d`: dropout and activation follow it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]


def _local_batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Apply torch's batch norm to an input of any number of dimensions, over the rows of this worker."""
    if not norm.track_running_stats:
        return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    momentum = _count_step(norm) if norm.training else 0.0
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, momentum, norm.eps)


def _count_step(norm: nn.BatchNorm2d) -> float:
    """Count a step and return the weight with which its statistics enter the running ones."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)


@torch.no_grad()
def _move_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    weight = _count_step(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), weight)


class _SyncNormalize(torch.autograd.Function):
    """(x - m) / sqrt(v + eps) * weight + bias over all workers. Weight and bias get the gradient of this worker's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        unused = upcast_half(x.new_zeros(channels))  # float32 beside bf16: the kernel then computes in float32, without a copy of x
        mean, variance = torch.batch_norm_update_stats(x.detach(), unused, unused, 0.0)  # this worker's, in one pass over x
        own = torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])
        every = all_gather_small(own)  # (W, 2 C + 1)
        means, variances, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.has_bias = eps, bias is not None
        out = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Return dx = (dy - sum(dy) / N - z sum(dy z) / N) weight / sqrt(v + eps), with z the N normalised rows, and both sums.

        The sums in dx are over all workers. A batch norm in evaluation does the work: its gradients are both sums of this worker
        and the first term of dx, and its values are z times a factor plus an offset. It computes in float32 what it stores as bf16.
        """
        x, weight, mean, variance, total = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        factor = torch.ones_like(mean) if weight is None else weight.detach()
        leaves = [value.detach().requires_grad_() for value in (x, factor, torch.zeros_like(factor))]
        with torch.enable_grad():
            evaluated = F.batch_norm(leaves[0], mean, variance, leaves[1], leaves[2], False, 0.0, ctx.eps)
        dx, dweight, dbias = torch.autograd.grad(evaluated, leaves, gradients[0])
        sums = all_reduce_sum(torch.stack([dbias, dweight])) / total
        dx += F.batch_norm(x, mean, variance, -scale * factor * sums[1], -scale * factor * sums[0], False, 0.0, ctx.eps)
        return dx, None if weight is None else dweight, dbias if ctx.has_bias else None, None


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm with training statistics of each of `groups` parts of the batch of all workers.

    Input and output are `(B, C)`, `(B, C, L)` or `(B, C, H, W)`. A worker holds groups / W parts of consecutive rows, at
    least one. So one worker with groups = W does the same as W workers that do not synchronise. Running statistics move once
    a step, by the mean over this worker's parts.
    """

    groups: int = 1

    def forward(self, input: Tensor) -> Tensor:
        parts = min(max(1, self.groups // world_size()), max(1, len(input) // 2))
        if not self.training or parts == 1:
            return _local_batch_norm(self, input)
        means, variances = (torch.zeros(parts, self.num_features, device=input.device, dtype=upcast_half(input).dtype) for _ in range(2))
        out = [  # with a momentum of 1 the buffers receive the statistics of the part
            F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for x, mean, variance in zip(_consecutive(input, parts), means, variances, strict=True)
        ]
        if self.track_running_stats:
            _move_statistics(self, means.mean(0), variances.mean(0))
        return torch.cat(out)


def _consecutive(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split rows as `tensor_split` does, but by one op, whose gradient is one concatenation; a slice's is a batch of zeros."""
    shorter, longer = divmod(len(x), parts)
    return torch.split(x, [shorter + 1] * longer + [shorter] * (parts - longer))


class SplitBatchNormAct(SplitBatchNorm):
    """`SplitBatchNorm` in the place of timm's `BatchNormAct2d`: dropout and activation follow it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]


def convert_sync_batchnorm(module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Replace every batch norm by one over all workers; names, parameters and buffers stay the same objects.

    A `SplitBatchNorm` stays: its method wants statistics of parts. On a GPU the new norms are torch's and timm's, which
    refuse CPU tensors; on a CPU they are those of this file.

    Returns:
        The module; another one if it is a batch norm itself.
    """
    if torch.device(device).type == "cpu":
        return _replaced(module, SyncBatchNorm, SyncBatchNormAct)
    if isinstance(module, BATCH_NORMS):
        keeps = isinstance(module, (SplitBatchNorm, nn.SyncBatchNorm))
        return module if keeps else timm_sync_batchnorm(module)  # torch's, or timm's with its activation
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, device))
    return module


def convert_split_batchnorm(module: nn.Module, groups: int) -> nn.Module:
    """Replace every batch norm by one over `groups` parts; names, parameters and buffers stay the same objects.

    Returns:
        The module; another one if it is a batch norm itself.
    """
    module = _replaced(module, SplitBatchNorm, SplitBatchNormAct)
    for norm in module.modules():
        if isinstance(norm, SplitBatchNorm):
            norm.groups = groups
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether there is a batch norm inside."""
    return any(isinstance(m, BATCH_NORMS) for m in module.modules())


def _replaced(module: nn.Module, plain: type[nn.BatchNorm2d], with_activation: type[nn.BatchNorm2d]) -> nn.Module:
    if isinstance(module, BATCH_NORMS) and not isinstance(module, (plain, SplitBatchNorm, nn.SyncBatchNorm)):
        kind = with_activation if isinstance(module, BatchNormAct2d) else plain
        twin = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta")
        twin.weight, twin.bias = module.weight, module.bias
        twin.running_mean, twin.running_var = module.running_mean, module.running_var
        twin.num_batches_tracked = module.num_batches_tracked
        if isinstance(module, BatchNormAct2d):
            twin.drop, twin.act = module.drop, module.act
        return twin.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, plain, with_activation))
    return module


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Replace the running statistics of every batch norm by their mean over the workers; they differ where norms are not synchronised."""
    buffers = [b for m in module.modules() if isinstance(m, BATCH_NORMS) for b in (m.running_mean, m.running_var) if b is not None]
    if world_size() == 1 or not buffers:
        return
    flat = all_reduce_sum(torch.cat([b.flatten() for b in buffers])) / world_size()
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
