"""The gallery in a real browser: filters, search, paging, keyboard, a phone; and what of it is shown at all."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from markupsafe import Markup

from browser_pipe import Browser
from evaluate_fakes import FakeEngine, FakeModel, sighted, tiny_world
from leveret import pages
from leveret.evaluate import evaluate
from leveret.evaluate.gallery import BYTES, CARDS, Card, browse
from leveret.evaluate.radar import radar


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_world(tmp_path_factory.mktemp("world"))
    out = tmp_path_factory.mktemp("run") / "out"

    def say(request: object) -> str:
        text = sighted(request)
        return "<script>document.title = 'broken in'</script>" if text == "W1" else text

    evaluate(FakeModel(), root, out=out, engine=FakeEngine(say))
    return out / "report.html"


@pytest.fixture(scope="module")
def seen(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(browser, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


SHOWN = "document.querySelectorAll('.browse li:not([hidden])').length"
TOLD = "document.querySelector('.told').textContent"


def choose(seen: Browser, name: str, value: str) -> None:
    seen.run(
        f"(() => {{ const c = document.querySelector('[name={name}]'); c.value = {json.dumps(value)};"
        " c.dispatchEvent(new Event('input', {bubbles: true})) })()"
    )


def test_filters_search_and_pages(page: Path, seen: Browser) -> None:
    items = [json.loads(line) for path in (page.parent / "items").glob("*.jsonl") for line in path.open()]
    seen.open(page.as_uri())
    assert seen.run(SHOWN) == 24 and seen.run(TOLD) == f"1 to 24 of {len(items)}"
    choose(seen, "task", "colour")
    assert seen.run(SHOWN) == 12
    choose(seen, "show", "wrong")
    assert seen.run(SHOWN) == 0 and seen.run(TOLD) == "no answer fits"
    choose(seen, "task", "")
    wrong = sum(item["score"] == 0 for item in items)
    assert seen.run(TOLD).endswith(f"of {wrong}")
    choose(seen, "show", "unreadable")
    assert seen.run(TOLD).endswith(f"of {sum(not item['readable'] for item in items)}")
    choose(seen, "show", "flip")
    flips = seen.run(
        "[...document.querySelectorAll('.browse li:not([hidden])')].every(c => /blind/.test(c.textContent))"
    )
    assert flips and seen.run(SHOWN) > 0
    choose(seen, "show", "")
    choose(seen, "find", "SQUARE colour")
    assert seen.run(TOLD).endswith("of 12")
    # What is shown stands in the address, and comes back with it.
    address = seen.run("location.href")
    assert "find=SQUARE" in address
    seen.open("about:blank")
    seen.open(address)
    assert seen.run(TOLD).endswith("of 12")


def test_by_keyboard_alone(page: Path, seen: Browser) -> None:
    seen.open("about:blank")
    seen.open(page.as_uri())
    seen.run("document.querySelector('[name=task]').focus()")
    seen.key("ArrowDown")
    assert seen.run("document.querySelector('[name=task]').value") == "existence"
    for _ in range(2):
        seen.key("Tab")
    assert seen.run("document.activeElement.name") == "find"
    for _ in range(2):  # Back is disabled on the first page: the next stop is Next
        seen.key("Tab")
        if seen.run("document.activeElement.name") == "next":
            break
    assert seen.run("document.activeElement.name") == "next"
    seen.key("Enter", "\r")
    assert seen.run(TOLD) == "25 to 48 of 72"


@pytest.mark.parametrize("width", [390, 1100])
def test_nothing_is_wider_than_the_window(page: Path, seen: Browser, width: int) -> None:
    seen.open(page.as_uri(), width=width, height=844)
    assert seen.run("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('.controls *, .gallery *')].filter(e => e.getBoundingClientRect().right > "
        f"{width}).length"
    )
    assert seen.run(outside) == 0


def test_nothing_is_fetched_and_no_foreign_script_runs(page: Path, seen: Browser) -> None:
    seen.open("about:blank")
    seen.open(page.as_uri())
    assert seen.run("document.title") == "Examination"
    assert seen.fetched() == [] and seen.complaints() == []
    seen.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))")
    assert seen.run("window.bad") is None, "the policy allows the page's own script alone"


def test_the_gallery_stays_small_and_says_what_it_leaves_out() -> None:
    made: list[str] = []

    def loud(name: str) -> bytes:
        import io

        from PIL import Image

        made.append(name)
        stream = io.BytesIO()
        Image.frombytes("RGB", (150, 150), random.Random(name).randbytes(67_500)).save(stream, "PNG")
        return stream.getvalue()

    cards = [
        Card(f"task {k % 5}", ("right" if k % 7 else "wrong",), f"question {k}\nsaid", lambda k=k: loud(str(k)), str(k))
        for k in range(2000)
    ]
    told, box = browse(cards, {"right": "right", "wrong": "wrong"})
    shown = box.count("<li")
    assert len(made) - 1 <= shown <= CARDS and len(box) < BYTES + 500_000
    assert told.startswith(f"{shown:,} of 2,000 answers")
    for task in range(5):
        assert box.count(f'data-task="task {task}"') >= shown // 5 - 1
    assert box.count('data-kinds="wrong"') > shown / 3, "the rarer kind is not drowned"
    assert browse(cards, {"right": "right", "wrong": "wrong"})[1] == box


def test_no_answer_at_all() -> None:
    told, box = browse([], {"right": "right"})
    assert told == "There are none." and isinstance(box, Markup)


def test_a_radar_needs_three_spokes_and_tells_its_numbers() -> None:
    assert radar(["a", "b"], {"score": [1, 0]}) == ""
    chart = radar(["<a>", "b", "c"], {"score": [1.0, 0.5, 0.25], "blind": [None, 0.1, 0.2]}, "words")
    assert "&lt;a&gt;" in chart and "0.25" in chart and chart.count("<polygon") == 6


def test_a_script_may_not_end_its_own_element() -> None:
    with pytest.raises(AssertionError, match="end its own"):
        pages.page("t", [], script="'</script>'")
