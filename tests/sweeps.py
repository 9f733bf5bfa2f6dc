"""Writes sweep folders as a search leaves them, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPERATURE = {"method.temperature": {"scale": "log", "low": 0.05, "high": 0.5, "text": "log:0.05:0.5", "reason": "sharpness"}}
PROTOTYPES = {"method.num_prototypes": {"scale": "choice", "choices": [32, 64, 128], "text": "choice:32,64,128"}}


def trial(values: Mapping[str, Any], scores: Mapping[int, float], status: str = "finished", **facts: Any) -> dict[str, Any]:
    """One trial: its searched values and its score by step; any other key of `trial.json` by name."""
    step = max(scores, default=0)
    score = scores.get(step)
    known = {"values": dict(values), "status": status, "score": score, "step": step, "curve": dict(scores)}
    cost = {"seconds": 0.2 * step, "images": 128 * step, "started": 0.0, "ended": 100.0}
    return {"seed": 0, "error": None, "from": None} | cost | known | facts


def write_sweep(folder: Path, trials: Sequence[Mapping[str, Any]], space: Mapping[str, Any] | None = None, **facts: Any) -> Path:
    """A sweep folder over `space` (temperature, unless given); any other key of `sweep.json` by name."""
    folder.mkdir(parents=True)
    known = {
        "name": folder.name,
        "kind": "sweep",
        "status": "finished",
        "created": 1_000_000.0,
        "ended": 1_000_600.0,
        "recipe": "swav-small",
        "method": "swav",
        "command": "manyviews tune swav-small --space method.temperature=log:0.05:0.5",
        "score": "knn",
        "score_words": "kNN accuracy on 608 held-out training images; it says little about other tasks.",
        "mode": "max",
        "space": dict(space or TEMPERATURE),
        "search": "random",
        "scheduler": "none",
        "rungs": [],
        "total_steps": 250,
        "trials": len(trials),
        "seed": 0,
        "seeds": 1,
        "workers": 0,
        "concurrent": 1,
        "cores": 2,
        "mlflow_run": None,
    }
    (folder / "sweep.json").write_text(json.dumps(known | facts))
    for number, given in enumerate(trials):
        state = dict(given)
        curve = state.pop("curve")
        path = folder / f"trial-{number:03d}"
        path.mkdir()
        (path / "trial.json").write_text(json.dumps({"number": number} | state))
        found = {s: v if v == v else "nan" for s, v in curve.items()}  # as pipeline.metrics_log writes it
        points = [{"step": s, "time": 1.0, "metrics": {"loss": 2.0, "score": v}} for s, v in found.items()]
        (path / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return folder
