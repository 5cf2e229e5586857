"""Kills a grid of runs at random times, again and again, and compares what it comes to with an uninterrupted one.

    python results/crash/kill.py --kills 50 --out results/crash/outcome.json

The grid is `relaxprop reproduce demo` with two workers. Each time, the command and its workers get SIGKILL together, at
a time drawn evenly from the seconds that the grid takes beyond its start; then the same command is started again. When
the grid is finished, another one is begun, until it was killed so often. At the end of every grid, all losses and
accuracies have to be those of the uninterrupted grid to the last bit, and its folder has to hold the same files.
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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "uninterrupted"
        process = start(whole)
        while not list(whole.glob("runs/*/config.json")):
            assert process.poll() is None, "the grid ended before it began"
            time.sleep(0.01)
        began = time.monotonic()
        assert process.wait() == 0
        seconds, expected = time.monotonic() - began, found(whole)
        kills = differing = grids = 0
        while kills < given.kills:
            folder = Path(scratch) / f"grid-{grids}"
            while True:
                before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*")}
                process = start(folder)
                while process.poll() is None and before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*")}:
                    time.sleep(0.01)  # until it writes
                time.sleep(draw.uniform(0, seconds) if kills < given.kills else 0)
                if kills == given.kills:
                    process.wait()
                if process.poll() is not None:
                    break
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            grids += 1
            same = process.returncode == 0 and found(folder) == expected
            differing += not same
            print(f"{kills} kills, {grids} grids, {differing} of them differ", flush=True)
    outcome = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "grid": shlex.join(["relaxprop", "reproduce", "demo", *GRID]),
        "runs": len(expected),
        "kills": kills,
        "grids": grids,
        "grids that differ in a bit or a file": differing,
    }
    write_atomically(given.out, json.dumps(outcome, indent=2) + "\n")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
