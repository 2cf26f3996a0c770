"""A whole HTML document: its head, its policy, its sections."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markupsafe import Markup

from leveret.pages.words import join, paragraphs


@dataclass(frozen=True)
class Section:
    """One part of a page: a heading, builders' markup, and a sentence that says what to look for."""

    title: str
    body: Markup | str | Sequence[Markup | str]
    lead: str = ""


@cache
def _style() -> str:
    return (Path(__file__).parent / "style.css").read_text("utf-8")


def page(title: str, sections: Sequence[Section], subtitle: str = "", script: str = "") -> str:
    """A whole HTML document. Contents are linked at the top when there are more than three sections.

    script  JavaScript of ours (never of what is shown) that works on the finished page; none runs where none is given.
    """
    from leveret import __version__

    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    if script:
        assert "</script" not in script.lower(), "would end its own element"
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    anchors = _anchors([section.title for section in sections])
    links = [Markup('<a href="#{}">{}</a>').format(a, s.title) for a, s in zip(anchors, sections, strict=True)]
    contents = Markup('<nav aria-label="Contents">{}</nav>').format(join(links)) if len(links) > 3 else Markup()
    parts = []
    for anchor, section in zip(anchors, sections, strict=True):
        body = [section.body] if isinstance(section.body, str) else section.body
        lead = Markup('<p class="lead">{}</p>\n').format(section.lead) if section.lead else Markup()
        whole = join((item if isinstance(item, Markup) else paragraphs(item) for item in body), "\n")
        parts.append(
            Markup('<section id="{}">\n<h2>{}</h2>\n{}{}\n</section>').format(anchor, section.title, lead, whole)
        )
    return Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<header class="top"><h1>{title}</h1>{subtitle}{contents}</header>\n<main>\n{parts}\n</main>\n'
        "<footer><div>Made by leveret {version}. This page loads nothing and {runs}.</div></footer>\n"
        "{script}</body>\n</html>\n"
    ).format(
        policy=policy,
        title=title,
        style=Markup(style),
        subtitle=Markup("<p>{}</p>").format(subtitle) if subtitle else "",
        contents=contents,
        parts=join(parts, "\n"),
        runs="runs only its own script, which filters what it shows" if script else "runs no script",
        script=Markup("<script>{}</script>\n").format(Markup(script)) if script else "",
        version=__version__,
    )


def _anchors(titles: Sequence[str]) -> list[str]:
    """Readable ids, each used once."""
    seen: dict[str, int] = {}
    anchors = []
    for title in titles:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        seen[stem] = seen.get(stem, 0) + 1
        anchors.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return anchors
