"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfs.errors import UserError


def fsync(path: Path) -> None:
    """Force a file's or directory's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def blaming(path: Path, remedy: str, deed: str = "written") -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError`: `path`, the reason and the remedy.

    A full disk, a quota and missing permissions are the user's to mend.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be {deed} ({reason}); {remedy}") from error


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` in one step if the block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str) -> None:
    """Replace the text file `path` in one step."""
    with writing_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextmanager
def replacing_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name if the block succeeds.

    A directory already at `path` is moved aside (`.NAME.old-PID`) and removed only once the new
    one stands; a failure puts it back.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    previous = final.with_name(f".{final.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync(temporary)
        if final.exists():
            final.rename(previous)
        try:
            temporary.rename(final)
        except OSError:
            if previous.exists():
                previous.rename(final)
            raise
        fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
