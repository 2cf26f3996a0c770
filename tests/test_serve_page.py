"""The chat page in a real browser: what a person does with it, what goes wrong, and what somebody plants in it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser_pipe import Browser
from page_hands import TURN, Hands, photo
from page_server import CLOSE, PAGE, PageServer, default_model

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def chrome(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(browser, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def page(chrome: Browser) -> Iterator[Hands]:
    """The page, opened from a server of its own: a new origin, that knows nothing. At the end nothing foreign may have
    been asked for, and nothing thrown or refused by the policy; a request that failed on purpose is not counted."""
    server = PageServer()
    chrome.open("about:blank")
    chrome.events.clear()
    first = chrome.session
    hands = Hands(chrome, server)
    hands.open()
    hands.met()
    yield hands
    chrome.run("1")
    foreign = [url for url in chrome.fetched() if not url.startswith((server.address, f"blob:{server.address}"))]
    wrong = [told for told in chrome.complaints() if told.get("entry", {}).get("source") != "network"]
    chrome.turn(first)
    chrome.open("about:blank")
    server.close()
    assert foreign == [] and wrong == []


# --- asking -----------------------------------------------------------------------------------------------------------


def test_a_picture_is_dropped_and_asked_about(page: Hands) -> None:
    page.drag(("square.png", photo(), "image/png"), drop=False)
    assert page.run("!document.getElementById('drop').hidden"), "the page says that it takes what hovers over it"
    page.drag(("square.png", photo(), "image/png"))
    assert page.run("document.getElementById('drop').hidden")
    assert page.held(1) == ["square.png: 64 \u00d7 48"]
    assert page.ask("What is **this**?") == "A red circle."
    body = page.server.asked[0]
    assert body["model"] == "quickstart" and body["stream"] and body["temperature"] == 0 and body["max_tokens"] == 512
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is **this**?"}
    assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == photo(), "what is small is sent as it is"
    assert page.turns()[0] == "What is **this**?", "what people type is shown as they typed it"
    stats = page.run(f"{TURN}.at(-1).querySelector('.stats').textContent")
    assert "s to the first token" in stats and "2 tokens" in stats and "87 read" in stats
    assert page.run("document.title") == "What is **this**? \u2013 leveret"
    assert page.held(0) == []
    # The second question carries the first one, with its picture, and what was answered.
    page.ask("Sure?")
    roles = [message["role"] for message in page.server.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and len(page.sent()) == 1
    assert page.server.asked[1]["messages"][1]["content"] == "A red circle."


def test_pictures_are_pasted_removed_and_sent_in_order(page: Hands) -> None:
    assert page.paste(("a.png", photo(colour="red"), "image/png"), ("b.png", photo(colour="blue"), "image/png"))
    page.held(2)
    assert page.paste(("c.png", photo(colour="lime"), "image/png"))
    page.held(3)
    assert not page.paste(("d.png", photo(), "image/png"), text="words"), "where there are words, they are meant"
    page.browser.click("document.querySelector('[aria-label=\"Remove b.png\"]')")
    assert [told.partition(":")[0] for told in page.held(2)] == ["a.png", "c.png"]
    assert page.run("document.activeElement.getAttribute('aria-label')") == "Remove c.png", "the focus is not lost"
    page.send()
    page.wait(f"{TURN}.length === 2")
    page.idle()
    assert [image.getpixel((3, 3)) for image in page.sent()] == [(255, 0, 0), (0, 255, 0)]
    assert page.turns()[0] == "What is in the image?", "a picture without words is asked about"
    # A click shows it large, Escape closes it.
    page.browser.click("document.querySelector('.pictures button')")
    assert page.run("document.getElementById('big').open")
    page.browser.key("Escape")
    page.wait("!document.getElementById('big').open")


def test_large_pictures_are_scaled_down_and_it_is_said(page: Hands) -> None:
    wide, tall = photo((5000, 1250), form="JPEG"), photo((300, 6000))
    page.drag(("wide.jpg", wide, "image/jpeg"), ("tall.png", tall, "image/png"))
    assert page.held(2) == [
        "wide.jpg: scaled down from 5000 \u00d7 1250 to 2048 \u00d7 512",
        "tall.png: scaled down from 300 \u00d7 6000 to 102 \u00d7 2048",
    ]
    assert "scaled down from 5000" in page.spoken()
    page.ask("What?")
    first, second = page.sent()
    assert (first.size, first.format) == ((2048, 512), "JPEG") and (second.size, second.format) == ((102, 2048), "PNG")
    assert all(abs(a - b) < 6 for a, b in zip(first.getpixel((9, 9)), (255, 0, 0), strict=True))  # type: ignore[arg-type]


def test_a_turned_photograph_is_shown_upright_and_sent_as_it_is(page: Hands) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = photo((80, 40), form="JPEG", exif=exif)
    page.drag(("turned.jpg", turned, "image/jpeg"))
    assert page.held(1) == ["turned.jpg: 40 \u00d7 80"]
    page.ask("What?")
    assert page.sent()[0].size == (80, 40), "the server turns it as every reader does"


def test_what_is_no_picture_is_refused_with_its_reason(page: Hands) -> None:
    gif = photo(form="GIF")
    page.drag(
        ("notes.txt", b"words", "text/plain"), ("broken.png", photo()[:60], "image/png"),
        ("empty.jpg", b"", "image/jpeg"), ("moving.gif", gif, "image/gif"),
    )  # fmt: skip
    assert page.held(1) == ["moving.gif: sent as PNG, its first picture alone"]
    notes = page.notes()
    assert "notes.txt is not a picture" in notes and "broken.png is no picture" in notes and "empty.jpg is no" in notes
    page.drag(*[(f"{i}.png", photo(), "image/png") for i in range(5)])
    page.held(4)
    assert "at most 4 pictures" in page.notes()
    page.ask("What?")
    assert page.sent()[0].format == "PNG" and len(page.sent()) == 4
    page.drag(("more.png", photo(), "image/png"))
    page.wait("document.getElementById('notes').innerText.includes('more.png is left out')")


def test_an_answer_is_streamed_spoken_by_sentences_and_stopped(page: Hands) -> None:
    gate, never = threading.Event(), threading.Event()
    page.server.reply = lambda body: ["One sentence. Half", gate, " of another", never, " lost"]
    page.send("Go")
    page.wait(f"{TURN}.at(-1)?.innerText.includes('Half')")
    assert page.run(f"{TURN}.at(-1).classList.contains('making')"), "a caret stands at its end"
    assert (
        page.run("getComputedStyle(document.querySelector('.making .words > p'), '::after').animationName") == "breathe"
    )
    assert page.run("document.getElementById('send').title") == "Stop"
    assert page.spoken() == "One sentence."
    # Enter does not send while an answer is made; what was typed stays.
    page.send("next")
    assert page.run("document.getElementById('text').value") == "next" and len(page.server.asked) == 1
    gate.set()
    page.wait(f"{TURN}.at(-1).innerText.includes('of another')")
    page.browser.key("Escape")
    page.wait("document.getElementById('send').title === 'Send'")
    assert page.answer() == "One sentence. Half of another" and "Stopped." in page.text()
    assert page.spoken().endswith("Half of another|Stopped.")
    page.server.reply = lambda body: ["Done."]
    assert page.run("document.getElementById('text').value") == "next"
    page.browser.key("Enter", "\r")
    page.wait(f"{TURN}.length === 4")
    page.idle()
    # The server sees that nobody reads on, within its next line.
    page.wait("true")
    for _ in range(200):
        if page.server.left:
            break
        threading.Event().wait(0.02)
    assert page.server.left == 1


def test_answers_are_made_again_and_every_version_is_kept(page: Hands) -> None:
    page.ask("Which?")
    page.press("Answer again")
    page.wait(f"{TURN}.at(-1).innerText.includes('2/2')")
    page.idle()
    assert "The same answer, as it has to be at temperature 0." in page.text()
    page.server.reply = lambda body: [f"Warm at {body['temperature']}."]
    page.browser.click(f"{TURN}.at(-1).querySelector('.state button')")
    page.wait(f"{TURN}.at(-1).innerText.includes('3/3')")
    page.idle()
    assert page.answer() == "Warm at 0.7."
    page.press("The version before")
    page.wait(f"{TURN}.at(-1).innerText.includes('2/3')")
    assert page.answer() == "A red circle."
    page.reload()
    page.wait(f"{TURN}.length === 2")
    assert page.answer() == "A red circle." and "2/3" in page.text(), "the one that was chosen"
    page.press("The next version")
    page.wait(f"{TURN}.at(-1).innerText.includes('3/3')")
    page.ask("And now?")
    assert page.server.asked[-1]["messages"][1]["content"] == "Warm at 0.7."


def test_an_earlier_message_is_edited_and_the_old_branch_stays(page: Hands) -> None:
    page.drag(("a.png", photo(), "image/png"))
    page.held(1)
    page.ask("First question")
    page.ask("Second question")
    page.press("Edit and ask again", 0)
    page.held(1)
    assert page.run("document.getElementById('text').value") == "First question"
    assert page.run(f"{TURN}.at(3).classList.contains('later')")
    page.browser.key("Escape")
    assert page.run("document.getElementById('text').value") == "" and page.held(0) == []
    page.browser.key("ArrowUp")  # the last message of one's own
    page.wait("document.getElementById('text').value === 'Second question'")
    page.browser.key("Escape")
    page.press("Edit and ask again", 0)
    page.held(1)
    page.run("document.getElementById('text').select()")
    page.server.reply = lambda body: ["Edited."]
    page.send("Other words")
    page.wait(f"{TURN}.length === 2")
    page.idle()
    assert page.turns() == ["Other words", "Edited."] and "2/2" in page.text()
    assert len(page.sent()) == 1 and len(page.server.asked[-1]["messages"]) == 1
    page.press("The version before", 0)
    page.wait(f"{TURN}.length === 4")
    assert page.turns()[2] == "Second question"


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_reload_keeps_conversations_pictures_and_what_was_typed(page: Hands) -> None:
    page.drag(("kept.png", photo(), "image/png"))
    page.held(1)
    page.ask("Keep this")
    page.write("not sent yet")
    page.reload()
    page.wait(f"{TURN}.length === 2")
    assert page.turns() == ["Keep this", "A red circle."] and page.titles() == ["Keep this"]
    page.wait("document.querySelector('.pictures img')?.naturalWidth === 64")
    assert page.run("document.getElementById('text').value") == "not sent yet"
    page.run("document.getElementById('text').select()")
    page.ask("Go on")
    assert len(page.sent()) == 1, "the picture goes with it again"


def test_what_was_streamed_until_a_reload_is_kept(page: Hands) -> None:
    never = threading.Event()
    page.server.reply = lambda body: ["Kept", 1.1, " so far", never]
    page.send("Go")
    page.wait(f"{TURN}.at(-1)?.innerText.includes('so far')")
    page.run("new Promise(done => setTimeout(done, 100))")
    page.reload()
    page.wait(f"{TURN}.length === 2")
    assert page.answer().startswith("Kept") and "closed before the answer was complete" in page.text()
    page.server.reply = lambda body: ["Whole."]
    page.press("Answer again")
    page.wait(f"{TURN}.at(-1).innerText.includes('Whole')")


def test_conversations_are_listed_renamed_deleted_and_brought_back(page: Hands) -> None:
    page.ask("One")
    page.browser.click("document.getElementById('new')")
    page.wait(f"{TURN}.length === 0")
    page.ask("Two")
    assert page.titles() == ["Two", "One"]
    page.browser.click("document.querySelector('#list li:last-child .open')")
    page.wait("document.getElementById('title').textContent === 'One'")
    assert page.turns() == ["One", "A red circle."]
    page.browser.click("document.querySelector('#list li.now [aria-label^=Rename]')")
    page.wait("document.activeElement.getAttribute('aria-label') === 'Title'")
    page.browser.type("A better name")
    page.browser.key("Enter", "\r")
    page.wait("document.getElementById('list').innerText.includes('A better name')")
    page.browser.click("document.querySelector('#list li.now [aria-label^=Delete]')")
    page.wait("document.querySelectorAll('#list li').length === 1")
    assert page.run(f"{TURN}.length") == 0
    page.browser.click("document.querySelector('#notes .link')")
    page.wait("document.getElementById('title').textContent === 'A better name'")
    assert page.turns() == ["One", "A red circle."] and len(page.titles()) == 2
    page.run("history.back()")
    page.wait("document.getElementById('title').textContent !== 'A better name'")


def test_two_tabs_share_what_is_kept_and_destroy_nothing(page: Hands) -> None:
    page.ask("From the first")
    address = page.run("location.href")
    first = page.browser.tab()
    page.browser.open(address)
    page.wait(f"{TURN}.length === 2")
    page.met()
    # The second tab goes on while the first still shows the old end; both ask below the same answer.
    page.server.reply = lambda body: ["Second answer."]
    page.ask("From the second")
    second = page.browser.turn(first)
    page.wait(f"{TURN}.length === 4")
    assert page.turns()[2:] == ["From the second", "Second answer."]
    page.server.reply = lambda body: ["Third answer."]
    page.ask("From the first again")
    assert [m["role"] for m in page.server.asked[-1]["messages"]] == ["user", "assistant"] * 2 + ["user"]
    page.browser.turn(second)
    page.wait(f"{TURN}.length === 6")
    # A stream in one tab grows in the other, and two streams at once keep both.
    gates = [threading.Event(), threading.Event()]
    page.server.reply = lambda body: ["slow", gates[0], " end"]
    page.send("Slow one")
    page.wait(f"{TURN}.at(-1).innerText.includes('slow')")
    page.browser.turn(first)
    page.wait(f"{TURN}.length === 8")
    gates[0].set()
    page.wait(f"{TURN}.at(-1).innerText.includes('slow end')")
    # Deleted in one, it goes in the other; settings are shared, too.
    page.browser.click("document.getElementById('theme')")
    page.browser.click("document.querySelector('#list li.now [aria-label^=Delete]')")
    page.wait("document.querySelectorAll('#list li').length === 0")
    page.browser.turn(second)
    page.wait("document.getElementById('notes').innerText.includes('deleted in another tab')")
    assert page.run(f"{TURN}.length") == 0 and page.run("document.documentElement.dataset.theme") in ("dark", "light")
    page.browser.ask("Page.close")
    page.browser.session = first


def test_a_conversation_is_saved_as_json(page: Hands, tmp_path: Path) -> None:
    page.drag(("a.png", photo(), "image/png"))
    page.held(1)
    page.ask("Save me / please")
    page.browser.ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.browser.click("document.getElementById('export')")
    for _ in range(300):
        if list(tmp_path.glob("*.json")):
            break
        threading.Event().wait(0.02)
    (file,) = tmp_path.glob("*.json")
    saved = json.loads(file.read_text("utf-8"))
    assert (
        file.name == "save-me-please.json" and saved["title"] == "Save me / please" and saved["model"] == "quickstart"
    )
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert saved["messages"][1]["content"] == "A red circle." and saved["messages"][1]["stats"]["tokens"] == 2


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_full_server_is_asked_again_when_it_said(page: Hands) -> None:
    full: dict[str, Any] = {"message": "The queue is full.", "code": "queue_full"}
    page.server.refusals = [(429, {"Retry-After": "1"}, full), (429, {"Retry-After": "600"}, full)]
    page.send("Go")
    page.wait("document.body.innerText.includes('The queue is full. Trying again in')")
    page.wait("/again in (600|59\\d) s/.test(document.body.innerText)")
    assert len(page.server.asked) == 2, "the first wait ended by itself"
    page.browser.click(f"{TURN}.at(-1).querySelector('.state button')")
    page.wait(f"{TURN}.at(-1).innerText.includes('A red circle.')")
    page.idle()
    page.server.refusals = [(429, {"Retry-After": "600"}, full)]
    page.send("More")
    page.wait("/again in (600|59\\d) s/.test(document.body.innerText)")
    page.browser.key("Escape")
    page.wait("document.body.innerText.includes('Stopped before the first word.')")


def test_a_token_is_asked_for_kept_in_the_tab_and_used(page: Hands) -> None:
    page.server.token = "sesame"
    page.reload()
    page.wait("!document.getElementById('banner').hidden")
    assert "asks for a token" in page.text() and "asks for a token" in page.spoken()
    page.focus("document.querySelector('#banner input')")
    page.browser.type("wrong")
    page.browser.key("Enter", "\r")
    page.wait("document.querySelector('#banner input')?.value === ''")
    page.focus("document.querySelector('#banner input')")
    page.browser.type("sesame")
    page.browser.key("Enter", "\r")
    page.wait("document.getElementById('banner').hidden")
    assert page.ask("Open") == "A red circle."
    assert page.run("JSON.stringify({...localStorage})").find("sesame") < 0
    assert "sesame" in page.run("JSON.stringify({...sessionStorage})")
    page.reload()
    assert page.ask("Still open") == "A red circle."
    # Another token from now on: the answer itself asks for it, and goes on with it.
    page.server.token = "other"
    page.send("Again")
    page.wait("document.querySelector('.fault input')")
    page.focus("document.querySelector('.fault input')")
    page.browser.type("other")
    page.browser.key("Enter", "\r")
    page.wait(f"{TURN}.at(-1).innerText.includes('A red circle.')")
    page.idle()
    assert page.run(f"{TURN}.length") == 6, "the failure was asked again in its place"


@pytest.mark.parametrize(
    "pieces, told",
    [
        (["So far", {"error": {"message": "going", "code": "server_shutdown"}}], "The server is shutting down."),
        (["So far", CLOSE], "The connection was lost in the middle"),
        (["So far", {"error": {"message": "It <b>failed</b>.", "code": None}}], "It <b>failed</b>."),
    ],
)
def test_an_answer_that_breaks_off_is_kept_and_can_be_asked_again(page: Hands, pieces: list[Any], told: str) -> None:
    page.server.reply = lambda body: pieces
    page.send("Go")
    page.wait(f"{TURN}.at(-1)?.querySelector('.fault:not([hidden])')")
    page.idle()
    assert page.answer() == "So far" and told in page.text()
    assert page.run("document.getElementById('alarm').innerText") != ""
    page.server.reply = lambda body: ["Whole."]
    page.browser.click(f"{TURN}.at(-1).querySelector('.fault button')")
    page.wait(f"{TURN}.at(-1).innerText.includes('Whole.')")
    page.idle()
    assert "2/2" in page.text(), "what had come is a version of its own"


def test_refusals_and_a_server_that_is_not_there(page: Hands) -> None:
    page.server.refusals = [(400, {}, {"message": "messages: too <i>long</i>", "param": "messages"})]
    page.send("Go")
    page.wait("document.querySelector('.fault:not([hidden])')")
    assert "messages: too <i>long</i>" in page.text()
    page.browser.click("document.querySelector('.fault button')")
    page.wait(f"{TURN}.at(-1).innerText.includes('A red circle.')")
    page.idle()
    assert page.run(f"{TURN}.length") == 2
    page.server.close()
    page.send("Anybody?")
    page.wait("document.querySelector('.turn:last-child .fault:not([hidden])')")
    page.idle()
    assert "The server does not answer." in page.run(f"{TURN}.at(-1).innerText")
    page.wait("!document.getElementById('banner').hidden")
    assert page.turns()[2] == "Anybody?"


# --- what is set ------------------------------------------------------------------------------------------------------


def put(page: Hands, name: str, value: str) -> None:
    page.run(
        f"(() => {{ const e = document.getElementById('set-{name}'); e.value = {json.dumps(value)};"
        " for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


def test_settings_reach_the_server_and_outlive_the_page(page: Hands) -> None:
    page.browser.click("document.getElementById('open-settings')")
    for name, value in {
        "temperature": "0.8",
        "top_p": "0.9",
        "max_tokens": "7",
        "seed": "41",
        "system": " Be brief. ",
    }.items():
        put(page, name, value)
    page.browser.click("document.getElementById('set-chances')")
    page.browser.key("Escape")
    page.wait("!document.getElementById('settings').open")
    page.reload()
    page.ask("Go")
    body = page.server.asked[-1]
    assert {k: body[k] for k in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.8, "top_p": 0.9, "max_tokens": 7, "seed": 41,
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and "logprobs" not in body
    page.browser.click("document.getElementById('open-settings')")
    for name, value in {"max_tokens": "999999", "seed": "what", "temperature": "0"}.items():
        put(page, name, value)
    page.browser.key("Escape")
    page.ask("Go")
    body = page.server.asked[-1]
    assert body["max_tokens"] == 1024 and "seed" not in body, "never more than the server allows, and no seed of words"
    page.server.reply = lambda body: ["one ", "two ", "three "]
    page.browser.click("document.getElementById('open-settings')")
    put(page, "max_tokens", "2")
    page.browser.key("Escape")
    page.ask("Go")
    assert "Cut at 3 tokens" in page.text()


def test_light_and_dark(page: Hands) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.run(ground) == "rgb(21, 24, 27)"
    assert page.run("document.getElementById('theme').title") == "Light colours"
    page.browser.click("document.getElementById('theme')")
    assert page.run(ground) == "rgb(251, 251, 249)"
    page.reload()
    assert page.run(ground) == "rgb(251, 251, 249)", "the choice outlives the page"
    page.browser.ask("Emulation.setEmulatedMedia", features=[])
    page.browser.click("document.getElementById('theme')")
    assert page.run(ground) == "rgb(21, 24, 27)"


def test_a_model_without_vision(page: Hands) -> None:
    page.server.models = [default_model(vision=False, max_images=0)]
    page.reload()
    page.met()
    assert "reads text only" in page.text() and page.run("document.getElementById('attach').hidden")
    page.drag(("a.png", photo(), "image/png"))
    page.wait("document.getElementById('notes').innerText.includes('reads text only')")
    page.ask("Hello")
    assert page.server.asked[-1]["messages"] == [{"role": "user", "content": "Hello"}]


# --- inside an answer -------------------------------------------------------------------------------------------------


def test_how_sure_it_was_and_where_it_looked(page: Hands) -> None:
    page.server.reply = lambda body: ["A", " red", " circle"]
    page.drag(("a.png", photo((320, 200)), "image/png"))
    page.held(1)
    page.ask("What?")
    assert page.server.asked[-1]["top_logprobs"] == 5
    page.press("How sure it was")
    page.wait("document.querySelector('.chances tbody')")
    assert page.run("[...document.querySelectorAll('.word')].map(w => w.innerText.trim())") == ["A", "red", "circle"]
    assert page.run("document.querySelectorAll('.chances tr').length") == 5
    page.focus("document.querySelector('.word[tabindex=\"0\"]')")
    page.browser.key("ArrowRight")
    page.browser.key("ArrowLeft")
    assert "blue" in page.run("document.activeElement.getAttribute('aria-label')")
    assert page.run("document.querySelectorAll('.word[tabindex=\"0\"]').length") == 1, (
        "one stop on the way of the focus"
    )
    page.press("Where it looked")
    page.wait("document.querySelector('.looked canvas')?.width > 1")
    body = page.server.looked[0]
    assert body["answer"] == "A red circle" and body["messages"][0]["content"][0]["type"] == "image_url"
    told = "document.querySelector('.inside [aria-live]').textContent"
    assert page.run(told) == "For \u201cred\u201d 40 % of its attention lay on the picture, most of it at the top."
    pixels = "document.querySelector('.looked canvas').toDataURL()"
    before = page.run(pixels)
    page.browser.click("document.querySelectorAll('.word')[2]")
    assert page.run(pixels) != before and "circle" in page.run(told)
    page.focus("document.querySelector('.layer input')")
    before = page.run(pixels)
    page.browser.key("ArrowRight")
    assert page.run(pixels) != before and page.run("document.querySelector('.layer output').value") == "1 of 3"
    page.press("Where it looked")
    page.wait("!document.querySelector('.inside')")


def test_probabilities_are_looked_up_where_none_came(page: Hands) -> None:
    page.run("localStorage.setItem('leveret.settings', JSON.stringify({chances: false}))")
    page.reload()
    page.met()
    page.ask("What?")
    page.press("How sure it was")
    page.wait("document.querySelector('.chances tbody')")
    assert len(page.server.looked) == 1 and "other" in page.run("document.querySelector('.chances').innerText")


# --- for whom it is ---------------------------------------------------------------------------------------------------


def test_by_keyboard_alone(page: Hands) -> None:
    page.run("document.activeElement.blur()")
    page.browser.ask("Page.bringToFront")
    page.run("document.getElementById('skip').focus()")
    page.browser.key("Enter", "\r")
    assert page.run("document.activeElement.id") == "text"
    page.browser.type("First line")
    page.browser.key("Enter", "\r", shift=True)
    page.browser.type("second line")
    page.browser.key("Enter", "\r")
    page.wait(f"{TURN}.length === 2")
    page.idle()
    assert page.server.asked[0]["messages"][0]["content"] == "First line\nsecond line"
    assert page.run("document.activeElement.id") == "text", "the focus stays where the next question is typed"
    # From the top of the page everything is reached in the order in which it stands.
    page.run("document.getElementById('skip').focus()")
    stops = []
    for _ in range(30):
        page.browser.key("Tab")
        name = "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || document.activeElement.id"
        stops.append(page.run(f"({name}).trim()"))
        assert page.run(
            "(e => e === document.body || getComputedStyle(e).outlineStyle !== 'none' || e.id === 'text')(document.activeElement)"
        ), f"{stops[-1]} does not show that it has the focus"
        if stops[-1] == "text":
            break
    wanted = [
        "New conversation", "First line", "Rename \u201cFirst line\u201d", "Delete \u201cFirst line\u201d", "API", "Conversations",
        "Save this conversation as JSON", "Dark colours", "Settings", "Copy", "Edit and ask again", "Copy",
        "Answer again", "How sure it was", "Add pictures", "text",
    ]  # fmt: skip
    assert [stop for stop in stops if stop in wanted] == wanted, stops
    page.focus(page.button("Answer again"))
    page.browser.key("Enter", "\r")
    page.wait(f"{TURN}.at(-1).innerText.includes('2/2')")
    page.idle()
    page.browser.key("/")
    assert page.run("document.activeElement.id") == "text"


def test_everything_has_a_name_and_a_role(page: Hands) -> None:
    page.drag(("a.png", photo(), "image/png"))
    page.held(1)
    page.ask("What?")
    page.browser.click("document.getElementById('open-settings')")
    nameless = page.run(
        "[...document.querySelectorAll('button, input, select, textarea, a, nav, aside, main, dialog')].filter(e => !e.hidden"
        " && !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.innerText?.trim() || e.textContent.trim()"
        " || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert page.run("[...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
    assert page.run(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size === document.querySelectorAll('[id]').length"
    )
    page.browser.key("Escape")


@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_wider_than_the_window(page: Hands, width: int) -> None:
    page.browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=1, mobile=False)
    page.reload()
    page.met()
    page.server.reply = lambda body: [
        "w" * 300, "\n\n| a | b | c | d | e | f | g |\n|-|-|-|-|-|-|-|\n", "| long long words |" * 7,
        "\n\n```\n" + "x" * 400 + "\n```\n", "`" + "y" * 200 + "`",
    ]  # fmt: skip
    page.drag(("n" * 150 + ".png", photo((640, 20)), "image/png"), ("b.png", photo((20, 640)), "image/png"))
    page.held(2)
    outside = (
        "[...document.querySelectorAll('.room *, dialog[open], dialog[open] *')].filter(e => !e.closest('.scroll, pre, .unseen')"
        f" && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 200))"
    )
    assert page.run(outside) == []
    page.ask("v" * 300)
    assert page.run(outside) == [] and page.run("document.documentElement.scrollWidth") <= width
    page.press("Where it looked")
    page.wait("document.querySelector('.looked')")
    page.browser.click("document.getElementById('open-settings')")
    assert page.run(outside) == []
    page.browser.key("Escape")
    if width > 800:
        return
    # The list lies over the page, and the page below it is out of reach until it is put away.
    assert page.run("document.getElementById('side').inert")
    page.browser.click("document.querySelector('#menu-place button')")
    assert page.run("!document.getElementById('side').inert && document.getElementById('room').inert")
    assert page.run("document.activeElement.id") == "new"
    page.browser.key("Escape")
    assert page.run("document.getElementById('side').inert && !document.getElementById('room').inert")
    assert page.run("document.activeElement.getAttribute('aria-label')") == "Conversations"


# --- what somebody plants ---------------------------------------------------------------------------------------------

EVIL = [
    "<img src=x onerror=\"window.bad = 1\">", "<script>window.bad = 1</script>", "<svg onload=window.bad=1>",
    "[click](javascript:window.bad=1)", "[c](JaVaScRiPt:window.bad=1)", "[d](data:text/html,<script>1</script>)",
    "![p](https://evil.example/p.png)", "<iframe src=https://evil.example></iframe>", "[q](https://ok.example/\" onclick=x)",
    "```html\n<b onclick=1>\n```", "| <b>a</b> | [j](javascript:1) |\n|-|-|\n| <img src=y> | x |", "<https://evil.example>",
    "</li></ol><h1>out</h1>", "&lt;b&gt;", "__proto__ constructor", "<style>body{display:none}</style>",
]  # fmt: skip


def test_nothing_that_is_planted_becomes_markup(page: Hands) -> None:
    evil = "\n\n".join(EVIL)
    page.server.reply = lambda body: [evil]
    name = "<img src=x onerror=window.bad=1>.png"
    page.drag((name, photo(), "image/png"), ("<b>.txt", b"x", "text/plain"))
    assert page.held(1)[0].startswith(name)
    page.ask(evil)
    page.press("How sure it was")
    page.wait("document.querySelector('.chances')")
    page.browser.click("document.querySelector('.pictures button')")
    page.browser.key("Escape")
    page.reload()
    page.wait(f"{TURN}.length === 2")
    assert page.titles()[0].startswith("<img src=x onerror")
    assert page.run("document.title").startswith("<img")
    assert page.run("window.bad") is None
    inside = f"{TURN}.at(-1).querySelector('.words')"
    assert (
        page.run(
            f"{inside}.querySelectorAll('img, script, svg:not(.icon), iframe, style, [onclick], [onerror], b, h1').length"
        )
        == 0
    )
    assert page.run(f"[...{inside}.querySelectorAll('a')].map(a => a.href)") == [
        "https://evil.example/p.png", "https://evil.example/",
    ]  # fmt: skip
    assert page.run(
        f"[...{inside}.querySelectorAll('a')].every(a => a.rel.includes('noopener') && a.target === '_blank')"
    )
    shown = page.run(f"{inside}.textContent")
    for planted in (
        "<script>window.bad = 1</script>",
        "</li></ol><h1>out</h1>",
        "&lt;b&gt;",
        "javascript:window.bad=1",
    ):
        assert planted in shown
    page.server.models = [default_model() | {"id": "<img src=x onerror=window.bad=1>"}, default_model()]
    page.reload()
    page.met()
    assert page.run("window.bad") is None and page.run("document.querySelector('#model img')") is None


def test_markdown_is_shown_as_it_is_meant(page: Hands) -> None:
    text = (
        "# Title\nplain **bold *both*** _slanted_ ~~gone~~ `a*b*` snake_case_name 2*3*4 \\*star\\*\nnext line\n\n"
        "1. one\n   - inner\n2. two\n\n> quoted\n> more\n\n| a | b |\n|:-:|--:|\n| x \\| y | 1 |\n\n"
        "```py\nif a < b:\n    **no**\n```\n---\n* https://ok.example/a_b_c. end"
    )
    page.server.reply = lambda body: list(text)
    page.ask("Show")
    html = page.run(f"{TURN}.at(-1).querySelector('.words').innerHTML")
    for wanted in (
        "<h4>Title</h4>", "<strong>bold <em>both</em></strong>", "<em>slanted</em>", "<del>gone</del>", "<code>a*b*</code>",
        "snake_case_name", "2*3*4", "*star*<br>next line", '<ol start="1"><li>one<ul><li>inner</li></ul></li><li>two</li></ol>',
        "<blockquote><p>quoted<br>more</p></blockquote>", '<th class="middle" scope="col">a</th>', '<td class="middle">x | y</td>',
        "if a &lt; b:\n    **no**", "<hr>", ">https://ok.example/a_b_c</a>. end",
    ):  # fmt: skip
        assert wanted in html.replace(' start="1"', ' start="1"' if "start" in wanted else ""), (wanted, html)


def test_no_text_makes_the_page_think_for_long(page: Hands) -> None:
    """Each of these is quadratic or worse where every mark looks for its end through all that follows."""
    long = 100_000
    hostile = [
        "*" * long, "**a" * (long // 3), "[" * long, "[a](" * (long // 4), "`" * long, "` `` " * (long // 5), "_a " * (long // 3),
        "> " * long, "- " * long, "|" * long, "|-" * (long // 2), "#" * long, "(((((" * (long // 5), "~~a *b " * (long // 7),
        "\n".join("  " * (i % 60) + "- x" for i in range(5000)), "http://" * (long // 7), "```\n" * (long // 4), "a\n|-\n" * (long // 5),
    ]  # fmt: skip
    done = page.run(
        "import('./page/words.js').then(({blocks, show}) => { const box = document.createElement('div');"
        f" for (const text of {json.dumps(hostile)}) {{ blocks(text); show(box, text); }} return box.childElementCount > 0; }})"
    )
    assert done


# --- around it --------------------------------------------------------------------------------------------------------


def test_the_page_of_the_api(page: Hands) -> None:
    page.browser.open(page.server.address + "docs", width=360, height=740)
    page.wait("document.documentElement.dataset.ready === 'yes'")
    text = page.text()
    assert (
        "/v1/chat/completions" in text
        and "An <b>API</b> with code." in text
        and "at least 0, at most 2, default 1" in text
    )
    assert page.run("document.documentElement.scrollWidth") <= 360
    page.browser.click("[...document.querySelectorAll('summary')].find(s => s.innerText === 'Fields of Chat')")
    page.wait("document.querySelectorAll('details[open] dl').length === 1")
    assert "curl" in text and "/v1/chat/completions -X POST" in text
    assert '{"messages":[{"role":"user","content":"Hello"}]}' in text


def test_the_files_hold_nothing_foreign_and_nothing_inline() -> None:
    files = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    assert {"index.html", "docs.html", "chat.js", "chat.css", "leveret.svg"} <= set(files)
    for name, text in files.items():
        assert len(text.splitlines()) <= 450, f"{name}: one file, one idea"
        if name.endswith(".html"):
            assert " style=" not in text and "<style" not in text and " onclick=" not in text and "<script>" not in text
        if name.endswith(".js"):
            assert not any(
                word in text
                for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function")
            )
        foreign = [
            word for word in text.replace("http://www.w3.org/2000/svg", "").split()
            if "://" in word and name.endswith((".html", ".css", ".svg"))
        ]  # fmt: skip
        assert foreign == [], name


@pytest.fixture
def real(chrome: Browser) -> Iterator[Callable[[], str]]:
    from serve_fakes import serving

    with serving() as up:
        yield lambda: up.url + "/"


def test_with_the_real_server(chrome: Browser, real: Callable[[], str]) -> None:
    chrome.open("about:blank")
    chrome.events.clear()
    server = PageServer()
    server.close()
    server.address = real()
    page = Hands(chrome, server)
    page.open()
    page.met()
    assert "tiny" in page.text()
    page.drag(("red.png", photo(), "image/png"))
    page.held(1)
    page.ask("is there a square")
    assert page.run(f"{TURN}.at(-1).querySelector('.fault').hidden") and page.answer()
    stats = page.run(f"{TURN}.at(-1).querySelector('.stats').textContent")
    assert "to the first token" in stats and "read" in stats
    page.press("How sure it was")
    page.wait("document.querySelector('.chances tbody')")
    page.press("Where it looked")
    page.wait("document.querySelector('.looked canvas')?.width > 1")
    page.ask("and now")
    page.browser.open(server.address + "docs")
    page.wait("document.documentElement.dataset.ready === 'yes'")
    assert "/v1/look" in page.text()
    assert [url for url in chrome.fetched() if not url.startswith((server.address, f"blob:{server.address}"))] == []
    assert chrome.complaints() == []
    chrome.open("about:blank")
