"""Errors that end a command with one line.

May import: nothing of this project.
"""

from __future__ import annotations


class OutputError(Exception):
    """A folder or file of results cannot be written or read."""
