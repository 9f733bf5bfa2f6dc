"""What the methods cost: one step of each beside the bare step (the same forwards, a trivial loss) and beside lightly's parts.

All contenders stand in one process on one batch of noise and take turns, round by round; a ratio is the median over
rounds, with an upper 95 % bound from a bootstrap of the rounds. The bare step repeats the calls of backbone and heads
that the method makes, an averaged network's included, with the mean of squares as its loss and the same optimizer.
lightly's parts are its heads, losses, memory banks and moving average, called through its API on the same backbone.
Memory is what a step keeps for its backward pass; on a GPU, the peak of what it allocates.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightly_parts import lightly_parts
from torch import Tensor, nn

from methods.parts.backbones import build_backbone
from methods.parts.contract import Method, ParamGroup, Progress, find
from methods.parts.errors import ConfigError
from methods.parts.views import Views
from pipeline.build import build_method
from pipeline.cli.overrides import configured
from pipeline.config import RunConfig
from pipeline.machine import choose_device, keep_freed_memory
from pipeline.recipes import entries, load_recipe
from pipeline.resolve import resolve
from pipeline.train.optim import build_optimizer


@dataclass
class Contender:
    """Something that makes training steps."""

    name: str
    forward: Callable[[], Tensor]  # the loss
    optimizer: torch.optim.Optimizer
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None

    def step(self) -> None:
        self.before()
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()


def of_noise(config: RunConfig, device: torch.device) -> Views:
    """One global batch of noise, of the recipe's crops."""
    torch.manual_seed(0)
    batch, groups = config.train.global_batch_size, {name: group for name, group in config.views.items() if group.count}
    stacks = {name: torch.randn(group.count * batch, 3, group.size, group.size, device=device) for name, group in groups.items()}
    ids, counts = torch.arange(batch), {name: group.count for name, group in groups.items()}
    roles = {name: group.role for name, group in groups.items()}
    return Views(stacks=stacks, counts=counts, roles=roles, image_ids=ids, labels=torch.full_like(ids, -1))


# ---------------------------------------------------------------------------- the method, and its bare step


def whole(method: Method, views: Views, config: RunConfig, progress: Progress) -> Contender:
    """The method's own step."""
    outputs: list[dict[str, Any]] = [{}]

    def forward() -> Tensor:
        out = method(views, progress, method.draw_masks(views, progress))
        outputs[0] = out.outputs
        return out.loss  # type: ignore[no-any-return]

    optimizer = build_optimizer(config.optim, method.param_groups())
    return Contender("ours", forward, optimizer, lambda: method.before_step(progress), lambda: method.after_step(outputs, progress))


@dataclass
class Call:
    """One call of a network inside a step. Its input is the output of an earlier call, or kept from the recorded step."""

    module: str
    source: int | None
    kept: Tensor | None
    rest: tuple[Any, ...]  # further inputs, such as which patches stay
    gradient: bool
    autocast: bool


def recorded(method: Method, views: Views, progress: Progress) -> list[Call]:
    """Every outermost call of a network that one forward pass of the method makes, in order."""
    calls: list[Call] = []
    results: list[Tensor] = []
    depth = 0

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                x, *rest = inputs
                source = next((i for i, result in enumerate(results) if result is x), None)
                kept = x.detach().clone().requires_grad_(x.requires_grad) if source is None else None
                calls.append(Call(name, source, kept, tuple(rest), torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)))

        return hook

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            results.append(output)

    handles = []
    for name, module in method.named_modules():
        if name:
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    method.before_step(progress)
    method(views, progress, method.draw_masks(views, progress))
    for handle in handles:
        handle.remove()
    return calls


def bare(method: Method, calls: list[Call], config: RunConfig, device: torch.device, precision: torch.dtype) -> Contender:
    """The recorded calls again; the loss is the mean of squares of every output that no other call takes."""
    modules = dict(method.named_modules())
    ends = [i for i, call in enumerate(calls) if call.gradient and not any(later.source == i and later.gradient for later in calls)]

    def forward() -> Tensor:
        results: list[Tensor] = []
        for call in calls:
            x = call.kept if call.source is None else results[call.source]
            with torch.set_grad_enabled(call.gradient), torch.autocast(device.type, dtype=precision, enabled=call.autocast):
                results.append(modules[call.module](x, *call.rest))
        return torch.stack([results[i].float().square().mean() for i in ends]).sum()

    return Contender("bare", forward, build_optimizer(config.optim, method.param_groups()))


# ---------------------------------------------------------------------------- measuring


def timed(contender: Contender, device: torch.device, steps: int) -> float:
    """Time of a step in s: CPU time on one thread of a CPU, so that other jobs count less; else wall time, the device's work included."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(steps):
        contender.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - begin) / steps


def memory(contender: Contender, device: torch.device) -> float:
    """MiB that a step keeps for its backward pass; on a GPU, the peak above what stands there between steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        stands = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.step()
        return (torch.cuda.max_memory_allocated() - stands) / 2**20
    weights = {p.untyped_storage().data_ptr() for group in contender.optimizer.param_groups for p in group["params"]}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = contender.forward()
    del loss
    return sum(kept.values()) / 2**20


def bounded(ratios: list[float]) -> tuple[float, float]:
    """Median and its upper 95 % bound by a bootstrap over rounds."""
    values = np.array(ratios)
    again = np.random.default_rng(0).choice(values, size=(5000, len(values)))
    return float(np.median(values)), float(np.quantile(np.median(again, axis=1), 0.95))


def measure(recipe: str, settings: list[str], rounds: int, steps: int, beside_lightly: bool) -> None:
    """Time one recipe's step and print its line."""
    config = configured(recipe, settings)
    name = find(config.method).name
    facts = resolve(config, 10**7).facts
    device, precision = choose_device(config)
    mixed = precision is not torch.float32
    views = of_noise(config, device)
    one_pass = facts.steps_per_epoch  # the second pass is timed: the first may be spent without a loss (CoKe)
    shared = torch.Generator().manual_seed(0)
    progress = Progress(step=one_pass, total_steps=10 * one_pass, steps_per_epoch=one_pass, generator=shared)

    def in_precision(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast(device.type, dtype=precision, enabled=mixed):
                return forward()

        return run

    method = build_method(config, facts).to(device).train()
    ours = whole(method, views, config, progress)
    with torch.autocast(device.type, dtype=precision, enabled=mixed):
        calls = recorded(method, views, progress)
    contenders = [bare(copy.deepcopy(method), calls, config, device, precision), ours]
    if beside_lightly:
        backbone = build_backbone(config.backbone).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parts = lightly_parts(name, config.method, backbone, device)
        if parts is not None:
            net, loss, before = parts
            optimizer = build_optimizer(config.optim, [ParamGroup(params=[p for p in net.parameters() if p.requires_grad])])
            contenders.append(Contender("lightly", lambda: loss(views), optimizer, before))
    for contender in contenders:
        contender.forward = in_precision(contender.forward)
    held = {contender.name: memory(contender, device) for contender in contenders}
    for contender in contenders:
        timed(contender, device, 2)
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for i in range(rounds):
        turn = i % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            times[contender.name].append(timed(contender, device, steps))

    def beside(other: str) -> str:
        ratio, bound = bounded([a / b for a, b in zip(times["ours"], times[other], strict=True)])
        kept = held["ours"] / held[other]
        return f"{ratio:.3f} of {other} ({1000 * np.median(times[other]):.1f} ms), 95 % bound {bound:.3f}; memory {kept:.2f} of it"

    batch = facts.global_batch_size
    line = f"{name:14} {recipe:22} {1000 * np.median(times['ours']):8.1f} ms a step of {batch} images, {held['ours']:.0f} MiB: "
    line += "; ".join(beside(other) for other in times if other != "ours")
    print(line + ("; lightly has no parts that fit" if beside_lightly and "lightly" not in times else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="a recipe to time, may be repeated; default: one -small recipe of each method")
    parser.add_argument("--rounds", type=int, default=25, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options, settings = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in a run, for all contenders
    small = sorted((entry.name for entry in entries() if entry.name.endswith("-small")), key=len, reverse=True)
    by_method = {find(load_recipe(recipe).method).name: recipe for recipe in small}  # the shortest name stays
    there = importlib.util.find_spec("lightly") is not None
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {options.threads} thread(s)"
    absent = "" if there else "; lightly is not installed (pip install lightly): left out"
    print(f"{machine}; {options.rounds} rounds{absent}", flush=True)
    for recipe in options.recipe or sorted(by_method.values()):
        try:
            measure(recipe, settings, options.rounds, options.steps, there)
        except ConfigError as error:
            print(f"{recipe}: {error}")


if __name__ == "__main__":
    main()
