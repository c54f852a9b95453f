"""Writing what the demo makes, or saying why that cannot be."""

from __future__ import annotations

import tempfile
from pathlib import Path

from setattn._files import whole_file
from setattn.demo._errors import DemoError


def check_writable(path: Path) -> Path:
    """Return the file a path leads to, or say in one line why it cannot be written.

    Raises
    ------
    DemoError
        If it is a folder or a device, or its folder is missing or cannot be written to.
    """
    target = path.resolve()  # a link stays, and what it points to is replaced
    if target.exists() and not target.is_file():
        raise DemoError(f"cannot write {path}: it exists and is no ordinary file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror} ({target.parent})") from error
    return target


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    DemoError
        If it cannot be written.
    """
    try:
        with whole_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror}") from error
