"""Writing what commands make, or saying why that cannot be."""

from __future__ import annotations

import tempfile
from pathlib import Path

from setattn._commands._errors import CommandError
from setattn._files import whole_file


def check_writable(path: Path) -> Path:
    """Return the file a path leads to, or say in one line why it cannot be written.

    Raises
    ------
    CommandError
        If it is a folder or a device, or its folder is missing or cannot be written to.
    """
    try:
        target = path.resolve()  # a link stays, and what it points to is replaced
        ordinary = target.is_file() or not target.exists()
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        raise CommandError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if not ordinary:
        raise CommandError(f"cannot write {path}: it exists and is no ordinary file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror} ({target.parent})") from error
    return target


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    CommandError
        If it cannot be written.
    """
    try:
        with whole_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def check_another(path: Path, name: str, **others: Path | None) -> None:
    """Check that what is written is none of what is read.

    Raises
    ------
    CommandError
        If it is.
    """
    for other, its in others.items():
        if its is not None and _same(path, its):
            raise CommandError(f"{name} {path} is {other} itself; wanted another file")


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except (OSError, RuntimeError):
        return False
