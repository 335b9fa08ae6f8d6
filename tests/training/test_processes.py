"""Processes that train together end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, pathlib, sys, time
from emu3_vla.training import processes

def work(folder):
    pathlib.Path(folder, str(os.getpid())).touch()
    time.sleep(300)

if __name__ == "__main__":
    processes.run(work, 2, sys.argv[1])
"""


@pytest.mark.parametrize("interrupts", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
def test_children_end_with_their_parent(interrupts, tmp_path):
    """Also where a shell started it as a background job, which ignores interrupts."""
    script, marks = tmp_path / "work.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    marks.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, script, marks], env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts)
    )
    _wait(lambda: len(list(marks.iterdir())) == 2, "the children never began")
    parent.kill()
    parent.wait()
    children = [int(mark.name) for mark in marks.iterdir()]
    _wait(lambda: not any(map(_runs, children)), "the children outlived their parent")


def _wait(done, otherwise: str) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
