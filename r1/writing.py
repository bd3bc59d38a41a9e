"""Write a folder or a file that appears whole or not at all, and deletes nothing of anybody else.

The content is written under a name that nothing had before, beside the target. It gets its own name
when it is complete. So two processes that write to one place do not mix, and a full disk leaves
nothing.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from r1.errors import InputError


def check_new(directory: str | Path) -> Path:
    """The absolute path of a folder that does not exist yet. Nothing is made.

    Raises InputError if it exists, or could not be made there.
    """
    path = Path(os.path.abspath(directory))
    if os.path.lexists(path):
        raise _exists(directory)
    above = next(folder for folder in path.parents if os.path.lexists(folder))
    try:
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is not a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission")
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, "the name is too long")
    except OSError as error:
        raise _unwritable(directory, error) from None
    return path


@contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """A folder to be filled. It gets the name `directory` at the context's end, unless one fails.

    Raises InputError if it exists, at the start or at the end, and if it can't be written.
    """
    path = check_new(directory)
    missing = [folder for folder in path.parents if not folder.exists()]
    partial = _partial(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        if os.path.lexists(path):  # another process was faster
            raise _exists(directory)
        os.rename(partial, path)
    except OSError as error:
        if os.path.lexists(path):
            raise _exists(directory) from None
        raise _unwritable(directory, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:  # the innermost first
            with suppress(OSError):  # it has content now
                folder.rmdir()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to be written. It takes the place of `path` at the context's end, unless one fails.

    Raises OSError if it can't be written.
    """
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of all processes that lock this folder, one at a time is inside the context.

    On Windows, and where a file system locks no folders, the others are not kept out. Raises
    OSError for a folder that can't be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _partial(path: Path) -> Path:
    """A name beside `path` that nothing has."""
    return path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.partial")


def _exists(directory: str | Path) -> InputError:
    return InputError(f"{directory} exists already: name a new folder, r1 overwrites none")


def _unwritable(directory: str | Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"{directory} can't be written ({reason}): make room, or name another folder")
