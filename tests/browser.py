"""A headless Chromium driven over its DevTools pipe, for tests of pages: console, clicks, pictures, PDF."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
MISSING = "no Chromium here: apt-get install chromium-headless-shell"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--no-first-run",
)


class Browser:
    """One page of a browser."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read, self.rest, self.number, self.session = write, read, b"", 0, ""
        self.errors: list[str] = []
        """What the console, the page's script and its policy complained about."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command, answered."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(
            self.write, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0"
        )
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self._note(answer)

    def _next(self) -> Any:
        while b"\0" not in self.rest:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser is gone"
            self.rest += part
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: Any) -> None:
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(said["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(str([part.get("value") for part in said["args"]]))

    def open(
        self, path: Path, width: int = 1000, height: int = 900, *, dark: bool = False, ready: str = "true"
    ) -> None:
        """Load a file in a window and wait until the script `ready` is true, at most a minute."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + 60
        while not self.run(f"location.protocol === 'file:' && document.readyState === 'complete' && Boolean({ready})"):
            assert time.monotonic() < end, f"not ready after a minute: {self.errors}"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of a script, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key, on the element that has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"ArrowLeft": 37}[key]
            )

    def picture(self, path: Path, selector: str = "") -> Path:
        """The whole page as a PNG, or one element of it."""
        script = f"document.querySelector({json.dumps(selector or 'html')}).getBoundingClientRect().toJSON()"
        self.run("scrollTo(0, 0)")
        box = self.run(script)
        height = box["height"] if selector else self.run("document.documentElement.scrollHeight")
        clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        """What would be printed."""
        printed = self.call("Page.printToPDF", preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(printed["data"]))
        return path


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for as long as the block lasts."""
    assert PROGRAM is not None, MISSING
    commands, answers = os.pipe(), os.pipe()
    # Above 9, so that bash can put them where Chromium looks: it reads 3 and writes 4.
    ours, theirs = (commands[1], answers[0]), [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1])]
    os.close(commands[0])
    os.close(answers[1])
    shell = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
    process = subprocess.Popen(["bash", "-c", shell, PROGRAM, *FLAGS], pass_fds=theirs, stderr=subprocess.DEVNULL)
    for end in theirs:
        os.close(end)
    try:
        yield Browser(*ours)
    finally:
        for end in ours:
            os.close(end)
        process.terminate()
        process.wait(30)
