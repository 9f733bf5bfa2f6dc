"""Prefetching: threads that work ahead of the training loop, and copies to a GPU on a separate CUDA stream."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CLOSE_S = 10.0  # a thread that still waits for a block after this time is left behind


class Prefetcher(Generic[T]):
    """Runs a generator in a thread and keeps its next `size` values. Iterating raises what the generator raised.

    Attributes:
        waits: values that the consumer had to wait for.
    """

    def __init__(self, values: Callable[[], Generator[T]], size: int) -> None:
        self.size, self.waits = size, 0
        self._queue: deque[T] = deque()
        self._change = threading.Condition()
        self._closed = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(values,), name="manyviews-prefetch", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return the number of values that are ready."""
        return len(self._queue)

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        with self._change:
            self.waits += not self._queue and not self._ended
            self._change.wait_for(lambda: self._queue or self._ended)
            if self._queue:
                self._change.notify_all()
                return self._queue.popleft()
        if self._error is None:
            raise StopIteration
        try:
            raise self._error
        finally:
            self._error = None  # its traceback holds this object, and this object the executor's handle

    def close(self) -> None:
        """End the generator, and wait for it."""
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        self._thread.join(timeout=CLOSE_S)

    def _work(self, call: Callable[[], Generator[T]]) -> None:
        error: BaseException | None = None
        values = call()
        del call
        try:
            while self._has_room():
                self._put(next(values))
        except StopIteration:
            pass
        except BaseException as raised:  # raised again in the consumer
            error = raised
        try:
            values.close()
        except BaseException as raised:
            error = error or raised
        with self._change:
            self._error, self._ended = error, True
            self._change.notify_all()

    def _has_room(self) -> bool:
        with self._change:
            self._change.wait_for(lambda: self._closed or len(self._queue) < self.size)
            return not self._closed

    def _put(self, value: T) -> None:
        with self._change:
            if not self._closed:
                self._queue.append(value)
                self._change.notify_all()


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call the function in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again by `future.result()`
            future.set_exception(error)

    threading.Thread(target=work, name="manyviews-prefetch", daemon=True).start()
    return future


class DeviceCopies:
    """Copies tensors to a GPU on a separate CUDA stream.

    The prefetching thread calls `send`, and the training thread `receive`. Neither waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Start to copy tensors from pinned memory. Return the copies, and the event that marks their completion."""
        with torch.cuda.stream(self.stream):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return sent, self.stream.record_event()

    def receive(self, tensors: Iterable[Tensor], arrived: torch.cuda.Event) -> None:
        """Make the current CUDA stream wait for the copies, and keep their memory until it has used them."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        for tensor in tensors:
            tensor.record_stream(current)
