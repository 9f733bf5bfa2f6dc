"""Sinkhorn beside its original form, which rewrites the whole matrix: time as a ratio, error, and memory beyond the scores.

Both work on the same float32 cosines and take turns, round by round; the ratio is the median over rounds with an upper
95 % bound from a bootstrap of the rounds. The error is the largest relative one of a code to float64. Memory is what one
call adds to a process of its own at its peak (on a GPU: to torch's allocator), in matrices of the scores' size.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from functools import partial

import torch
from steps import bounded
from torch import Tensor

from methods.parts.assignment import sinkhorn

EPSILON, ITERATIONS = 0.05, 3


def original(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """exp, then the total, then columns and rows in turn, each over the whole matrix."""
    samples, prototypes = scores.shape
    q = torch.exp(scores / epsilon)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=0, keepdim=True)
        q /= prototypes
        q /= q.sum(dim=1, keepdim=True)
        q /= samples
    q *= samples
    return q


FORMS = {"ours": partial(sinkhorn, span=2.0), "original": original}


def cosines(batch: int, prototypes: int, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    z, c = (torch.nn.functional.normalize(torch.randn(rows, 128, device=device)) for rows in (batch, prototypes))
    scores = torch.empty(batch, prototypes, device=device)
    for part, rows in zip(scores.split(256), z.split(256), strict=True):
        torch.mm(rows, c.T, out=part)
    return scores


def seconds(form: str, scores: Tensor) -> float:
    if scores.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    FORMS[form](scores, EPSILON, ITERATIONS)
    if scores.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def error(form: str, scores: Tensor) -> float:
    """Largest relative error of a code, over the first columns; float64 would not fit the memory for all of them."""
    some = scores[:, :3000]
    exact = original(some.double(), EPSILON, ITERATIONS)
    return float(((FORMS[form](some, EPSILON, ITERATIONS).double() - exact).abs() / exact).max())


def peak(form: str, batch: int, prototypes: int, device: torch.device) -> float:
    """Bytes that one call adds, in matrices of the scores' size. On a CPU only in a process of its own."""
    scores = cosines(batch, prototypes, device)
    FORMS[form](scores[:64].clone(), EPSILON, ITERATIONS)  # libraries loaded
    if scores.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        FORMS[form](scores, EPSILON, ITERATIONS)
        return (torch.cuda.max_memory_allocated() - before) / scores.nbytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    FORMS[form](scores, EPSILON, ITERATIONS)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / scores.nbytes


def in_process_of_its_own(form: str, batch: int, prototypes: int) -> float:
    """`peak` there. A child's high-water mark starts at its parent's size, so the parent must still be small."""
    command = [sys.executable, __file__, f"--batch={batch}", f"--prototypes={prototypes}", f"--peak-of={form}"]
    return float(subprocess.check_output(command, text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[3000, 10000, 30000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak-of", choices=FORMS, help="only the memory of one form")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.peak_of:
        print(peak(options.peak_of, options.batch, options.prototypes[0], device))
        return
    memories = [{form: in_process_of_its_own(form, options.batch, k) for form in FORMS} for k in options.prototypes]
    for k, memory in zip(options.prototypes, memories, strict=True):
        scores = cosines(options.batch, k, device)
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(options.rounds):
            for form in FORMS:
                times[form].append(seconds(form, scores))
        ratio, bound = bounded([a / b for a, b in zip(times["ours"][1:], times["original"][1:], strict=True)])
        print(
            f"B={options.batch} K={k}: time x {ratio:.2f} (at most {bound:.2f}) of {min(times['original']) * 1e3:.0f} ms; "
            f"memory {memory['ours']:.2f} and {memory['original']:.2f} matrices; "
            f"error {error('ours', scores):.1e} and {error('original', scores):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
