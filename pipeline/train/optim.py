"""Optimizers over `ParamGroup`s: schedules, freezing and clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from methods.parts.contract import ParamGroup
from methods.parts.distributed import all_reduce_sum, own_shard
from methods.parts.schedules import cosine, falling_steps, warmup_cosine
from pipeline.config import OptimConfig
from pipeline.resolve import Resolved


class _LayerwiseSGD(Optimizer):
    """SGD with momentum on gradients that are rescaled for each parameter: m = momentum m + g', p -= lr m.

    Parameters without a gradient are skipped, momentum included.
    """

    rate_in_momentum = False  # m = momentum m + lr g', p -= m

    def __init__(
        self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001, eps: float = 1e-8
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            directions = self.scaled(params, grads, group)
            buffers = []
            for p in params:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(state["momentum_buffer"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions, alpha=group["lr"] if self.rate_in_momentum else 1)
            torch._foreach_add_(params, buffers, alpha=-1 if self.rate_in_momentum else -group["lr"])

    def scaled(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return the rescaled gradients g', one for each parameter."""
        raise NotImplementedError


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return the norm of each tensor, `(N,)`, in float32 at least, because squares in half precision overflow.

    With sharded tensors all workers call it together.
    """
    if isinstance(tensors[0], DTensor):
        return all_reduce_sum(_norms([own_shard(t) for t in tensors]).square()).sqrt()
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
    return torch.stack(torch._foreach_norm(wide))


def _scale_(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its own factor, `(N,)`, in place.

    `torch._foreach_mul_` launches one kernel for each tensor if the factors are on the device. Vectors, which are many and short, are
    concatenated, so only the larger tensors have a kernel each.
    """
    pairs = list(zip(tensors, factors.unbind(), strict=True))
    for tensor, factor in pairs:
        if tensor.ndim != 1:
            tensor.mul_(factor)
    vectors = [(tensor, factor) for tensor, factor in pairs if tensor.ndim == 1]
    if vectors:
        joined = torch.cat([v for v, _ in vectors]) * torch.cat([factor.expand(len(v)) for v, factor in vectors])
        torch._foreach_copy_([v for v, _ in vectors], joined.split([len(v) for v, _ in vectors]))


class LARC(_LayerwiseSGD):
    """Layer-wise adaptive rate, apex's rule without clipping (SwAV).

    If both norms are positive, g' = a (g + wd p) with a = trust |p| / (|g| + wd |p| + eps); else g' = g, not decayed.
    Groups with `adapt=False` use g' = g + wd p.
    """

    def scaled(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        decay = group["weight_decay"]
        decayed = list(torch._foreach_add(grads, params, alpha=decay))
        if group["adapt"]:
            p_norms, g_norms = _norms(params), _norms(grads)
            rates = group["trust"] * p_norms / (g_norms + decay * p_norms + group["eps"])
            # p = 0: g + wd p is g already; only g = 0: the factor 0 removes wd p
            _scale_(decayed, torch.where((p_norms > 0) & (g_norms > 0), rates, (p_norms == 0).to(rates.dtype)))
        return decayed


class LARS(_LayerwiseSGD):
    """Layer-wise adaptive rate scaling as in BYOL's code: g' = r (g + wd p), r = trust |p| / |g + wd p|.

    r = 1 if a norm is 0, so weights that start at zero move. Vectors (biases, scales and shifts of norms) neither adapt
    nor decay: g' = g. Groups with `adapt=False` use g' = g + wd p.
    """

    def scaled(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        places = [i for i, p in enumerate(params) if p.ndim > 1]
        if not places:
            return grads
        weights = [params[i] for i in places]
        decayed = list(torch._foreach_add([grads[i] for i in places], weights, alpha=group["weight_decay"]))
        if group["adapt"]:
            p_norms, g_norms = _norms(weights), _norms(decayed)
            rates = group["trust"] * p_norms / g_norms
            _scale_(decayed, torch.where((p_norms > 0) & (g_norms > 0), rates, torch.ones_like(rates)))
        result = list(grads)
        for i, direction in zip(places, decayed, strict=True):
            result[i] = direction
        return result


class ClassicLARS(LARS):
    """LARS as in SimCLR's code: the momentum holds steps, m = momentum m + lr g', p -= m.

    It equals `LARS` while the learning rate is constant.
    """

    rate_in_momentum = True


LAYERWISE = {"larc": LARC, "lars": LARS, "lars-classic": ClassicLARS}


def build_optimizer(config: OptimConfig, groups: Iterable[ParamGroup]) -> Optimizer:
    """Return the configured optimizer over a method's parameter groups."""
    settings: list[dict[str, Any]] = []
    for group in groups:
        one: dict[str, Any] = {
            "params": group.params,
            "weight_decay": config.weight_decay if group.decay else 0.0,
            "lr_scale": group.lr_scale,
            "lr_constant": group.lr_constant,
            "decay": group.decay,
            "clip": group.clip,
            "frozen_steps": group.frozen_steps,
            "module": group.module,
        }
        if config.name in LAYERWISE:
            one["adapt"] = group.adapt
        settings.append(one)
    if config.name == "adamw":
        return torch.optim.AdamW(settings, lr=config.base_lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(settings, lr=config.base_lr, momentum=config.momentum)
    return LAYERWISE[config.name](settings, lr=config.base_lr, momentum=config.momentum, trust=config.trust_coefficient)


def scheduled_lr(resolved: Resolved, step: int) -> float:
    """Return the learning rate of the step after `step` completed ones."""
    if resolved.milestones is not None and step >= resolved.zero_lr_steps + resolved.warmup_steps:
        return falling_steps(step, total_steps=resolved.facts.total_steps, base=resolved.lr, milestones=resolved.milestones)
    return warmup_cosine(
        step,
        total_steps=resolved.cosine_steps,
        warmup_steps=resolved.warmup_steps,
        start=resolved.start_lr,
        base=resolved.lr,
        final=resolved.final_lr,
        zero_lr_steps=resolved.zero_lr_steps,
        reaches_base=resolved.warmup_reaches_base,
    )


def scheduled_weight_decay(resolved: Resolved, step: int) -> float | None:
    """Return the weight decay of the step after `step` completed ones, a cosine without warm-up; None = constant."""
    return cosine(step, resolved.cosine_steps, *resolved.weight_decays) if resolved.weight_decays else None


def prepare_step(
    optimizer: Optimizer, resolved: Resolved, step: int, clip_norm: float | None, clip_scope: Literal["joint", "module", "tensor"] = "joint"
) -> Tensor | None:
    """Set the learning rates and weight decays, drop the gradients of frozen groups and clip the rest.

    Returns:
        The norm of the joint gradient before clipping; None without clipping.
    """
    lr, decay = scheduled_lr(resolved, step), scheduled_weight_decay(resolved, step)
    modules: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * (resolved.lr if group["lr_constant"] else lr)
        if decay is not None and group["decay"]:
            group["weight_decay"] = decay
        if step < group["frozen_steps"]:
            for p in group["params"]:
                p.grad = None
        if group["clip"]:
            modules.setdefault(group["module"] if clip_scope == "module" else "", []).extend(group["params"])
    if clip_norm is None:
        return None
    if clip_scope == "tensor":
        return clip_each_(modules.get("", []), clip_norm)
    if not modules:
        return torch.zeros(())
    norms = [clip_together_(params, clip_norm) for params in modules.values()]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


@torch.no_grad()
def clip_together_(params: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Clip the joint gradient of parameter tensors, in place: g <- g min(1, largest / (|g| + 1e-6)), |g| the joint norm.

    `torch.nn.utils.clip_grad_norm_` does the same, with a collective call for each sharded tensor; here one call serves all.

    Returns:
        The norm before clipping.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(_norms(grads))
    torch._foreach_mul_([own_shard(g) for g in grads], (largest / (norm + 1e-6)).clamp(max=1))
    return norm


@torch.no_grad()
def clip_each_(params: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Clip the gradient of each parameter tensor, in place: g <- g min(1, largest / (|g| + 1e-6)).

    Returns:
        The norm of the joint gradient before clipping.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = _norms(grads)
    _scale_([own_shard(g) for g in grads], (largest / (norms + 1e-6)).clamp(max=1))
    return torch.linalg.vector_norm(norms)
