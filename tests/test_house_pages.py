"""Report pages: escaped, self-contained, readable by people and by machines; looked at with a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from leveret import pages
from leveret.pages import Bar, Section

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """A strict reader: tags must nest; collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def picture(colour: tuple[int, int, int] = (180, 40, 40), side: int = 32) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def whole_page(evil: str = "<script>alert('x')</script>&") -> str:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    return pages.page(
        f"Title {evil}",
        [
            Section(f"Words {evil}", [f"A `code {evil}` line.\n\nAnother {evil}", pages.code(evil)], lead=evil),
            Section(
                "Words", [pages.table([[evil, 1, 0.5, None], ["b", 20000, 1.0, True]], ["a", evil, "c", "d"], evil)]
            ),
            Section("Facts", pages.tiles([("pairs", 20000), (evil, evil, evil)])),
            Section("Funnel", pages.funnel([("pool", 1000, evil), (evil, 10)], evil)),
            Section("Bars", pages.bars([Bar(evil, 0.5, 0.4, 0.6, {evil: 0.3, "majority": 0.2}, evil), Bar("b", 1.0)])),
            Section("Histogram", pages.histogram([1, 5, 2], [0, 1, 2, 3], [(1, 2, evil)], evil, evil)),
            Section("Map", pages.scatter([(0, 0), (1, 2), (float("nan"), 1)], [evil, "b", "b"], evil)),
            Section("Plot", pages.plot({evil: (1, 2), "b": (1, 2), "c": (3, 4)}, evil, evil, evil, [evil, "c"])),
            Section("Curves", pages.lines({evil: [(0, 3), (1, float("nan")), (2, 1)], "b": []}, evil, evil, evil)),
            Section("Pictures", [pages.gallery([(picture(), evil, evil), (stream.getvalue(), "b\nc", "kept")])]),
            Section("One", pages.figure(picture(side=400), evil)),
        ],
        subtitle=evil,
    )


def test_nothing_of_what_is_given_becomes_markup() -> None:
    html = whole_page()
    read = Reader(html)
    assert "<script" not in html and not any(tag == "script" for tag, _ in read.tags)
    assert read.text.count("<script>alert('x')</script>&") >= 15
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=30))
def test_any_text_is_text(text: str) -> None:
    for markup in (
        pages.table([[text, 1]], [text, "n"], text),
        pages.funnel([(text, 3, text)]),
        pages.bars([Bar(text, 0.1, marks={text: 0.2})]),
        pages.paragraphs(text),
        pages.link(text, text),
        pages.tiles([(text, text, text)]),
    ):
        tags = {tag for tag, _ in Reader(markup).tags}
        assert tags <= {
            "table", "thead", "tbody", "tr", "th", "td", "caption", "div", "figure", "details", "summary", "svg",
            "rect", "line", "ul", "li", "p", "code", "a", "dl", "dt", "dd", "small", "path", "figcaption",
        }  # fmt: skip
    assert "href" not in pages.link("x", "javascript:alert(1)")


def test_a_page_loads_nothing_and_says_so() -> None:
    html = whole_page()
    read = Reader(html)
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert "url(" not in style[1] and "@import" not in style[1]
    assert not any("style" in attrs for _, attrs in read.tags), "the policy forbids style attributes"
    for tag, attrs in read.tags:
        assert tag not in {"script", "link", "iframe", "object", "base", "form"}
        if "src" in attrs:
            assert attrs["src"].startswith("data:image/")
        if "href" in attrs:
            assert attrs["href"].startswith("#")


def test_what_is_drawn_is_said_too() -> None:
    read = Reader(whole_page("word"))
    figures = [attrs for tag, attrs in read.tags if tag == "figure" and attrs.get("class") == "card"]
    assert len(figures) == 6 and all(len(attrs["aria-label"]) > 10 for attrs in figures)
    assert all(attrs.get("alt") for tag, attrs in read.tags if tag == "img")
    assert all(
        attrs.get("aria-hidden") == "true"
        for tag, attrs in read.tags
        if tag == "svg" and "viewbox" not in attrs and "y" not in attrs
    )
    assert sum(tag == "details" for tag, _ in read.tags) == 6
    headers = [attrs for tag, attrs in read.tags if tag == "th"]
    assert headers and all(attrs.get("scope") in {"row", "col"} for attrs in headers)
    ids = [attrs["id"] for tag, attrs in read.tags if tag == "section"]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for tag, attrs in read.tags if tag == "a"} == set(ids)


def test_numbers_are_written_for_reading() -> None:
    text = Reader(pages.table([["a", 1234567, 0.123456, None, True, 3.0, float("nan")]], list("abcdefg"))).text
    for shown in ("1,234,567", "0.1235", "\u2013", "yes", "3", "not a number"):
        assert shown in text
    html = pages.table([["a", "0.4 - 0.5", "left"]], ["a", "b", "c"])
    assert html.count('class="num"') == 2


@given(
    st.lists(st.floats(-2, 2), max_size=30),
    st.lists(st.floats(-2, 2), min_size=3, max_size=8, unique=True)
    .map(sorted)
    .filter(lambda e: min(b - a for a, b in pairwise(e)) > 1e-6),
)
def test_a_histogram_counts_like_numpy(values: list[float], edges: list[float]) -> None:
    import numpy as np

    if len(values) == len(edges) - 1:
        return
    expected = np.histogram(values, edges)[0].tolist()
    shown = re.findall(r'<td class="num">([\d,]+)</td>', pages.histogram(values, edges))
    assert [int(number.replace(",", "")) for number in shown] == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=9))
def test_names_of_points_lie_on_none_of_each_other(places: list[tuple[int, int]]) -> None:
    html = pages.plot({f"p{at}": (float(x), float(y)) for at, (x, y) in enumerate(places)}, "cost", "score")
    names = [
        (float(x), float(y)) for x, y in re.findall(r'<text class="band" x="([\d.]+)%" dx="[-\d]+" y="([-\d.]+)"', html)
    ]
    assert len(names) == len(places) == html.count("<circle")
    assert len(set(names)) == len(names)
    assert all(abs(a[1] - b[1]) >= 14.9 for a in names for b in names if a is not b and abs(a[0] - b[0]) < 24)


def test_empty_and_flat_data_still_make_a_page() -> None:
    html = pages.page(
        "Nothing",
        [
            Section("a", pages.table([], ["a", "b"])),
            Section("b", pages.funnel([])),
            Section("c", pages.bars([])),
            Section("d", pages.histogram([0, 0], [0, 1, 2])),
            Section("e", pages.scatter([])),
            Section("f", [pages.plot({}, "x", "y"), pages.plot({"one": (1, 1)}, "x", "y", front=["one"])]),
            Section("f", pages.lines({"flat": [(0, 1), (0, 1)]})),
            Section("g", [pages.gallery([]), pages.tiles([]), Markup("")]),
        ],
    )
    Reader(html)


def test_large_photographs_are_made_small_and_small_drawings_stay_exact() -> None:
    large = Reader(pages.figure(picture(side=3000), "large", side=300)).tags
    image = next(attrs for tag, attrs in large if tag == "img")
    assert image["width"] == "300" and image["src"].startswith("data:image/jpeg")
    small = next(attrs for tag, attrs in Reader(pages.figure(picture(), "small")).tags if tag == "img")
    assert small["src"].startswith("data:image/png") and small["class"] == "pixel"
    data = base64.b64decode(small["src"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).getpixel((3, 3)) == (180, 40, 40)


def test_a_browser_shows_it_light_and_dark(chromium: Callable[..., Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        pages.page(
            "A page",
            [
                Section("Bars", pages.bars([Bar("a", 1.0)])),
                Section("Picture", pages.figure(picture((250, 0, 250), 120), "magenta")),
            ],
        ),
        "utf-8",
    )
    light = Image.open(chromium(page, "light", width=900, height=900)).convert("RGB")
    dark = Image.open(chromium(page, "dark", width=900, height=900, dark=True)).convert("RGB")
    assert light.size == (900, 900)
    assert sum(light.getpixel((5, 890))) > 3 * 240 and sum(dark.getpixel((5, 890))) < 3 * 40  # type: ignore[arg-type]

    def share(image: Image.Image, wanted: Callable[[int, int, int], bool]) -> int:
        pixels = image.tobytes()
        return sum(wanted(*pixels[i : i + 3]) for i in range(0, len(pixels), 3))

    def magenta(r: int, g: int, b: int) -> bool:
        return r > 230 and g < 30 and b > 230

    def bar(r: int, g: int, b: int) -> bool:
        return abs(r - 0x5B) < 4 and abs(g - 0x9D) < 4 and abs(b - 0xB4) < 4

    # The style took hold (its hash is right), the embedded picture is drawn at its size, the bar fills its track.
    assert share(light, magenta) > 13_000 and share(dark, magenta) > 13_000
    assert share(light, bar) > 600 * 14
