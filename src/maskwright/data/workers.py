"""Worker processes of data loaders: signals, ending them, and scripts that start themselves again."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import multiprocessing

# Registers its exit function first, so that `_end_all` runs before it.
import multiprocessing.util  # pyright: ignore[reportUnusedImport]
import os
import re
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

from maskwright.errors import DataError, UsageError

UNGUARDED = 86  # exit code of a worker that found itself running the script that started it
_UNKNOWN = 256
_MARK = "MASKWRIGHT_STARTS_WORKERS"  # in the environment of workers
_STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
_ADVICE = "This DataLoader will create"  # more workers than the machine has cores
_iterators: weakref.WeakSet[Any] = weakref.WeakSet()
_advised = False


def ignore_signals(_: int = 0) -> None:
    """Make a worker ignore SIGINT, SIGTERM and SIGHUP; the `worker_init_fn` of a loader.

    A terminal, a batch system or a service manager sends them to all processes of a job. The main process decides what
    to do then, and needs its workers until it has ended the step.
    """
    for iterator in list(_iterators):  # inherited: collected here, they would end the workers of the main process
        iterator._shutdown = True
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    _end_with_parent()


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone.

    torch compares the parent's process ID for that. It misses the end of a process whose workers are children of the
    fork server, or that ends before a spawned worker has imported torch.
    """
    parent = multiprocessing.parent_process()
    if parent is None or _forks():  # forked siblings hold one another's pipes; there, torch's comparison is right
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


@contextlib.contextmanager
def advised_once(count: int) -> Generator[None, None, None]:
    """The block that constructs a torch DataLoader with `count` workers, whose advice on that number is shown once."""
    global _advised
    with warnings.catch_warnings():
        if _advised:
            warnings.filterwarnings("ignore", _ADVICE, UserWarning)
        _advised = _advised or count > 0
        yield


def iterate(loader: Any) -> Generator[Any, None, None]:
    """Iterate over a torch DataLoader that was constructed in `advised_once`, with `ignore_signals` for its workers.

    Until a worker ignores signals itself, it inherits that they are blocked.

    Args:
        loader: The DataLoader. Workers that are not persistent end with the iteration.

    Yields:
        What the loader yields.

    Raises:
        UsageError: If the running script lacks a main guard, so that every worker would start it again.
        DataError: If a worker was killed.
    """
    if loader.num_workers:
        stop_if_imported()
    iterator: Any = None
    blocking = hasattr(signal, "pthread_sigmask")
    if loader.num_workers and blocking and not _forks():
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # when it starts, it unblocks the signals
    with explained(lambda: iterator):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING) if blocking else set[int]()
        os.environ[_MARK] = "1"
        try:
            with warnings.catch_warnings():
                # Since Python 3.12, forking a process with threads warns, and torch always has threads. The workers
                # use neither these threads nor a GPU.
                warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
                warnings.filterwarnings("ignore", _ADVICE, UserWarning)  # shown when the loader was constructed
                iterator = iter(loader)
            if iterator not in _iterators:
                _iterators.add(iterator)
                # torch asks the workers to end when the iterator is collected, which takes seconds and may fail.
                weakref.finalize(loader, _end_own_workers, iterator, os.getpid())
        finally:
            del os.environ[_MARK]
            if blocking:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        while True:
            try:
                with explained(lambda: iterator):
                    value = next(iterator)
            except StopIteration:
                return
            yield value
    finally:
        if not loader.persistent_workers:
            end_workers(iterator)


@contextlib.contextmanager
def explained(iterator_of: Callable[[], Any]) -> Generator[None, None, None]:
    """Replace the failure of a worker process inside the block by a sentence; see `iterate`.

    Args:
        iterator_of: Returns the iterator of the DataLoader, None before it exists.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        code = _exit_code(iterator_of(), error)
        if code is None:
            raise
        end_workers(iterator_of())
        if code == UNGUARDED or (code == _UNKNOWN and not _forks() and _main_is_running()):
            raise _unguarded() from None
        if code < 0:
            raise DataError(
                f"a worker process that reads images was ended by signal {-code}"
                + (" (often because memory ran out)" if code == -getattr(signal, "SIGKILL", 9) else "")
                + "; use fewer workers or smaller images"
            ) from error
        raise


def stop_if_imported() -> None:
    """Stop a script without a main guard in a process that imports it because the script has started that process.

    A worker of a data loader ends silently: the main process explains it, see `explained`.

    Raises:
        UsageError: If another library or the script itself started the process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        if _MARK in os.environ:
            sys.stdout.flush()
            os._exit(UNGUARDED)
        raise _unguarded()


def _unguarded() -> UsageError:
    script = getattr(sys.modules.get("__main__"), "__file__", None) or "the script"
    return UsageError(
        f"{script}: worker processes import this script when they start, so it must train only if it is the main "
        'program; move the call under `if __name__ == "__main__":`, or use workers=0'
    )


def end_workers(iterator: Any) -> None:
    """Kill the workers of a torch DataLoader, without waiting for what they read.

    Args:
        iterator: Its iterator; None and those without workers are ignored.
    """
    if getattr(iterator, "_shutdown", True):  # no workers, or ended already
        return
    with contextlib.suppress(Exception):  # torch's own names; without them the shutdown below takes longer
        if iterator._worker_pids_set:
            import torch

            # Otherwise their end raises an error in this process.
            torch._C._remove_worker_pids(id(iterator))  # pyright: ignore[reportPrivateUsage] - torch has no public name
            iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()
    with contextlib.suppress(Exception):
        iterator._shutdown_workers()


def _end_own_workers(iterator: Any, owner: int) -> None:
    """`end_workers`, in the process that has started them."""
    if os.getpid() == owner:
        end_workers(iterator)


@atexit.register
def _end_all() -> None:
    """Kill workers that still run when the process ends: they ignore the signal that Python sends, and waits for."""
    if multiprocessing.parent_process() is None:
        for iterator in list(_iterators):
            end_workers(iterator)


def _forks() -> bool:
    return multiprocessing.get_start_method() == "fork"


def _main_is_running() -> bool:
    """Whether the caller is reached from the top level of the main script."""
    main = sys.modules.get("__main__")
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return main is not None and getattr(main, "__file__", None) is not None
        frame = frame.f_back
    return False


def _exit_code(iterator: Any, error: BaseException) -> int | None:
    """The exit code of a worker that ended early, `_UNKNOWN` if it cannot be known; None if none did."""
    codes = [worker.exitcode for worker in getattr(iterator, "_workers", ()) if worker.exitcode]
    if codes:
        return UNGUARDED if UNGUARDED in codes else codes[0]
    text = str(error)
    if found := re.search(r"DataLoader worker .*exited unexpectedly with exit code (\d+)", text):
        return int(found[1])
    if re.search(r"DataLoader worker .*is killed by signal", text):
        return -getattr(signal, "SIGKILL", 9)
    if isinstance(error, (BrokenPipeError, ConnectionError, EOFError)) or "exited unexpectedly" in text:
        return _UNKNOWN
    return None
