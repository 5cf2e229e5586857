"""Kills a grid of runs at random times, again and again, and compares what it comes to with an uninterrupted one.

    python results/crash/kill.py --kills 50 --out results/crash/outcome.json

The grid is `relaxprop reproduce demo` with two workers. After each start, first one worker gets SIGKILL and then the
command with all its workers, each at a time drawn evenly from a sixth of the seconds that the grid takes beyond its
start. Then the same command is started again. When the grid is finished, another one is begun, until it was killed so
often. At the end of every grid, all losses and accuracies have to be those of the uninterrupted grid to the last bit,
and its folder has to hold the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically

GRID = ["--epochs", "6", "--seeds", "2", "--condition", "b", "--condition", "d", "--workers", "2"]


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "relaxprop", "reproduce", "demo", *GRID]
    command += ["--runs", str(folder / "runs"), "--out", str(folder / "figure")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, **quiet)


def found(folder: Path) -> dict[str, Any]:
    """The files, and what was learned, by run."""
    runs = {}
    for run in sorted((folder / "runs").iterdir()):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        learned = [(line["epoch"], line["train_loss"], line["test_accuracy"]) for line in lines]
        runs[run.name] = {"files": sorted(path.name for path in run.iterdir()), "learned": learned}
    return runs


def wait_until_it_writes(folder: Path, process: subprocess.Popen[bytes]) -> None:
    def written() -> dict[Path, int]:
        times = {}
        for path in folder.glob("runs/*/*"):
            with suppress(FileNotFoundError):  # written under another name until now
                times[path] = path.stat().st_mtime_ns
        return times

    before = written()
    while process.poll() is None and written() == before:
        time.sleep(0.01)


def kill_a_worker(folder: Path, process: subprocess.Popen[bytes], draw: random.Random) -> bool:
    """Whether there was one: the runs that are being computed are locked, and the lock tells by which process."""
    for lock in draw.sample(locks := sorted(folder.glob("runs/*/lock")), len(locks)):
        with suppress(OSError, ValueError, IndexError):
            worker = int(lock.read_text().split()[1])
            if os.getsid(worker) == process.pid:  # else of a grid that was killed before
                os.kill(worker, signal.SIGKILL)
                return True
    return False


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    draw = random.Random(given.seed)
    started = time.monotonic()
    kills = {"worker": 0, "grid": 0}
    differing = grids = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "uninterrupted"
        process = start(whole)
        wait_until_it_writes(whole, process)
        began = time.monotonic()
        assert process.wait() == 0, "the grid failed before it was killed once"
        seconds, expected = time.monotonic() - began, found(whole)
        while sum(kills.values()) < given.kills:
            folder = Path(scratch) / f"grid-{grids}"
            while True:
                process = start(folder)
                wait_until_it_writes(folder, process)
                for what in kills:
                    if sum(kills.values()) == given.kills:
                        break
                    time.sleep(draw.uniform(0, seconds / 6))
                    if process.poll() is not None:
                        break
                    if what == "worker":
                        kills[what] += kill_a_worker(folder, process, draw)
                    else:
                        os.killpg(process.pid, signal.SIGKILL)
                        kills[what] += 1
                if process.wait() != -signal.SIGKILL:
                    break
            grids += 1
            came = found(folder)
            if process.returncode or came != expected:
                differing += 1
                print(
                    f"status {process.returncode}", {r: came[r] for r in came if came[r] != expected.get(r)}, flush=True
                )
            print(f"{sum(kills.values())} kills, {grids} grids, {differing} of them differ", flush=True)
    outcome = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "grid": shlex.join(["relaxprop", "reproduce", "demo", *GRID]),
        "runs of a grid": len(expected),
        "kills": sum(kills.values()),
        "of them of one worker": kills["worker"],
        "of them of all processes": kills["grid"],
        "grids": grids,
        "grids that differ in a bit or a file": differing,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    write_atomically(given.out, json.dumps(outcome, indent=2) + "\n")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
