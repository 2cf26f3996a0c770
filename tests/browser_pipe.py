"""A headless Chromium that does what a person does: loads a page, types, presses keys; spoken to through its pipe."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Browser:
    """One page in one Chromium (the DevTools protocol over `--remote-debugging-pipe`: no port is opened)."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        # Chromium reads descriptor 3 and writes 4, whatever ours are called.
        shell = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        arguments = [
            binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *arguments], pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.rest, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._listen()

    def _listen(self) -> None:
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def tab(self) -> str:
        """Opens a second page in the same browser and turns to it; gives the one before, for `turn`."""
        before, self.session = self.session, ""
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._listen()
        return before

    def turn(self, session: str) -> str:
        """Everything from now on is asked of this page, which comes to the front; gives the one before."""
        before, self.session = self.session, session
        self.ask("Page.bringToFront")
        return before

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its result; events that come meanwhile are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            piece = os.read(self.read, 1 << 20)
            assert piece, "Chromium ended"
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def open(self, address: str, width: int = 1100, height: int = 900) -> None:
        self.resize(width, height)
        self.ask("Page.navigate", url=address)
        while self.run("document.readyState") != "complete":
            pass

    def resize(self, width: int, height: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def reload(self) -> None:
        """The same page once more, from the start."""
        self.run("window.leaving = true")
        self.ask("Page.reload")
        while self.run("window.leaving") or self.run("document.readyState") != "complete":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what it comes to."""
        answer = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression, once it is true of the page."""
        until = time.monotonic() + seconds
        while not (value := self.run(f"(v => v instanceof Node ? true : v)({script})")):
            assert time.monotonic() < until, f"never came true: {script}"
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Text, put where the focus is."""
        self.ask("Input.insertText", text=text)

    def click(self, script: str) -> None:
        """A click of the mouse on the middle of the element that an expression gives, once it stands still.

        What comes or grows beside an element moves it at the next frame, and a click would hit what is there then.
        """
        x, y = self.run(
            f"(async () => {{ const e = {script};"
            " const later = () => new Promise(r => setTimeout(r, 60));"
            " const frame = () => Promise.race([new Promise(requestAnimationFrame), later()]);"
            " const middle = () => { const r = e.getBoundingClientRect();"
            "   return [r.x + r.width / 2, r.y + r.height / 2] };"
            " e.scrollIntoView({block: 'nearest'});"
            " for (let still = 0, was = middle(), tries = 0; still < 2 && tries < 100; tries += 1) {"
            "   await frame(); e.scrollIntoView({block: 'nearest'});"
            "   const is = middle(); still = `${is}` === `${was}` ? still + 1 : 0; was = is; }"
            " return middle() })()"
        )
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str, text: str = "", shift: bool = False) -> None:
        """One key, pressed and released."""
        codes = {
            "Tab": 9, "Enter": 13, "Escape": 27, " ": 32,
            "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
        }  # fmt: skip
        extra = {"windowsVirtualKeyCode": codes.get(name, 0), "key": name, "code": name, "modifiers": 8 if shift else 0}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **extra, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **extra)

    def offline(self, gone: bool) -> None:
        """Pulls the plug, or puts it back."""
        self.ask(
            "Network.emulateNetworkConditions", offline=gone, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )

    def fetched(self) -> list[str]:
        """Addresses the pages asked for, themselves and what stands inside them left out."""
        asked = (e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [url for url in asked if not url.startswith(("file:", "data:", "about:"))]

    def complaints(self) -> list[Any]:
        """Errors that the page threw or the browser logged (a policy that was broken among them)."""
        return [e["params"] for e in self.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
