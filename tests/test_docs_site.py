"""The documentation as a site: links hold, it builds without a warning, a browser shows it without a foreign host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from browser_pipe import Browser
from docs_pages import PAGES, REPO, anchors, links, named

DOCS = REPO / "docs"
MAIN = (
    "index", "quickstart", "story", "tutorials/own-data", "condense", "models", "evaluate", "reference/commands",
    "reference/recipes", "reference/python", "formats", "papers", "studies/index", "log",
)  # fmt: skip


def entries(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for value in nav.values():
            yield from entries(value)
    elif isinstance(nav, list):
        for value in nav:
            yield from entries(value)


NAV = list(entries(yaml.safe_load((REPO / "mkdocs.yml").read_text("utf-8"))["nav"]))


def test_every_page_stands_in_the_navigation_once() -> None:
    there = {page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    assert len(NAV) == len(set(NAV))
    assert there <= set(NAV), f"not in mkdocs.yml's nav: {sorted(there - set(NAV))}"
    strange = [name for name in set(NAV) - there if not name.startswith("reference/")]
    assert not strange, f"in mkdocs.yml's nav, but not in docs/: {strange}"


def test_no_link_is_dead() -> None:
    made = {(DOCS / name).resolve() for name in NAV if name.startswith("reference/")}
    faults, seen = [], 0
    for page in PAGES:
        for link in links(page):
            if re.match(r"(?:https?|mailto):", link):
                continue
            seen += 1
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if target in made:
                continue
            if not target.exists():
                faults.append(f"{named(page)}: {link}: nothing is there")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                faults.append(f"{named(page)}: {link}: no heading of that name; there are {sorted(anchors(target))}")
    assert not faults, "\n".join(faults)
    assert seen > 150


def test_the_reference_is_written_by_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MkDocs: every command with its options, every key of a recipe, every public name with its arguments."""
    monkeypatch.syspath_prepend(DOCS / "making")
    import commands
    import fields
    import names

    from leveret.study.files import StudyRecipe
    from leveret.train.stages import TrainRecipe

    page = commands.page()
    told = dict(commands.commands())
    assert len(told) > 30 and ("coreset", "recut") in told and ("study", "unit") not in told
    for words, command in told.items():
        part = page.partition(f"## leveret {' '.join(words)}\n")[2].partition("\n## ")[0]
        assert all(f"`{param.opts[0]}`" in part for param in command.params if param.param_type_name == "option"), words
    page = fields.page()
    for schema in (TrainRecipe, StudyRecipe):
        part = page.partition(f"### {schema.__name__}\n")[2].partition("\n### ")[0]
        assert all(f"| `{name}` |" in part for name in schema.model_fields)
    anchored = {heading.lower().replace(", ", "-") for heading in re.findall(r"^### (.+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchored
    page = names.page()
    for module, public in names.rooms().items():
        for name in public:
            assert f".{name}\n" in page, f"{module}.{name}"
    ask = page.partition("leveret.generate.Model.ask(")[2].partition("```python")[0]
    assert "question: str" in ask and "| `image` | a path, a PIL image" in ask
    assert "slots: int" in page.partition("### leveret.generate.Engine\n")[2].partition("###")[0]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Skips where MkDocs Material is not installed; with CI=true that fails, so it cannot vanish."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        message = "no MkDocs Material: the site is not built (pip install -c constraints.txt -e '.[docs]')"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not re.search(r"^(?:WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr[-4000:]
    return folder


class Reader(HTMLParser):
    """What a page has a browser fetch, and what it links to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.fetched.append(given.get("src", ""))
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(given.get("href", ""))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_it_builds_and_fetches_nothing_foreign(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        for address in Reader(page.read_text("utf-8")).fetched:
            assert not re.match(r"(?:https?:)?//", address), f"{page.relative_to(site)} fetches {address}"
    assert not (site / "making").exists()


def test_marks_are_filled_in_and_the_code_writes_its_own_reference(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"<!-- (?:readme|log|layout|doc|findings|studies|names):", page.read_text("utf-8")), page
        assert "*Filled in" not in page.read_text("utf-8") and "<em>Filled in" not in page.read_text("utf-8"), page

    def words(name: str) -> str:
        return " ".join("".join(Reader((site / f"{name}.html").read_text("utf-8")).words).split())

    from leveret.recipe import names
    from leveret.train.stages import StageRecipe

    assert "leveret coreset recut" in words("reference/commands") and "--allow-change" in words("reference/commands")
    recipes = words("reference/recipes")
    for field in StageRecipe.model_fields.values():
        assert field.description is None or " ".join(field.description.split())[:30].replace("`", "") in recipes
    assert "leveret.evaluate(" in words("reference/python") and "leveret.Sample" in words("reference/python")
    assert all(name in words("studies/index") for name in names("studies"))
    assert "STAGE/state/step-" in words("formats") and "quarantine.jsonl" in words("formats")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def looking(site: Path, browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(browser, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def test_a_browser_shows_it(looking: Browser, address: str) -> None:
    looking.events.clear()
    for name in MAIN:
        looking.open(f"{address}/{name}.html", 1360, 900)
        assert looking.run("document.querySelector('article h1').innerText.trim().length") > 0, name
        for width in (1360, 390):
            looking.resize(width, 900)
            wide = looking.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{name}.html is {wide} pixels wider than a window of {width}"
        assert looking.run("[...document.images].every(one => one.complete && one.naturalWidth)"), name
    assert not looking.complaints()
    assert all(url.startswith((address, "blob:")) for url in looking.fetched()), looking.fetched()


@pytest.mark.parametrize("place", ["server", "folder"])
def test_the_search_finds_without_a_foreign_host(looking: Browser, address: str, site: Path, place: str) -> None:
    looking.events.clear()
    looking.open(f"{address}/index.html" if place == "server" else f"{site.as_uri()}/index.html", 1360, 900)
    looking.run("document.querySelector('.md-search__input').focus()")
    looking.type("quick_gelu")
    looking.wait("document.querySelector('.md-search-result__item a')")
    assert any(
        "papers" in link
        for link in looking.run("[...document.querySelectorAll('.md-search-result__item a')].map(one => one.href)")
    )
    assert not looking.complaints()
    assert all(url.startswith((address, "blob:")) for url in looking.fetched()), looking.fetched()
