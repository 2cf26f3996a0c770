"""The chat page in a real browser: what a person does with it, what goes wrong, and what somebody plants in it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from browser_pipe import Browser
from page_hands import TURN, Hands, photo
from page_server import PageServer

pytestmark = pytest.mark.serve


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
        ("notes.txt", b"words", "text/plain"), ("broken.png", photo()[:8] + b"no more", "image/png"),
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
    assert "Half of another" in page.spoken().split("|") and "Stopped." in page.spoken().split("|")
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
    page.wait("document.querySelectorAll('#list li').length === 2")
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
    page.wait("document.querySelectorAll('#list li').length === 2")
    assert page.turns() == ["One", "A red circle."]
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
    page.wait(f"{TURN}.length === 4 && {TURN}.at(-1).innerText.includes('Second answer.')")
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
    assert page.run(told) == (
        "For \u201cred\u201d 36 % of its attention lay on the picture and 3.6 % on the padding around it, "
        "strongest in the middle."
    )
    pixels = "document.querySelector('.looked canvas').toDataURL()"
    before = page.run(pixels)
    answer = "document.querySelector('[aria-label=\"Words of the answer\"]').querySelectorAll('.word')"
    page.browser.click(f"{answer}[2]")
    assert page.run(pixels) != before and "circle" in page.run(told)
    before = page.run(pixels)
    page.browser.click("document.querySelector('[aria-label=\"Words of the question\"]').querySelectorAll('.word')[1]")
    assert page.run(pixels) != before and page.run(told).startswith("For \u201cthing?\u201d 47 % of its attention")
    page.focus("document.querySelector('.layer input')")
    before = page.run(pixels)
    page.browser.key("ArrowRight")
    assert page.run(pixels) != before and page.run("document.querySelector('.layer output').value") == "1 of 3"
    page.press("Where it looked")
    page.wait("!document.querySelector('.inside')")


def test_a_box_that_is_named_is_drawn_where_it_lies(page: Hands) -> None:
    page.server.reply = lambda body: [
        "It is at [0.25, ",
        "0.5, 0.75, 1]",
        ", not [0.9, 0.1, 0.2, 0.3] or [1, 2, 3, 4].",
    ]
    page.drag(("a.png", photo((320, 200)), "image/png"))
    page.held(1)
    page.ask("Where?")
    page.press("Show the box on the picture")
    page.wait("document.querySelector('.boxes')")
    assert page.run("document.querySelectorAll('.boxes .edge').length") == 1, "what is no box is not drawn"
    corners = (
        "(() => { const b = document.querySelector('.boxes .edge').getBBox(); return [b.x, b.y, b.width, b.height]"
        ".map(v => Math.round(100 * v)) })()"
    )
    assert page.run(corners) == [25, 50, 50, 50]
    page.server.reply = lambda body: ["No box."]
    page.ask("Else?")
    assert page.run(page.button("Show the box on the picture") + ".hidden")


def test_probabilities_are_looked_up_where_none_came(page: Hands) -> None:
    page.run("localStorage.setItem('leveret.settings', JSON.stringify({chances: false}))")
    page.reload()
    page.met()
    page.ask("What?")
    page.press("How sure it was")
    page.wait("document.querySelector('.chances tbody')")
    assert len(page.server.looked) == 1 and "other" in page.run("document.querySelector('.chances').innerText")


# --- around it --------------------------------------------------------------------------------------------------------


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
    # What its random weights say is longer, spelled again, than the model has positions.
    page.run("localStorage.setItem('leveret.settings', JSON.stringify({max_tokens: 8}))")
    page.reload()
    page.met()
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
