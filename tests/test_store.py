"""The cache folder: whole or nothing, once, by one process; and what it says when the disk does not play along."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from softrl import _store
from softrl._store import (
    AssetError,
    cache_dir,
    cached_folder,
    discard,
    read_card,
    write_atomically,
    write_folder_atomically,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SOFTRL_CACHE", str(folder))
    return folder


def visible(folder):
    """Names in a folder, without lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def writes(text, calls=None):
    """A builder of one file that counts its calls."""

    def build(folder):
        if calls is not None:
            calls.append(text)
        (folder / "data.txt").write_text(text)
        return {"title": "a piece"}

    return build


def run_python(code, **options):
    """Run code in another process, the repository's softrl on its path."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_cache_dir_is_the_variable_if_set_and_else_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOFTRL_CACHE", "~/there")
    assert cache_dir() == tmp_path / "there"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for unset in ("", None):
        monkeypatch.delenv("SOFTRL_CACHE") if unset is None else monkeypatch.setenv("SOFTRL_CACHE", unset)
        assert cache_dir().name == "softrl"
        assert tmp_path in cache_dir().parents


def test_write_atomically_replaces_on_success_and_changes_nothing_on_failure(tmp_path):
    target = tmp_path / "file.txt"
    with write_atomically(target) as temporary:
        temporary.write_text("one")
        assert temporary.parent == tmp_path
        assert not target.exists()
    assert target.read_text() == "one"

    def fail():
        with write_atomically(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert target.read_text() == "one"
    assert visible(tmp_path) == ["file.txt"]


def test_write_folder_atomically_replaces_on_success_and_changes_nothing_on_failure(tmp_path):
    target = tmp_path / "folder"
    for text in ("one", "two"):
        with write_folder_atomically(target) as temporary:
            (temporary / text).write_text(text)
        assert visible(target) == [text]

    def fail():
        with write_folder_atomically(target) as temporary:
            (temporary / "half").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert visible(target) == ["two"]
    assert visible(tmp_path) == ["folder"]


def test_a_folder_is_made_once_for_the_same_inputs(cache):
    calls = []
    for text, inputs in (("a", {"x": (1, 2)}), ("b", {"x": (1, 2)}), ("c", {"x": (1, 3)})):
        folder = cached_folder("piece", inputs, writes(text, calls), needs_mb=0)
    assert calls == ["a", "c"]
    assert (folder / "data.txt").read_text() == "c"
    assert read_card(folder) == {"inputs": {"x": [1, 3]}, "title": "a piece", "files": {"data.txt": 1}}


def test_rebuild_makes_it_again_and_keeps_the_old_one_if_that_fails(cache):
    cached_folder("piece", {}, writes("old"), needs_mb=0)

    def fail(folder):
        (folder / "data.txt").write_text("half")
        raise AssetError("no luck")

    with pytest.raises(AssetError, match="no luck"):
        cached_folder("piece", {}, fail, needs_mb=0, rebuild=True)
    assert (cache / "piece" / "data.txt").read_text() == "old"
    assert visible(cache) == ["piece"]
    cached_folder("piece", {}, writes("new"), needs_mb=0, rebuild=True)
    assert (cache / "piece" / "data.txt").read_text() == "new"


@pytest.mark.parametrize("damage", ["short file", "no file", "no card", "broken card"])
def test_a_damaged_folder_is_made_again(cache, damage):
    folder = cached_folder("piece", {}, writes("whole"), needs_mb=0)
    if damage == "short file":
        (folder / "data.txt").write_text("wh")
    elif damage == "no file":
        (folder / "data.txt").unlink()
    elif damage == "no card":
        (folder / "card.json").unlink()
    else:
        (folder / "card.json").write_text(json.dumps({"inputs": {}})[:-3])
    cached_folder("piece", {}, writes("again"), needs_mb=0)
    assert (folder / "data.txt").read_text() == "again"


def test_a_file_that_something_else_put_there_does_not_matter(cache):
    folder = cached_folder("piece", {}, writes("whole"), needs_mb=0)
    (folder / ".DS_Store").write_text("")
    calls = []
    cached_folder("piece", {}, writes("again", calls), needs_mb=0)
    assert calls == []


def test_a_complete_cache_is_used_without_writing(cache, monkeypatch):
    cached_folder("piece", {}, writes("whole"), needs_mb=0)
    monkeypatch.setattr(_store, "require_writable", lambda root: pytest.fail("wrote to a read-only cache"))
    before = sorted(os.listdir(cache))
    assert cached_folder("piece", {}, writes("again"), needs_mb=0) == cache / "piece"
    assert sorted(os.listdir(cache)) == before


DYING = """
import os, signal
from pathlib import Path
from softrl import _store

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def build(folder):
    (folder / "data.txt").write_text("ha")
    if {when!r} == "half-written":
        die()
    (folder / "data.txt").write_text("half")
    if {when!r} == "before the card":
        die()
    if {when!r} == "before the rename":
        os.rename = die
    if {when!r} == "between the renames":
        rename = os.rename
        def once(*arguments):
            rename(*arguments)
            os.rename = die
        os.rename = once
    return {{}}

_store.cached_folder("piece", {{"version": 2}}, build, needs_mb=0)
"""


@pytest.mark.parametrize("when", ["half-written", "before the card", "before the rename", "between the renames"])
def test_sigkill_leaves_nothing_half_made_and_the_next_run_cleans_up(cache, when):
    cached_folder("piece", {"version": 1}, writes("old"), needs_mb=0)
    other = cache / ".other.0123456789ab.tmp"  # a live run may be making this one
    other.mkdir()
    assert run_python(DYING.format(when=when)).returncode == -signal.SIGKILL
    assert any(name.startswith(".piece.") for name in visible(cache))  # it did die in the middle
    if when == "between the renames":
        assert not (cache / "piece").exists()
    else:
        assert (cache / "piece" / "data.txt").read_text() == "old"

    cached_folder("piece", {"version": 2}, writes("new"), needs_mb=0)
    assert (cache / "piece" / "data.txt").read_text() == "new"
    assert visible(cache) == [other.name, "piece"]


TOGETHER = """
import sys, time
from pathlib import Path
from softrl._store import cached_folder

start = Path(sys.argv[1])
(start / sys.argv[2]).touch()
while len(list(start.iterdir())) < 2:
    time.sleep(0.01)

def build(folder):
    print("built")
    time.sleep(0.7)
    (folder / "data.txt").write_text("whole")
    return {}

print((cached_folder("piece", {}, build, needs_mb=0) / "data.txt").read_text())
"""


def test_two_processes_that_start_together_make_it_once(cache, tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(start), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    (out_a, err_a), (out_b, err_b) = (process.communicate(timeout=60) for process in processes)
    assert sorted((out_a, out_b)) == ["built\nwhole\n", "whole\n"]
    assert (err_a + err_b).count("another process is making piece; waiting for it") == 1


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, ["disk filled up while making piece", "Free some space", "SOFTRL_CACHE"]),
        (errno.EDQUOT, ["disk filled up while making piece", "Free some space", "SOFTRL_CACHE"]),
        (errno.EACCES, ["making piece failed", "cannot be written", "SOFTRL_CACHE"]),
        (errno.EROFS, ["making piece failed", "Read-only file system", "SOFTRL_CACHE"]),
        (errno.EIO, ["making piece failed", "Input/output error", "Run again"]),
    ],
)
def test_an_error_of_the_disk_is_explained_and_leaves_nothing(cache, number, expected):
    def build(folder):
        (folder / "data.txt").write_text("half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(AssetError) as caught:
        cached_folder("piece", {}, build, needs_mb=0)
    for part in (*expected, str(cache)):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert visible(cache) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_disk_that_is_really_full(cache):
    def build(folder):
        (folder / "data.txt").symlink_to("/dev/full")
        with (folder / "data.txt").open("wb") as file:
            file.write(bytes(10**6))
        return {}

    with pytest.raises(AssetError, match="the disk filled up while making piece"):
        cached_folder("piece", {}, build, needs_mb=0)
    assert visible(cache) == []


def test_too_little_space_is_found_before_anything_is_built(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=123_000_000))
    with pytest.raises(AssetError, match=r"needs 200 MB free in .*, and there are 123 MB. Free 77 MB") as caught:
        cached_folder("piece", {}, lambda folder: pytest.fail("built"), needs_mb=200)
    assert "SOFTRL_CACHE" in str(caught.value)
    assert visible(cache) == []


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_cache_path_that_is_a_file(tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(AssetError, match="is a file, not a folder") as caught:
        cached_folder("piece", {}, lambda folder: pytest.fail("built"), needs_mb=0)
    assert f"{tmp_path / 'file'} is a file" in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_cache_that_cannot_be_written_is_found_before_anything_is_built(cache, monkeypatch, number):
    """Simulated, for tests may run as root, whom permissions do not bind."""

    def refuse(path, data):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(AssetError, match=r"cannot be written.*SOFTRL_CACHE") as caught:
        cached_folder("piece", {}, lambda folder: pytest.fail("built"), needs_mb=0)
    assert os.strerror(number) in str(caught.value)


def test_discard_removes_a_piece_and_is_content_with_none(cache):
    discard("piece", needed_by="other")
    cached_folder("piece", {}, writes("whole"), needs_mb=0)
    cached_folder("other", {}, writes("whole"), needs_mb=0)
    discard("piece", needed_by="other")
    assert visible(cache) == ["other"]


def test_discard_leaves_a_piece_that_another_is_being_made_from(cache):
    cached_folder("piece", {}, writes("whole"), needs_mb=0)
    other_process = "from softrl._store import discard; discard('piece', needed_by='other')"

    def build(folder):
        assert run_python(other_process).returncode == 0
        assert (cache / "piece" / "data.txt").exists()
        return {}

    cached_folder("other", {}, build, needs_mb=0)
    assert run_python(other_process).returncode == 0
    assert visible(cache) == ["other"]
