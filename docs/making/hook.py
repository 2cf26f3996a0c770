"""What MkDocs asks of us while it builds the site: pages that the code writes, marks in pages, links that leave docs/.

A mark is a line of its own, `<!-- KIND: ARGUMENT -->`; a line below it that begins with `*Filled in` is for those who
read the file itself, and goes:

    readme: HEADING       the README's section of that heading, without the heading and its subsections
    log: WORDS            the newest section of the log whose heading ends so
    layout: MODULE        what the module's docstring says lies where
    doc: MODULE           the whole docstring
    findings: PAPER       the paper's findings as our study files have them, and what our studies said of them
    studies:              the studies that were run
    names: KIND           the recipes of a kind (condense, models, studies), by name
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))

import commands
import fields
import names
from words import cell, markdown, table

DOCS = Path(__file__).resolve().parents[1]
REPO = DOCS.parent
MADE = {"reference/commands.md": commands.page, "reference/recipes.md": fields.page, "reference/python.md": names.page}
TAKEN = {
    "reference/card.md": "src/leveret/world/weights/CARD.md",
    "reference/changes.md": "CHANGELOG.md",
    "reference/contributing.md": "CONTRIBUTING.md",
}
"""Pages that are files of the repository outside docs/."""
PLACES = {**{source: page for page, source in TAKEN.items()}, "README.md": "index.md"}
"""Where on the site a file of the repository is read."""
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
MARK = re.compile(r"^<!-- (\w+):[ ]?(.*?) -->(?:\n\*Filled in[^\n]*\*)?$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are written here and those that lie elsewhere in the repository."""
    for place, make in MADE.items():
        files.append(File.generated(config, place, content=make()))
    for place, source in TAKEN.items():
        files.append(File.generated(config, place, content=moved((REPO / source).read_text("utf-8"), source, place)))
    return files


@event_priority(50)
def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Fills in the marks, and turns links that leave docs/ to where the site has what they name."""
    place = page.file.src_uri
    text = MARK.sub(lambda mark: MARKS[mark[1]](mark[2], place) if mark[1] in MARKS else mark[0], text)
    return text if place in TAKEN else moved(text, f"docs/{place}", place)


def moved(text: str, source: str, place: str) -> str:
    """`text` of the repository's file `source`, its relative links as the page `place` needs them.

    What the site has is linked there; what only the repository has is named in code.
    """
    here, pieces = PurePosixPath(place).parent, re.split(r"(```.*?```)", text, flags=re.DOTALL)

    def turned(link: re.Match[str]) -> str:
        target, _, anchor = link[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        if path.startswith("docs/"):
            on_site = path.removeprefix("docs/")
        elif path in PLACES:
            on_site = PLACES[path]
        else:
            return f"{link[1][1:-2]} (`{path}`)"
        return f"{link[1]}{os.path.relpath(on_site, here)}{'#' + anchor if anchor else ''}{link[3]}"

    return "".join(piece if piece.startswith("```") else LINK.sub(turned, piece) for piece in pieces)


def section(text: str, heading: str) -> str:
    """What stands below the first heading that ends so, down to the next of its depth.

    Raises KeyError where no heading does.
    """
    inside = re.sub(
        r"^```.*?^```", lambda code: re.sub(r"^#", "\0", code[0], flags=re.MULTILINE), text, flags=re.S | re.M
    )
    found = re.search(rf"^(#+) (?:.*)?{re.escape(heading)}\n", inside, re.MULTILINE)
    if found is None:
        raise KeyError(f"no heading ends with {heading!r}")
    rest = inside[found.end() :]
    after = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: after.start() if after else None].replace("\0", "#").strip()


def _readme(heading: str, place: str) -> str:
    text = section((REPO / "README.md").read_text("utf-8"), heading)
    return moved(re.split(r"^#+ ", text, maxsplit=1, flags=re.MULTILINE)[0], "README.md", place)


def _log(heading: str, place: str) -> str:
    return section((DOCS / "log.md").read_text("utf-8"), heading)


def _docstring(module: str) -> str:
    return ast.get_docstring(ast.parse(names._file(module).read_text("utf-8"))) or ""


def _layout(module: str, place: str) -> str:
    """The blocks of a docstring in which lines stand in columns."""
    parts = re.split(r"\n\s*\n", _docstring(module))
    blocks = [
        part
        for part in parts
        if all(line.startswith("    ") for line in part.splitlines()) or re.search(r"^\S+.* {2,}\S", part, re.MULTILINE)
    ]
    if not blocks:
        raise KeyError(f"{module}: its docstring lays nothing out")
    lines = "\n".join(blocks).splitlines()
    least = min(len(line) - len(line.lstrip()) for line in lines if line.strip() and not line.endswith(":"))
    return "```text\n" + "\n".join(line[least:] for line in lines if not line.endswith(":")) + "\n```"


def _doc(module: str, place: str) -> str:
    return markdown(_docstring(module))


def results() -> dict[str, dict[str, Any]]:
    """Name of a study -> its results, of those whose pages lie in docs/studies/."""
    found = {}
    for file in sorted(DOCS.glob("studies/*/results.json")):
        told = json.loads(file.read_text("utf-8"))
        found[told["name"]] = {**told, "folder": file.parent.name}
    return found


NOT_RUN = "not run"


def _findings(paper: str, place: str) -> str:
    from leveret.recipe import load
    from leveret.recipe import names as recipes
    from leveret.study.figures import difference_in_words
    from leveret.study.files import StudyRecipe

    run, up = results(), os.path.relpath("studies", PurePosixPath(place).parent)
    rows = []
    for name in recipes("studies"):
        study = load(name, StudyRecipe, "studies")
        for claim in study.claims:
            if not claim.paper.startswith(paper):
                continue
            done = run.get(study.name, {})
            ours = next((one for one in done.get("claims", ()) if one["says"] == claim.says), None)
            if ours is None:
                verdict = NOT_RUN
            else:
                n = (ours["difference"] or {}).get("n", 0)
                bound = f", {ours['at_most']}" if ours.get("at_most") else ""
                said = f"**{ours['verdict']}**{bound}: {difference_in_words(ours['difference']) or ''}, n = {n} seeds"
                verdict = f"{said} ([page]({up}/{done['folder']}/report.html))"
            where = claim.paper.partition("), ")[2] or claim.paper
            rows.append((f"{cell(claim.says)} ({cell(where)}) `{name}`", verdict, cell(claim.figures)))
    rows.sort(key=lambda row: row[1] == NOT_RUN)  # what is known first
    return table(("finding and study", "on the drawn world", "its figures"), rows)


def _studies(_: str, place: str) -> str:
    from leveret.study.figures import difference_in_words, mean_in_words

    up = os.path.relpath("studies", PurePosixPath(place).parent)
    parts = []
    for name, told in results().items():
        parts.append(f"### {told['title']}\n\n`{name}`, {len(told['seeds'])} seeds, {len(told['cells'])} models: "
                     f"[its page]({up}/{told['folder']}/report.html).\n\n")  # fmt: skip
        rows = []
        for axis in told["axes"].values():
            for level, had in axis["levels"].items():
                base = " (base)" if level == axis["base"] else ""
                about = f": {cell(had['about'])}" if had.get("about") else ""
                less = difference_in_words(had.get("difference"))
                rows.append((f"`{level}`{base}{about}", mean_in_words(had) or "", less or ""))
        parts.append(table(("", "score, mean and 95 % interval", "less the base"), rows))
    return "".join(parts)


def _names(kind: str, place: str) -> str:
    from leveret.recipe import names as recipes

    return ", ".join(f"`{name}`" for name in recipes(kind)) + "."  # type: ignore[arg-type]


MARKS = {
    "readme": _readme, "log": _log, "layout": _layout, "doc": _doc, "findings": _findings, "studies": _studies,
    "names": _names,
}  # fmt: skip
