"""How a finished directory takes the place of another: by renames, and never through a link.

.NAME.replaced        the old one, from the rename that moves it aside until it is removed
.NAME.removing-1f3a…  one that is being deleted, so that readers see a directory whole or not at all
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path

from helix_megatron.checkpoint.durable import sync_directory


def replaced(target: Path) -> Path:
    """Where `publish` moves the old directory to."""
    return target.with_name(f".{target.name}.replaced")


def publish(staged: Path, target: Path) -> None:
    """Give a complete directory, all of which is on the disk, its final name.

    What has that name becomes `replaced(target)`. The caller removes it once nothing depends on it.
    """
    if os.path.lexists(target):
        remove(replaced(target))  # by now it is the older of two
        os.rename(target, replaced(target))
        sync_directory(target.parent)
    os.rename(staged, target)
    sync_directory(target.parent)


def recover(target: Path) -> None:
    """Finish what a killed `publish` began: the old directory goes away, or back where there is no new one."""
    old = replaced(target)
    if os.path.lexists(target):
        remove(old)
    elif os.path.lexists(old):
        os.rename(old, target)
        sync_directory(target.parent)


def remove(directory: Path) -> None:
    """Delete a directory such that it is whole or gone to readers; of a link only the link."""
    if not os.path.lexists(directory):
        return
    name = directory.name.removeprefix(".").removesuffix(".replaced")
    doomed = directory.with_name(f".{name}.removing-{secrets.token_hex(4)}")
    os.rename(directory, doomed)
    sync_directory(directory.parent)
    if doomed.is_symlink() or not doomed.is_dir():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def lock(directory: Path) -> int:
    """A descriptor of a directory with a lock that ends with this process and those it forks.

    Raises:
        BlockingIOError: another process has it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # not every network file system knows locks
    return descriptor


def in_use(directory: Path) -> bool:
    """Whether another process has the lock of a directory."""
    try:
        os.close(lock(directory))
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
