"""What masks save: MSN's masked anchor beside the same with all patches; iBOT's patch head on masked patches beside all of them.

Each ratio takes turns with all patches, pair by pair; a figure is the median of the pairs' ratios, with an upper 95 % bound
from a bootstrap. It should be at most (1 - mask ratio) + 0.03. Time is that of `steps.py`.
Memory is what the forward pass keeps for the backward pass; on a GPU, the peak of what both allocate.
"""

from __future__ import annotations

import argparse

import torch
from steps import Contender, bounded, memory, of_noise, timed
from torch import Tensor

from methods.msn import MSN, MSNConfig
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Progress, RunFacts
from methods.parts.masking import num_kept, num_patches, random_keep
from pipeline.build import build_method
from pipeline.cli.overrides import configured
from pipeline.config import OptimConfig
from pipeline.resolve import resolve
from pipeline.train.optim import build_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="a timm name")
    parser.add_argument("--depth", type=int, help="blocks, if not the model's own")
    parser.add_argument("--size", type=int, default=224, help="side of the crop, pixels")
    parser.add_argument("--patch", type=int, help="side of a patch, if not the model's own, pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3, 0.5, 0.7])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--recipe", help="measure a whole step of this recipe of iBOT or DINOv2 instead")
    options, settings = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.recipe:
        return patch_head(options.recipe, settings, options.pairs, device)
    depth = None if options.depth is None else (options.depth,)
    backbone = build_backbone(BackboneConfig(name=options.backbone, image_size=options.size, patch_size=options.patch, depth=depth))
    method = MSN(MSNConfig(), backbone, RunFacts(global_batch_size=options.batch, steps_per_epoch=1, total_steps=1)).to(device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    patches = num_patches(method.anchor.backbone, options.size)
    optimizer = build_optimizer(OptimConfig(name="sgd"), method.param_groups())

    class Pass(Contender):
        """Without an optimizer's step, which does not depend on the tokens."""

        def step(self) -> None:
            self.forward().backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad(set_to_none=True)

    def anchor(name: str, keep: Tensor | None) -> Pass:
        return Pass(name, lambda: method.anchor(images, keep).square().mean(), optimizer)

    whole = anchor("all", None)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{machine}; {options.backbone}, {options.batch} crops of {options.size}, {patches} patches; {options.pairs} pairs", flush=True)
    for ratio in options.ratios:
        kept = num_kept(patches, ratio)
        masked = anchor("masked", random_keep(torch.arange(options.batch, device=device), patches, kept, seed=0))
        for one in (whole, masked):
            timed(one, device, 1)
        pairs = []
        for i in range(options.pairs):
            times = {one.name: timed(one, device, 1) for one in ((whole, masked) if i % 2 else (masked, whole))}
            pairs.append(times["masked"] / times["all"])
        median, bound = bounded(pairs)
        share = memory(masked, device) / memory(whole, device)
        words = "within" if median <= 1 - ratio + 0.03 else "above"
        print(
            f"mask ratio {ratio:4.2f}, {kept:4} patches: time {median:.3f} (95 % bound {bound:.3f}), {words} {1 - ratio + 0.03:.2f}; "
            f"memory {share:.3f}",
            flush=True,
        )


def patch_head(recipe: str, settings: list[str], pairs: int, device: torch.device) -> None:
    """A step whose patch head sees the masked patches, with what fills them up, beside one whose patch head sees every patch."""
    config = configured(recipe, settings)
    facts = resolve(config, 10**7).facts
    method, views = build_method(config, facts).to(device).train(), of_noise(config, device)
    progress = Progress(step=1, total_steps=10, steps_per_epoch=1, generator=torch.Generator().manual_seed(0))
    masked, index, weights = method.draw_masks(views, progress) or []
    every = torch.zeros(masked.numel(), dtype=weights.dtype, device=device).index_add_(0, index, weights)
    optimizer = build_optimizer(config.optim, method.param_groups())

    def step(name: str, masks: list[Tensor]) -> Contender:
        return Contender(name, lambda: method.training_step(views, progress, masks).loss, optimizer)  # type: ignore[arg-type,return-value]

    few, whole = step("masked", [masked, index, weights]), step("all", [masked, torch.arange(len(every), device=device), every])
    ratios = []
    for i in range(pairs + 1):
        times = {one.name: timed(one, device, 1) for one in ((whole, few) if i % 2 else (few, whole))}
        ratios += [times["masked"] / times["all"]] if i else []
    median, bound = bounded(ratios)
    share = memory(few, device) / memory(whole, device)
    print(f"{recipe}: {len(index)} of {len(every)} patches; time {median:.3f} (95 % bound {bound:.3f}), memory {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
