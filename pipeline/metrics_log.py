"""`metrics.jsonl`, one point a line: `{"step": 10, "time": 1767225600.5, "metrics": {"loss": 2.5}}`."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Every point of a run: `{"step": int, "time": float (s), "metrics": {name: float}}`, in the order logged."""
    lines = read_lines(folder / "metrics.jsonl", 0)
    points = [point for line in lines if (point := parse(line)) is not None]
    for point in points:
        point["metrics"] = {key: float(value) for key, value in point["metrics"].items()}
    return points


def encode(step: int, metrics: Mapping[str, float]) -> str:
    """One line of the file. JSON has no NaN or infinity: they become "nan", "inf", "-inf", which `float` reads back."""
    numbers = {key: float(value) for key, value in metrics.items()}
    values = {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}
    return json.dumps({"step": int(step), "time": time.time(), "metrics": values}) + "\n"


def append_line(folder: Path, line: str) -> None:
    """Record one encoded point."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line)


def parse(line: bytes) -> dict[str, Any] | None:
    """The point of a line; None for a damaged one."""
    try:
        point: dict[str, Any] = json.loads(line)
        return point if isinstance(point["step"], int) and isinstance(point["metrics"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_lines(path: Path, start: int, limit: int | None = None) -> list[bytes]:
    """Whole lines from byte `start`, at least one if there is one, together not more than `limit` metrics (if given)."""
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
    """Cut off the half line that a killed process may have left at the end."""
    with contextlib.suppress(OSError), open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
