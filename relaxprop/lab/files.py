"""Files of results: each is whole or not there, whenever the process that writes it is stopped.

May import: nothing of this project.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

LATEST = "checkpoint.safetensors"  # in a run's folder, the state after its last epoch
_PARTIAL = ".partial"


class OutputError(Exception):
    """A folder or file for results cannot be written, or what is in it cannot be read."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file under a name of its own, then renames it.

    Raises:
        OutputError: if it cannot be written; what was there before is still there.
    """
    if not path.name or path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder, name a file")
    partial = path.with_name(f".{path.name}.{uuid4().hex}{_PARTIAL}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def remove_partial(folder: Path) -> None:
    """Removes what a process that was stopped has left of files it was writing; to be called where no other writes."""
    for partial in folder.glob(f".*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Refuse a folder for results before anything is computed.

    Raises:
        OutputError: if it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to the folder {folder} ({error.strerror or error}): name another") from error
