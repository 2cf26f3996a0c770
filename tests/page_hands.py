"""What a person does on the chat page, and what the page then shows: for tests that drive it in a browser."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from browser_pipe import Browser
from page_server import PageServer

TURN = "[...document.querySelectorAll('.turn')]"


def photo(size: tuple[int, int] = (64, 48), colour: str = "red", form: str = "PNG", **more: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, form, **more)
    return stream.getvalue()


class Hands:
    """One page in one tab, in front of a server that a test holds."""

    def __init__(self, browser: Browser, server: PageServer) -> None:
        self.browser, self.server = browser, server
        self.run, self.wait = browser.run, browser.wait

    def open(self, width: int = 1100, height: int = 900) -> None:
        self.browser.open(self.server.address, width, height)
        self.wait("document.documentElement.dataset.ready === 'yes'")
        self.wait("document.getElementById('hello').textContent && document.getElementById('title').textContent")

    def reload(self) -> None:
        self.browser.reload()
        self.wait("document.documentElement.dataset.ready === 'yes'")

    def met(self) -> None:
        """Waits until the page knows its model."""
        self.wait("document.getElementById('model').textContent.trim()")

    def focus(self, script: str = "document.getElementById('text')") -> None:
        self.run(f"{script}.focus()")

    def write(self, text: str) -> None:
        self.focus()
        self.browser.type(text)

    def send(self, text: str = "") -> None:
        self.write(text)
        self.browser.key("Enter", "\r")

    def ask(self, text: str) -> str:
        """Sends, waits for the whole answer, and gives what the page shows of it."""
        count = self.run(f"{TURN}.length")
        self.send(text)
        self.wait(f"{TURN}.length === {count + 2}")
        self.idle()
        return self.answer()

    def idle(self) -> None:
        self.wait(
            f"{TURN}.length && {TURN}.every(t => t.getAttribute('aria-busy') !== 'true')"
            " && document.getElementById('send').title !== 'Stop'"
        )

    def answer(self, at: int = -1) -> str:
        return self.run(f"{TURN}.at({at}).querySelector('.words, .said').innerText")

    def turns(self) -> list[str]:
        return self.run(f"{TURN}.map(t => t.querySelector('.words, .said').innerText)")

    def titles(self) -> list[str]:
        return self.run("[...document.querySelectorAll('#list .open')].map(b => b.innerText.trim())")

    def button(self, name: str, at: int = -1) -> str:
        """A script that gives a turn's button by its name."""
        return f"{TURN}.at({at}).querySelector('button[aria-label={json.dumps(name)}]')"

    def press(self, name: str, at: int = -1) -> None:
        self.browser.click(self.button(name, at))

    def text(self) -> str:
        return self.run("document.body.innerText")

    def notes(self) -> str:
        return self.run("document.getElementById('notes').innerText")

    def spoken(self) -> str:
        return self.run(
            "[...document.querySelectorAll('#spoken-0 p, #spoken-1 p, #alarm p')].map(p => p.innerText).join('|')"
        )

    # --- pictures

    def _transfer(self, files: list[tuple[str, bytes, str]]) -> str:
        told = json.dumps([(name, base64.b64encode(data).decode(), kind) for name, data, kind in files])
        return (
            f"const t = new DataTransfer(); for (const [name, data, type] of {told}) t.items.add(new File("
            "[Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type}));"
        )

    def drag(self, *files: tuple[str, bytes, str], drop: bool = True) -> None:
        """Drags files over the page, and drops them."""
        steps = ["dragenter", "dragover", *(["drop"] if drop else [])]
        self.run(
            f"(() => {{ {self._transfer(list(files))} for (const kind of {json.dumps(steps)}) "
            "document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: t, bubbles: true, cancelable: true})); })()"
        )

    def paste(self, *files: tuple[str, bytes, str], text: str = "") -> bool:
        """Pastes files; true where the page took them."""
        return self.run(
            f"(() => {{ {self._transfer(list(files))} t.setData('text/plain', {json.dumps(text)});"
            "const e = new ClipboardEvent('paste', {clipboardData: t, bubbles: true, cancelable: true});"
            "return !document.getElementById('text').dispatchEvent(e); })()"
        )

    def held(self, count: int) -> list[str]:
        """Waits until so many pictures are held; their names with what is told of them."""
        self.wait(
            f"document.querySelectorAll('#held li img').length === {count} && !document.querySelector('#held .loading')"
        )
        return self.run("[...document.querySelectorAll('#held li div')].map(d => d.innerText.replace('\\n', ': '))")

    def sent(self, at: int = -1) -> list[Image.Image]:
        """The pictures in a request."""
        found = []
        for message in self.server.asked[at]["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image_url":
                    found.append(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))))
        return found


@contextmanager
def opened(browser: Browser) -> Iterator[Hands]:
    """The page, opened from a server of its own: a new origin, that knows nothing. At the end nothing foreign may have
    been asked for, and nothing thrown or refused by the policy; a request that failed on purpose is not counted."""
    server = PageServer()
    browser.open("about:blank")
    browser.events.clear()
    first = browser.session
    hands = Hands(browser, server)
    hands.open()
    hands.met()
    yield hands
    browser.run("1")
    foreign = [url for url in browser.fetched() if not url.startswith((server.address, f"blob:{server.address}"))]
    wrong = [told for told in browser.complaints() if told.get("entry", {}).get("source") != "network"]
    browser.turn(first)
    browser.open("about:blank")
    server.close()
    assert foreign == [] and wrong == []
