"""Kernel launches of a step: colour on the device by recipe, the layer-wise optimizers on ResNet-50, whole steps of some methods.

Counted with `torch.profiler` on a CPU, in one chunk as on a GPU. What counts is an operator of torch's (`aten::...`) that calls no
other one that counts; operators that only make a view, allocate, or look at a tensor's description do not (`FREE`). One that
works on a list of tensors (`aten::_foreach_...`, `aten::_fused_...`) counts once: on a GPU it is one kernel for every few dozen
tensors. Copies to the device do not happen on a CPU and are added by their number. Some operators that are one kernel on a GPU
are two here, e.g. a mean, so the count is rather too high.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import ParamGroup, Progress
from pipeline.build import build_method
from pipeline.config import OptimConfig, RunConfig
from pipeline.data import augment
from pipeline.data.crops import draw_views
from pipeline.data.loader import Batch
from pipeline.recipes import entries, load_recipe
from pipeline.resolve import resolve
from pipeline.train.optim import build_optimizer, clip_each_, prepare_step

# views, allocations and questions
FREE = {
    f"aten::{name}"
    for name in (
        *("alias", "as_strided", "chunk", "detach", "detach_", "diagonal", "expand", "expand_as", "flatten", "lift_fresh", "movedim"),
        *("narrow", "numpy_T", "permute", "ravel", "_reshape_alias", "reshape", "resolve_conj", "resolve_neg", "select", "slice", "split"),
        *("split_with_sizes", "squeeze", "squeeze_", "swapaxes", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze"),
        *("unsqueeze_", "view", "view_as", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("resize_", "set_", "to", "contiguous", "result_type", "is_nonzero", "is_floating_point", "is_complex", "size", "stride"),
        *("numel", "requires_grad_", "set_data", "matrix_H", "mH", "mT", "type_as", "_has_compatible_shallow_copy_type", "can_cast"),
    )
}


def launches(call: Callable[[], object]) -> Counter[str]:
    """How often each operator that launches a kernel is called, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    found: Counter[str] = Counter()

    def visit(event: Any) -> bool:
        """Count an event and what it calls; whether anything was counted."""
        whole = event.name.startswith(("aten::_foreach_", "aten::_fused_"))
        inside = not whole and any([visit(child) for child in event.cpu_children])
        own = not inside and event.name.startswith("aten::") and event.name not in FREE
        found[event.name] += own
        return inside or own

    for event in profiler.events() or []:
        if event.cpu_parent is None:
            visit(event)
    return +found


def paper_recipes() -> list[str]:
    """Every recipe for photographs on GPUs."""
    return [entry.name for entry in entries() if not entry.name.endswith("-small") and "cifar10" not in entry.name]


def random_batch(config: RunConfig, images: int) -> Batch:
    """Black crops with real tables."""
    sizes, ids = np.full(images, 400), np.arange(images)
    groups = {name: group for name, group in config.views.items() if group.count}
    crops = {name: torch.zeros((images, g.count, g.size, g.size, 3), dtype=torch.uint8) for name, g in groups.items()}
    tables, numbers = draw_views(0, 0, ids, sizes, sizes, config.views), torch.arange(images)
    return Batch(crops=crops, tables=tables, ids=numbers, labels=numbers, epoch=0, step=0, bad=[])


def colour(config: RunConfig, images: int) -> int:
    """Launches of `augment_views`, with the copies to the device: of each group's crops, two small ones of each size, ids and labels."""
    batch, chunk = random_batch(config, images), augment.CHUNK_VALUES
    augment.CHUNK_VALUES = 2**62
    try:

        def finish() -> object:
            return augment.augment_views(batch, config.views, config.data.mean, config.data.std, "cpu")

        few = random_batch(config, 1)  # makes what is kept from step to step
        augment.augment_views(few, config.views, config.data.mean, config.data.std, "cpu")
        count = launches(finish).total()
    finally:
        augment.CHUNK_VALUES = chunk
    return count + len(batch.crops) + 2 * len({crops.shape[2:] for crops in batch.crops.values()}) + 2


def with_gradients(config: BackboneConfig) -> list[torch.nn.Parameter]:
    params = list(build_backbone(config).parameters())
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def optimizer_step(name: str, params: list[torch.nn.Parameter]) -> int:
    """Launches of one step of an optimizer, its second, with all parameters in one group."""
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=1e-4), [ParamGroup(params=params)])  # type: ignore[arg-type]
    optimizer.step()
    return launches(optimizer.step).total()


def clipping(params: list[torch.nn.Parameter]) -> int:
    """Launches of clipping each tensor by itself."""
    return launches(lambda: clip_each_(params, 1.0)).total()


def method_step(recipe: str, images: int) -> tuple[int, int]:
    """Launches of a method's forward and backward pass, and of clipping and the optimizer with the method's hooks around it."""
    config = load_recipe(recipe)
    resolved = resolve(config, 10**6)
    method = build_method(config, resolved.facts).train()
    views = augment.augment_views(random_batch(config, images), config.views, config.data.mean, config.data.std, "cpu")
    optimizer = build_optimizer(config.optim, method.param_groups())
    progress = Progress(step=1, total_steps=resolved.facts.total_steps, steps_per_epoch=resolved.facts.steps_per_epoch)
    outputs: list[Any] = []

    def passes() -> None:
        outputs[:] = [method(views, progress, method.draw_masks(views, progress))]
        outputs[0].loss.backward()

    def update() -> None:
        method.before_step(progress)
        prepare_step(optimizer, resolved, 1, config.optim.clip_norm, config.optim.clip_scope)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step([outputs[0].outputs], progress)

    passes()
    update()
    return launches(passes).total(), launches(update).total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="images of a worker, for colour")
    parser.add_argument("--recipes", nargs="*", default=paper_recipes(), help="whose colour is counted; default: all of paper size")
    parser.add_argument("--steps", nargs="*", default=["simsiam", "byol", "dino-vits16"], help="recipes whose whole step is counted")
    parser.add_argument("--step-images", type=int, default=4, help="images of a whole step; the count does not depend on them")
    options = parser.parse_args()

    print(f"{'colour, launches per step':36} {options.images} images")
    known: dict[str, int] = {}
    for name in options.recipes:
        config = load_recipe(name)
        key = repr(config.views)
        known[key] = known.get(key) or colour(config, options.images)
        print(f"{name:36} {known[key]:6}", flush=True)
    params = with_gradients(BackboneConfig(name="resnet50"))
    print(f"\n{f'optimizer on ResNet-50, {len(params)} tensors':36} launches")
    for name in ("larc", "lars", "lars-classic", "adamw"):
        print(f"{name:36} {optimizer_step(name, params):6}", flush=True)
    print(f"{'clipping of each tensor by itself':36} {clipping(params):6}", flush=True)
    print(f"\n{'step without colour':36} {'passes':>6} {'update':>6}")
    for name in options.steps:
        passes, update = method_step(name, options.step_images)
        print(f"{name:36} {passes:6} {update:6}", flush=True)


if __name__ == "__main__":
    main()
