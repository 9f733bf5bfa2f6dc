"""Work done ahead of the training loop: batches made in a thread, and copied to a GPU on a stream of their own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CLOSE_S = 10.0  # a thread that waits for a block ends with it; a lost one is left behind after so long


class Prefetcher(Generic[T]):
    """Runs a generator in a thread of its own, which keeps the next `size` values. Iterating raises what the generator raised.

    Attributes:
        waits: how often the consumer had to wait for a value.
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
        """Values that are ready."""
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
    """Copies tensors to a GPU on a stream of its own, while another thread computes there.

    `send` is called by the thread that reads, `receive` by the one that computes; neither waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Begin to copy tensors in pinned memory; the event is reached when they have arrived."""
        with torch.cuda.stream(self.stream):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return sent, self.stream.record_event()

    def receive(self, tensors: Iterable[Tensor], arrived: torch.cuda.Event) -> None:
        """Let the current stream wait for the copies, and keep their memory until it is done with them."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        for tensor in tensors:
            tensor.record_stream(current)
