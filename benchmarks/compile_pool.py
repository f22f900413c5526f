"""A pool of worker processes for compilations: one that hangs or aborts costs its own case and no other."""

import multiprocessing
import queue
import threading
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
_SPAWN = multiprocessing.get_context("spawn")


def run_in_pool(
    function: Callable[..., dict[str, Any]],
    tasks: dict[Key, tuple[Any, ...]],
    jobs: int,
    limit: float,
    finished: Callable[[Key], None] = lambda key: None,
) -> dict[Key, dict[str, Any]]:
    """{key: function(*arguments)}, in the order of `tasks`; a lost worker gives {"failures": [why]}.

    Args:
        function: of a module, so that it can be pickled; a task runs alone in its process for `limit` seconds at most.
        finished: called with the key of each task that is done, from the thread of its worker.
    """
    waiting: queue.SimpleQueue[Key] = queue.SimpleQueue()
    for key in tasks:
        waiting.put(key)
    done: dict[Key, dict[str, Any]] = {}

    def drain() -> None:
        worker = _Worker(function)
        try:
            while True:
                key = waiting.get_nowait()
                done[key] = worker.call(tasks[key], limit)
                finished(key)
                if not worker.process.is_alive():
                    worker = _Worker(function)
        except queue.Empty:
            worker.stop()

    threads = [threading.Thread(target=drain, daemon=True) for _ in range(min(jobs, len(tasks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {key: done[key] for key in tasks}


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, function: Callable[..., dict[str, Any]]) -> None:
        self.pipe, remote = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(remote, function), daemon=True)
        self.process.start()
        remote.close()

    def call(self, arguments: tuple[Any, ...], limit: float) -> dict[str, Any]:
        self.pipe.send(arguments)
        if not self.pipe.poll(limit):
            self.stop()
            return {"failures": [f"no result within {limit:g} s"]}
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return {"failures": [f"the compiler ended the process (exit code {self.process.exitcode})"]}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, function: Callable[..., dict[str, Any]]) -> None:
    while True:
        pipe.send(function(*pipe.recv()))
