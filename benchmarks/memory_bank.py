"""What labels of many images cost: CoKe's step with a table of 10 million ids beside one of ten thousand, and the table's memory.

Both steps stand in one process and take turns; the ratio is the median over rounds with an upper 95 % bound from a
bootstrap. The ids of a step are spread over the whole table, as a shuffled stream brings them.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time

import numpy as np
import torch
from steps import bounded

from methods.coke import CoKe
from methods.parts.contract import Progress
from methods.parts.views import Views
from pipeline.build import build_method
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from pipeline.train.optim import build_optimizer


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--recipe", default="coke-small")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_recipe(options.recipe)
    few = resolve(config, 10_000).facts
    progress = Progress(step=few.steps_per_epoch, total_steps=few.total_steps, steps_per_epoch=few.steps_per_epoch)
    counts = {name: group.count for name, group in config.views.items() if group.count}
    roles = {name: config.views[name].role for name in counts}
    batch = few.global_batch_size
    stacks = {name: torch.randn(n * batch, 3, config.views[name].size, config.views[name].size) for name, n in counts.items()}
    method = build_method(config, few).train()
    assert isinstance(method, CoKe)
    methods = {10_000: method, options.ids: copy.deepcopy(method)}
    times: dict[int, list[float]] = {ids: [] for ids in methods}
    optimizers = {ids: build_optimizer(config.optim, it.param_groups()) for ids, it in methods.items()}
    draw = np.random.default_rng(0)
    methods[options.ids].labels.num_images = options.ids

    def step(ids: int) -> None:
        image_ids = torch.from_numpy(draw.choice(ids, batch, replace=False))
        views = Views(stacks=stacks, counts=counts, roles=roles, image_ids=image_ids, labels=torch.full((batch,), -1))
        began = time.perf_counter()
        output = methods[ids](views, progress)
        output.loss.backward()
        optimizers[ids].step()
        optimizers[ids].zero_grad()
        methods[ids].after_step([output.outputs], progress)
        times[ids].append(time.perf_counter() - began)

    method.labels.fill_(0)
    step(10_000)  # what every step needs is no part of what the table costs
    before = peak_mb()
    methods[options.ids].labels.fill_(0)
    table = methods[options.ids].labels.rows
    for _ in range(options.rounds + 2):
        for ids in methods:
            step(ids)
    ratio, bound = bounded([a / b for a, b in zip(times[options.ids][2:], times[10_000][3:], strict=True)])
    heads = table.shape[1]
    print(
        f"{options.recipe}, {batch} images a step, {heads} heads: a step with {options.ids:,} ids takes {ratio:.3f} of one with 10,000 "
        f"(95 % bound {bound:.3f}; {1000 * np.median(times[options.ids]):.0f} ms); the table holds {table.nbytes / heads / 1e6:.0f} MB "
        f"for each head, the process grew by {(peak_mb() - before) / heads:.0f} MB for each"
    )


if __name__ == "__main__":
    main()
