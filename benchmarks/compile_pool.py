"""A pool of worker processes for compilations: one that hangs or aborts costs its own case and no other."""

import multiprocessing
import queue
import threading
from collections.abc import Hashable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
_SPAWN = multiprocessing.get_context("spawn")


def run_in_pool(tasks: dict[Key, tuple[Any, ...]], jobs: int, limit: float) -> dict[Key, dict[str, Any]]:
    """{key: compile_case(*arguments)}, in the order of `tasks`; a lost worker gives {"failures": [why]}."""
    waiting: queue.SimpleQueue[Key] = queue.SimpleQueue()
    for key in tasks:
        waiting.put(key)
    done: dict[Key, dict[str, Any]] = {}
    arguments = (waiting, tasks, done, limit)
    threads = [threading.Thread(target=_drain, args=arguments) for _ in range(min(jobs, len(tasks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {key: done[key] for key in tasks}


def _drain(waiting: Any, tasks: dict[Any, tuple[Any, ...]], done: dict[Any, dict[str, Any]], limit: float) -> None:
    """Feed one worker until nothing waits, and start another whenever it is lost."""
    worker = _Worker()
    try:
        while True:
            key = waiting.get_nowait()
            done[key] = worker.call(tasks[key], limit)
            if not worker.process.is_alive():
                worker = _Worker()
    except queue.Empty:
        worker.stop()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, remote = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(remote,), daemon=True)
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


def _serve(pipe: Connection) -> None:
    from benchmarks.compile_report import compile_case  # here: this module is imported by that one

    while True:
        pipe.send(compile_case(*pipe.recv()))
