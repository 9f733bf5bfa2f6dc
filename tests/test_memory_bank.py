"""State by image id: the same whole or cut over workers, for any number of workers, and from any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from methods.parts import memory_bank
from methods.parts.distributed import all_gather_objects, all_gather_rows
from methods.parts.errors import ConfigError
from methods.parts.memory_bank import MemoryBank, first_places
from pipeline import checkpoint
from pipeline.storage.place import Place
from tests.parity.common import in_processes

N, BATCH = 103, 12


def visit(rank: int, world: int, sharded: bool) -> dict[str, Any]:
    """Three steps: read, then write what the whole batch brings; at last gather every piece and load it again."""
    memory_bank.PIECE_BYTES = 40 * 8
    table = MemoryBank(N, (2,), dtype=torch.int32, fill=-1, sharded=sharded)
    read, generator = [], torch.Generator().manual_seed(0)
    for step in range(3):
        ids = torch.randperm(N, generator=generator)[:BATCH]
        own = ids.view(world, -1)[rank]
        read.append(table.read(own))
        gathered = all_gather_rows(own)
        assert torch.equal(gathered, ids)
        table.write(gathered, torch.stack([gathered, gathered * 10 + step], dim=1))
    messages: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("send", "recv", "reduce", "gather", "all_reduce", "all_gather"):
            patch.setattr(dist, name, counted(name, getattr(dist, name), messages))
        pieces = table.pieces()
    again = MemoryBank(N, (2,), dtype=torch.int32, fill=-1, sharded=sharded)
    again.load(all_gather_objects(pieces)[0])
    same = torch.equal(again.rows, table.rows)
    return {"read": read, "pieces": pieces, "rows": len(table.rows), "same": same, "messages": messages}


def counted(name: str, function: Callable[..., Any], messages: list[tuple[str, int]]) -> Callable[..., Any]:
    """The same function; what it is called with is noted with the number of its elements."""

    def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        messages.append((name, tensor.numel()))
        return function(tensor, *args, **options)

    return call


def visit_whole(rank: int, world: int) -> dict[str, Any]:
    return visit(rank, world, False)


def visit_sharded(rank: int, world: int) -> dict[str, Any]:
    return visit(rank, world, True)


@pytest.mark.parametrize("what", [visit_whole, visit_sharded])
def test_tables_are_the_same_for_one_and_three_workers(what: Any, tmp_path: Path) -> None:
    one = visit_whole(0, 1)
    assert [len(piece) for piece in one["pieces"]] == [40, 40, 23]
    assert (torch.cat(one["pieces"]) >= 0).any() and (torch.cat(one["pieces"]) == -1).any()
    three = in_processes(3, tmp_path, what)
    for step in range(3):
        assert torch.equal(torch.cat([worker["read"][step] for worker in three]), one["read"][step])
    assert all(torch.equal(a, b) for a, b in zip(three[0]["pieces"], one["pieces"], strict=True))
    assert sum(worker["rows"] for worker in three) == (N if what is visit_sharded else 3 * N)
    assert one["same"] and all(worker["same"] for worker in three)


@pytest.mark.parametrize("what", [visit_whole, visit_sharded])
def test_no_worker_but_the_first_ever_holds_rows_of_another_one(what: Any, tmp_path: Path) -> None:
    first, *others = in_processes(2, tmp_path, what)
    assert torch.cat(first["pieces"]).shape == (N, 2)
    assert all(worker["pieces"] == [] for worker in others)
    if what is visit_whole:
        assert not first["messages"], "rank 0 has every row"
        return
    assert others[0]["messages"] == [("send", 2 * (80 - N // 2)), ("send", 2 * (N - 80))], "its own rows, piece by piece"
    assert {name for name, _ in first["messages"]} == {"recv"}


def filled(table: MemoryBank, rank: int, world: int) -> dict[str, Any]:
    """Every image gets its own number, and is read back."""
    ids = torch.arange(N - 1)
    table.write(ids, ids[:, None])
    return {"rows": len(table.rows), "read": table.read(ids.view(world, -1)[rank])}


def test_a_table_made_before_its_worker_joins_the_others_is_cut_all_the_same(tmp_path: Path) -> None:
    table = MemoryBank(N, (1,), dtype=torch.int32, fill=-1, sharded=True)
    workers = in_processes(2, tmp_path, partial(filled, table))
    assert [worker["rows"] for worker in workers] == [N // 2, N - N // 2]
    assert torch.cat([worker["read"] for worker in workers]).flatten().tolist() == list(range(N - 1))


def test_a_shard_loads_its_own_rows_from_the_pieces_of_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(N, dtype=torch.int32)
    held = []
    for rank in range(4):
        monkeypatch.setattr(memory_bank, "own_range", lambda n, rank=rank: (rank * n // 4, (rank + 1) * n // 4))
        table = MemoryBank(N, dtype=torch.int32, fill=-1, sharded=True)
        table.load(list(whole.split(30)))
        held.append(table.rows)
    assert torch.equal(torch.cat(held), whole)
    with pytest.raises(ConfigError, match=r"shape \(103,\) where this run needs \(104,\)"):
        MemoryBank(N + 1, dtype=torch.int32, fill=-1).load(list(whole.split(30)))


def test_a_checkpoint_holds_tables_in_pieces_of_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bank, "PIECE_BYTES", 4 * 50_000)
    table = MemoryBank(120_000, dtype=torch.int32, fill=-1)
    table.write(torch.arange(0, 120_000, 7), torch.arange(0, 120_000, 7))
    state = {"method": {"w": torch.ones(3)}, "id_tables": {"labels": table.pieces()}}
    folder = checkpoint.save(Place.of(tmp_path), state, step=4)
    sizes = {file.name: file.stat().st_size for file in Path(folder.uri).iterdir()}
    assert set(sizes) == {"state.pt", "labels-0.pt", "labels-1.pt", "labels-2.pt"}
    assert sizes["labels-0.pt"] < 4 * 50_000 + 4096 and sizes["state.pt"] < 4096
    loaded = checkpoint.load(folder)
    assert checkpoint.state_hash(loaded) == checkpoint.state_hash(state)
    again = MemoryBank(120_000, dtype=torch.int32, fill=-1)
    again.load(loaded["id_tables"]["labels"])
    assert torch.equal(again.rows, table.rows)


def test_a_repeated_image_counts_where_it_comes_first() -> None:
    ids = torch.tensor([5, 3, 5, 9, 3, 0, 5])
    assert first_places(ids).tolist() == [0, 1, 0, 3, 1, 5, 0]
    assert first_places(torch.arange(4)).tolist() == [0, 1, 2, 3]
    many = torch.randint(50, (400,), generator=torch.Generator().manual_seed(0))
    assert first_places(many).tolist() == [many.tolist().index(i) for i in many.tolist()]
