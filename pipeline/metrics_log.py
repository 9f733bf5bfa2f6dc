"""The log `metrics.jsonl`, with one point in each line: `{"step": 10, "time": 1767225600.5, "metrics": {"loss": 2.5}}`."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Return every point of a run, `{"step": int, "time": float (s), "metrics": {name: float}}`, in the order logged."""
    lines = read_lines(folder / "metrics.jsonl", 0)
    points = [point for line in lines if (point := parse(line)) is not None]
    for point in points:
        point["metrics"] = {key: float(value) for key, value in point["metrics"].items()}
    return points


def encode(step: int, metrics: Mapping[str, float]) -> str:
    """Return one line of the file. JSON has no NaN or infinity: they become "nan", "inf", "-inf", which `float` parses."""
    numbers = {key: float(value) for key, value in metrics.items()}
    values = {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}
    return json.dumps({"step": int(step), "time": time.time(), "metrics": values}) + "\n"


def append_line(folder: Path, line: str) -> None:
    """Append one encoded point."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line)


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the point of a line; None if the line is damaged."""
    try:
        point: dict[str, Any] = json.loads(line)
        return point if isinstance(point["step"], int) and isinstance(point["metrics"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_lines(path: Path, start: int, limit: int | None = None) -> list[bytes]:
    """Return whole lines from byte `start`, with at most `limit` metrics in sum; at least one line if there is one."""
    lines: list[bytes] = []
    metrics = 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(start)
        for line in file:
            metrics += len((parse(line) or {"metrics": ()})["metrics"])
            if not line.endswith(b"\n") or (limit is not None and lines and metrics > limit):
                break
            lines.append(line)
    return lines


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line of a killed process."""
    with contextlib.suppress(OSError), open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
