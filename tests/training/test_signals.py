"""Signals to the process group of a training, as terminals and batch systems send them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maskwright.training.guards import Stop
from maskwright.training.state import load_state

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups are those of POSIX")
ROOT = Path(__file__).parents[2]

GUARDED = """
import multiprocessing, sys, threading, time
# PyTorch imports this package at the end of a process, if it is installed, and the text that the import evaluates makes
# Python forget that it was interrupted: the exit code would be 1.
sys.modules["tabulate"] = None
from pathlib import Path
from tests.training.tiny_system import Shapes, fit

class Stalling(Shapes):
    calls = 0

    def __getitem__(self, index):
        self.calls += 1
        time.sleep(30 if self.calls > 12 else 0)
        return super().__getitem__(index)

if __name__ == "__main__":
    folder, method, how, stalls = sys.argv[1:]
    multiprocessing.set_start_method(method)
    from maskwright.terminal import guarded

    def train():
        data = Stalling(40) if stalls == "True" else Shapes(40, delay=0.05)
        fit(Path(folder), data=data, workers=2, epochs=500, log_every=1, val=False, save_minutes=60)
        return 0

    if how == "command":
        sys.exit(guarded(train))
    if how == "thread":
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    train()
"""


def start(folder: Path, method: str = "fork", how: str = "script", stalls: bool = False) -> subprocess.Popen[str]:
    script = folder.parent / "script.py"
    script.write_text(GUARDED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), method, how, str(stalls)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What starts tests in the background may have told them to ignore these.
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)],
    )
    deadline = time.monotonic() + 120
    while logged(folder) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "the training did not begin"
        time.sleep(0.05)
    return process


def logged(folder: Path) -> int:
    """The last step in the log."""
    path = folder / "log.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return int(lines[-1].split(",")[0]) if lines else 0


def end(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, said
        time.sleep(0.05)
    raise AssertionError("workers are left behind")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("fork", signal.SIGINT),
        ("spawn", signal.SIGTERM),
        pytest.param("forkserver", signal.SIGINT, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_the_group_ends_after_a_step_that_is_saved(tmp_path: Path, method: str, number: signal.Signals):
    process = start(tmp_path / "run", method)
    os.killpg(process.pid, number)
    code, said = end(process)
    step = load_state(tmp_path / "run" / "last.ckpt")["progress"]["step"]
    assert step == logged(tmp_path / "run") >= 2
    assert f"KeyboardInterrupt: stopped after step {step}; resume the run in" in said
    assert code == -signal.SIGINT, "as Python ends after Ctrl-C"
    assert said.count("Traceback") == 1
    assert "DataLoader" not in said
    assert not (tmp_path / "run" / ".train.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.full)],
)
def test_the_exit_code_of_the_command_names_the_signal(tmp_path: Path, number: signal.Signals, code: int):
    process = start(tmp_path / "run", how="command")
    # Twice within a moment, as `timeout` and container runtimes deliver it.
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)
    ended, said = end(process)
    assert ended == code
    assert "Traceback" not in said
    assert f"stopped after step {logged(tmp_path / 'run')}; resume the run" in said
    assert (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_second_signal_ends_at_once_whatever_workers_do(tmp_path: Path, number: signal.Signals):
    process = start(tmp_path / "run", how="command", stalls=True)
    time.sleep(1)
    os.killpg(process.pid, number)
    time.sleep(1)
    assert process.poll() is None, "it waits for the batch"
    os.killpg(process.pid, number)
    began = time.monotonic()
    code, said = end(process)
    assert time.monotonic() - began < 20
    assert code == 128 + number
    assert "stopped at once" in said


@pytest.mark.slow
def test_ctrl_c_in_the_main_thread_stops_a_run_in_another(tmp_path: Path):
    process = start(tmp_path / "run", how="thread")
    os.killpg(process.pid, signal.SIGINT)
    _, said = end(process)
    assert load_state(tmp_path / "run" / "last.ckpt")["progress"]["step"] == logged(tmp_path / "run")
    assert "stopped after step" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.full)])
def test_a_script_without_a_main_guard_gets_one_sentence(tmp_path: Path, method: str):
    script = tmp_path / "script.py"
    script.write_text(
        f"import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n"
        "from pathlib import Path\nfrom tests.training.tiny_system import fit\n"
        f"fit(Path({str(tmp_path / 'run')!r}), workers=2, val=False)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"maskwright.errors.UsageError: {script}: worker processes import this script")
    assert 'if __name__ == "__main__":' in last


@pytest.mark.fast
def test_a_signal_counts_as_the_second_only_after_a_moment(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    stop = Stop(said.append)
    stop._notice(signal.SIGTERM, None)
    stop._notice(signal.SIGTERM, None)
    assert stop.asked
    assert said == ["stopping after this step; send SIGTERM again to stop at once"]
    error = stop.interruption("saved")
    assert type(error) is KeyboardInterrupt
    assert vars(error) == {"exit_code": 143}
    monkeypatch.setattr(Stop, "TWICE", 0.0)
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        stop._notice(signal.SIGTERM, None)


@pytest.mark.fast
def test_handlers_are_those_of_before_afterwards_and_other_threads_are_left_alone():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with Stop(print):
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    asked: list[bool] = []

    def enter() -> None:
        with Stop(print) as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert asked == [False]
