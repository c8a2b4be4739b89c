"""The cache folder: where it is, who may write to it now, and writes that either happen whole or not at all.

Everything that softrl fetches, converts or fits lies in one folder of the cache per piece, with a `card.json` that
says what it was made from. A piece is made under a temporary name beside its place and renamed, so that a process
that dies at any point, by SIGKILL too, leaves the place as it was; the next run removes what was left under the
temporary name. A file lock per piece keeps two processes that start together (the ranks of `accelerate launch`)
from doing the same work twice.

Left out on purpose: flushing to the disk before the rename. After a power cut a file may be short; the card holds
the sizes, so such a piece counts as absent and is made again.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

CARD = "card.json"
TOTAL_MB = 600  # what all pieces need while they are being made, rounded up; 400 MB stay


class AssetError(RuntimeError):
    """An asset cannot be made available; the message says what failed, where, and what to do."""


def announce(message: str) -> None:
    """One line for the person at the terminal; stdout is left to results."""
    print(f"softrl: {message}", file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """The folder of everything that softrl fetches, converts and fits; it may not exist yet.

    Returns:
        `SOFTRL_CACHE` from the environment if set and not empty, else the platform's cache folder of the user.
    """
    chosen = os.environ.get("SOFTRL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("softrl"))


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary path, renames it to `path` on success.

    Args:
        path: the file to make or to replace; its folder must exist.
    Yields:
        A path in the same folder that does not exist; the caller writes it. On an exception it is removed.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        remove(temporary)


@contextlib.contextmanager
def write_folder_atomically(path: str | Path) -> Iterator[Path]:
    """The twin of `write_atomically` for folders.

    An older folder at `path` is moved away and removed. Between its going and the new one's coming there is an
    instant with neither: a process that dies then has lost the old one, and no half of any.

    Args:
        path: the folder to make or to replace; its parent must exist.
    Yields:
        An empty folder beside it; the caller fills it. On an exception it is removed.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, target)
    finally:
        remove(temporary)


def replace_folder(made: Path, target: Path) -> None:
    """Give a complete folder its name; an older one of that name goes."""
    replaced = _temporary_name(target)
    try:
        if target.exists():
            os.rename(target, replaced)
        os.rename(made, target)
    finally:
        remove(replaced)


def cached_folder(
    name: str,
    inputs: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    *,
    needs_mb: int,
    rebuild: bool = False,
) -> Path:
    """The folder `name` of the cache, made by `build` unless it was made before from the same inputs.

    Args:
        name: the folder's name.
        inputs: what the result depends on (hashes, settings), as JSON values; a folder whose card names other
            inputs is made again.
        build: fills the empty folder it is given and returns further entries for the card.
        needs_mb: free space in MB that `build` needs while it works.
        rebuild: make it again even if it is there; the old one stays until the new one is complete.
    Returns:
        The complete folder.
    Raises:
        AssetError: the cache cannot be written, too little space, or whatever `build` raises itself.
    """
    folder = cache_dir() / name
    if not rebuild and is_current(folder, inputs):  # before any write, so that a read-only cache can be shared
        return folder
    require_writable(folder.parent)
    with _only_one_process(folder):
        if not rebuild and is_current(folder, inputs):
            return folder
        _remove_stale(folder)
        require_space(folder.parent, needs_mb, name)
        with explained(f"making {name}", folder.parent), write_folder_atomically(folder) as temporary:
            facts = build(temporary)
            card = {"inputs": inputs, **facts, "files": _sizes(temporary)}
            (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return folder


def discard(name: str, needed_by: str) -> None:
    """Remove a piece that served only to make another; left for another time if that cannot be done now.

    Args:
        name: the piece to remove.
        needed_by: the piece that is made from it; nothing is removed while a process is making that.
    """
    folder = cache_dir() / name
    if folder.exists():
        with contextlib.suppress(Timeout, OSError), _lock(folder.with_name(needed_by)).acquire(timeout=0):
            remove(folder)


def is_current(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether the folder was made from these inputs and has every file at its size; files added to it do not count."""
    card = read_card(folder)
    if card.get("inputs") != json.loads(json.dumps(inputs)):
        return False
    found = _sizes(folder)
    return all(found.get(name) == size_bytes for name, size_bytes in card["files"].items())


def remove(path: Path) -> None:
    """Remove a file or a folder. What resists (a dying pip still writes there) stays for the next run's clean-up."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def read_card(folder: Path) -> dict[str, Any]:
    """The folder's card; empty if there is none that can be read."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def require_writable(root: Path) -> None:
    """Make the cache folder and try a write, so that a cache that cannot be used is found before any download."""
    probe = _temporary_name(root / "probe")
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"softrl")
    except (FileExistsError, NotADirectoryError) as error:
        raise AssetError(
            f"the cache folder {root} cannot be made: {_first_file(root)} is a file, not a folder. "
            "Set SOFTRL_CACHE to a folder, or move that file away."
        ) from error
    except OSError as error:
        raise _explanation(error, "preparing the cache", root) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def require_space(root: Path, needs_mb: int, what: str) -> None:
    """Raise an AssetError when the disk of the cache has less than `needs_mb` free."""
    free_mb = shutil.disk_usage(root).free // 10**6
    if free_mb < needs_mb:
        raise AssetError(
            f"making {what} needs {needs_mb} MB free in {root}, and there are {free_mb} MB. Free {needs_mb - free_mb} "
            f"MB, or set SOFTRL_CACHE to a folder on another disk (all assets together need about {TOTAL_MB} MB)."
        )


@contextlib.contextmanager
def explained(doing: str, root: Path) -> Iterator[None]:
    """Turn an error of the file system inside the block into an AssetError that says what to do."""
    try:
        yield
    except OSError as error:
        raise _explanation(error, doing, root) from error


def no_space(doing: str, root: Path) -> AssetError:
    """The message for a disk that filled up while it was written to."""
    return AssetError(
        f"the disk filled up while {doing} in {root}; nothing half-made was left there. Free some space (all assets "
        f"together need about {TOTAL_MB} MB), or set SOFTRL_CACHE to a folder on another disk, and run again."
    )


def _explanation(error: OSError, doing: str, root: Path) -> AssetError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(doing, root)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AssetError(
            f"{doing} failed: {root} cannot be written ({error.strerror}). "
            "Set SOFTRL_CACHE to a folder that you may write to."
        )
    reason = error.strerror or (str(error).strip() or type(error).__name__).splitlines()[0]
    where = f" ({error.filename})" if error.filename else ""
    return AssetError(
        f"{doing} failed in {root}: {reason}{where}. Run again; if it repeats, set SOFTRL_CACHE to a fresh folder."
    )


@contextlib.contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    """Hold the lock of this piece. The system frees it when its holder dies, whatever kills it."""
    lock = _lock(folder)
    with explained(f"locking {folder.name}", folder.parent):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            announce(f"another process is making {folder.name}; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")


def _remove_stale(folder: Path) -> None:
    """Remove what dead runs left of this piece; call it under the piece's lock, when no live run can own any."""
    for path in folder.parent.glob(f".{folder.name}.*.tmp"):
        remove(path)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of the folder but the card, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _first_file(path: Path) -> Path:
    """The part of the path that is a file where a folder is needed."""
    return next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path)
