"""The chat page when things go wrong, for those who do not see or point, on a phone, and under attack."""

from __future__ import annotations

import json
from typing import Any

import pytest

from page_hands import TURN, Hands, photo
from page_server import CLOSE, PAGE, default_model

pytestmark = pytest.mark.serve


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
    page.browser.offline(True)
    page.send("Anybody?")
    page.wait("document.querySelector('.turn:last-child .fault:not([hidden])')")
    page.idle()
    assert "The server does not answer." in page.run(f"{TURN}.at(-1).innerText")
    page.wait("!document.getElementById('banner').hidden")
    assert page.turns()[2] == "Anybody?"
    page.browser.offline(False)
    page.wait("document.getElementById('banner').hidden")
    page.browser.click("document.querySelector('.turn:last-child .fault button')")
    page.wait(f"{TURN}.at(-1).innerText.includes('A red circle.')")


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
    page.wait("document.getElementById('theme').title === 'Light colours'")
    page.browser.click("document.getElementById('theme')")
    assert page.run(ground) == "rgb(251, 251, 249)"
    page.reload()
    assert page.run(ground) == "rgb(251, 251, 249)", "the choice outlives the page"
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
    page.wait("[...document.querySelectorAll('#list .open')].some(b => b.innerText.includes('First line'))")
    # From the top of the page everything is reached in the order in which it stands.
    page.run("document.getElementById('skip').focus()")
    stops = []
    for _ in range(30):
        page.browser.key("Tab")
        name = "(e => (e.getAttribute('aria-label') || e.innerText || e.id).trim())(document.activeElement)"
        stops.append(page.run(name))
        assert page.run(
            "(e => e === document.body || getComputedStyle(e).outlineStyle !== 'none' || e.id === 'text')"
            "(document.activeElement)"
        ), f"{stops[-1]} does not show that it has the focus"
        if stops[-1] == "text":
            break
    wanted = [
        "New conversation", "First line", "Rename \u201cFirst line\u201d", "Delete \u201cFirst line\u201d", "API",
        "Conversations", "Save this conversation as JSON", "Dark colours", "Settings", "Copy", "Edit and ask again",
        "Copy", "Answer again", "How sure it was", "Add pictures", "text",
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
        "[...document.querySelectorAll('button, input, select, textarea, a, nav, aside, main, dialog')]"
        ".filter(e => !e.hidden && !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
        " || e.innerText?.trim() || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert page.run("[...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
    assert page.run("(all => new Set(all.map(e => e.id)).size === all.length)([...document.querySelectorAll('[id]')])")
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
        "[...document.querySelectorAll('.room *, dialog[open], dialog[open] *')]"
        f".filter(e => !e.closest('.scroll, pre, .unseen') && e.getBoundingClientRect().right > {width} + 0.5)"
        ".map(e => e.outerHTML.slice(0, 200))"
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
    "![p](https://evil.example/p.png)", "<iframe src=https://evil.example></iframe>",
    "[q](https://ok.example/\" onclick=x)",
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
    bad = "img, script, svg:not(.icon), iframe, style, [onclick], [onerror], b, h1"
    assert page.run(f"{inside}.querySelectorAll('{bad}').length") == 0
    assert page.run(f"[...{inside}.querySelectorAll('a')].map(a => a.href)") == [
        "https://evil.example/p.png", "https://evil.example/", "https://ok.example/", "https://evil.example/",
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
        "<h4>Title</h4>", "<strong>bold <em>both</em></strong>", "<em>slanted</em>", "<del>gone</del>",
        "<code>a*b*</code>", "snake_case_name", "2*3*4", "*star*<br>next line",
        '<ol start="1"><li>one<ul><li>inner</li></ul></li><li>two</li></ol>',
        "<blockquote><p>quoted<br>more</p></blockquote>",
        '<th class="middle" scope="col">a</th>', '<td class="middle">x | y</td>',
        "if a &lt; b:\n    **no**", "<hr>", ">https://ok.example/a_b_c</a>. end",
    ):  # fmt: skip
        assert wanted in html, (wanted, html)


def test_no_text_makes_the_page_think_for_long(page: Hands) -> None:
    """Each of these is quadratic or worse where every mark looks for its end through all that follows."""
    long = 100_000
    hostile = [
        "*" * long, "**a" * (long // 3), "[" * long, "[a](" * (long // 4), "`" * long, "` `` " * (long // 5),
        "_a " * (long // 3), "> " * long, "- " * long, "|" * long, "|-" * (long // 2), "#" * long,
        "(((((" * (long // 5), "~~a *b " * (long // 7), "http://" * (long // 7), "```\n" * (long // 4),
        "\n".join("  " * (i % 60) + "- x" for i in range(5000)), "a\n|-\n" * (long // 5),
    ]  # fmt: skip
    done = page.run(
        "import('./page/words.js').then(({blocks, show}) => { const box = document.createElement('div');"
        f" for (const text of {json.dumps(hostile)}) {{ blocks(text); show(box, text); }}"
        " return box.childElementCount > 0; })"
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
