"""Rows in a file of a user's own: what the docs show works from training to answering, a file runs only where a person
named it, and what is wrong with it is told in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fakes
import hub_fakes
import train_fakes
from leveret import own
from leveret.cli import run as leveret
from leveret.inputs.formats import _BROUGHT, _OWN, find_chat
from leveret.model.build import build, build_meta, check
from leveret.model.checkpoint import load, save
from leveret.model.push import to_upload
from leveret.model.recipe import ModelRecipe
from leveret.runs import DataError, RecipeError
from leveret.serve.chat import chat
from leveret.train import train

DOCS = Path(__file__).resolve().parents[1] / "docs"


def block(page: str, kind: str = "python", file: str = "my.py") -> str:
    """The page's code block that is a file of one's own, or its first of another kind."""
    found = re.findall(rf"```{kind}\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S)
    return next(text for text in found if kind != "python" or text.startswith(f"# {file}\n"))


@pytest.fixture(autouse=True)
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, in a process where nobody named a file yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(own.VARIABLE, raising=False)
    monkeypatch.setitem(chat.__kwdefaults__, "max_new_tokens", hub_fakes.WORDS)
    forget()
    return tmp_path


def forget() -> None:
    """As in another process."""
    own._ALLOWED.clear()
    for fingerprint in own._MODULES:
        sys.modules.pop(f"leveret_own_{fingerprint}", None)
    own._MODULES.clear()
    _BROUGHT.clear()
    _OWN.clear()


def recipe(**parts: str) -> ModelRecipe:
    """The tiny model with parts of it replaced."""
    plain = fakes.tiny_recipe().model_dump()
    if "tower" in parts:
        plain["vision"] = {"tower": parts["tower"]}
    if "connector" in parts:
        plain["connector"] = {"kind": parts["connector"]}
    if "language" in parts:
        plain["language"] = {"name": parts["language"]}
    return ModelRecipe.model_validate({**plain, "chat": parts.get("chat", "tiny")})


def write(at: Path, page: str) -> None:
    (at / "my.py").write_text(block(page), "utf-8")
    if page == "own-parts.md":
        shutil.copytree(fakes.tiny_language_folder(), at / "my-lm")


PAGES = {
    "tower": ("towers.md", "my.py:TOWER", "vision"),
    "connector": ("connectors.md", "my.py:CONNECTOR", "connector"),
    "language": ("own-parts.md", "my.py:LANGUAGE", "language"),
    "chat": ("chat-formats.md", "my.py:CHAT", "connector"),
}


@pytest.mark.parametrize("page", [page for page, _, _ in PAGES.values()])
def test_what_a_page_shows_is_ten_lines(page: str) -> None:
    lines = [line for line in block(page).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) <= 10 and all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("part", PAGES)
def test_what_a_page_shows_learns_is_saved_loaded_and_answers(
    part: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, name, learns = PAGES[part]
    write(at, page)
    built = build(recipe(**{part: name}))
    batch = fakes.tiny_batch(built, lengths=(30, 25))
    with torch.no_grad():
        logits = built(batch, logits="all").logits
        assert logits.shape == (2, 30, fakes.VOCAB) and logits.isfinite().all()
        assert not torch.equal(built.see({name: -x for name, x in batch.pixels.items()}), built.see(batch.pixels))
    taught = train_fakes.recipe(train_fakes.toy_set(at / "toy"), learn={learns: {"lr": 5e-3}}, steps=3, save_every=1)
    taught = taught.model_copy(update={"model": recipe(**{part: name})})
    model = train(taught, at / "run")
    before = {key: x for key, x in built.state_dict().items() if key.startswith((learns, "towers." + learns))}
    after = load(model).state_dict()
    assert before and any(not torch.equal(after[key], x) for key, x in before.items())
    config = json.loads((model / "config.json").read_text())
    said = json.dumps(config)
    assert re.search(rf"{re.escape(name)}@[0-9a-f]{{16}}", said) and str(at) not in json.dumps(config["recipe"]["chat"])
    code = part in ("tower", "connector")
    files = to_upload(model, "me/x")
    assert ("my.py" in files) == code
    for name in ("config.json", "README.md"):
        text = files[name]
        assert isinstance(text, bytes) and str(at).encode() not in text
    assert (b"own=['my.py']" in files["README.md"]) == code  # type: ignore[operator]
    assert ("own" in config) == code and (model / "my.py").exists() == code
    from leveret.generate import load as talk

    picture = at / "toy" / "0.png"
    here = talk(model, "cpu").ask(picture, "what colour is it ?", 4)
    forget()
    there = shutil.copytree(model, at / "elsewhere" / "model")
    os.chdir(at / "elsewhere")  # where no my.py is
    if code:
        with pytest.raises(
            DataError, match=r"of the file my\.py .* nobody named here.*--own .*model/my\.py"
        ) as refused:
            talk(there, "cpu")
        assert "\n" not in str(refused.value) and not own._MODULES
    named = ["--own", str(there / "my.py")] if code else []
    assert talk(there, "cpu", own=named[1:]).ask(picture, "what colour is it ?", 4) == here
    answers = []
    for place, more in ((model, ["--own", str(at / "my.py")]), (there, named)):
        forget()
        capsys.readouterr()
        assert leveret(["chat", str(place), str(picture), "-p", "what colour is it ?", *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


@pytest.mark.slow
def test_the_whole_recipe_of_the_page_runs_from_the_command_line(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All four rows in one file; ranks and processes of their own get it too."""
    pages = [page for page, _, _ in PAGES.values()]
    (at / "my.py").write_text("\n".join(block(page) for page in pages), "utf-8")
    shutil.copytree(fakes.tiny_language_folder(), at / "my-lm")
    toy = train_fakes.toy_set(at)
    assert toy.name == "toy.json"
    more = "  more: { data: toy.json, learn: { connector: { lr: 1e-3 } }, steps: 1 }\nranks: 2\ndevice: cpu\n"
    (at / "mine.yaml").write_text(block("own-parts.md", "yaml") + more, "utf-8")
    assert yaml.safe_load((at / "mine.yaml").read_text())["model"]["vision"] == {"tower": "my.py:TOWER"}
    assert leveret(["train", "mine.yaml", "--dry-run", "-o", "dry"]) == 0
    assert "my.py:CONNECTOR@" in capsys.readouterr().out and not (at / "dry").exists()
    assert leveret(["train", "mine.yaml", "-o", "run"]) == 0
    forget()
    capsys.readouterr()
    ask = ["chat", "run", "0.png", "-p", "what colour is it ?"]
    assert leveret(ask) == 3
    told = capsys.readouterr().err.strip()
    assert "--own run/model/my.py" in told and "vision.vision is TOWER" in told and "connector is CONNECTOR" in told
    assert leveret([*ask, "--own", "my.py"]) == 0
    answer = capsys.readouterr().out
    forget()
    named = {own.VARIABLE: "run/model/my.py", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with hub_fakes.Seat(named) as elsewhere:
        done = elsewhere(*ask)
    assert (done.code, done.out) == (0, answer), done.err
    # the run's own recipe.yaml names the version it was made with
    shutil.copy("run/recipe.yaml", "again.yaml")
    assert leveret(["train", "again.yaml", "-o", "run"]) == 0
    (at / "my.py").write_text((at / "my.py").read_text() + "\n# another version\n")
    forget()
    capsys.readouterr()
    assert leveret(["train", "again.yaml", "-o", "run"]) == 2
    assert "my.py has changed since TOWER was taken from it" in capsys.readouterr().err
    assert leveret(["train", "mine.yaml", "-o", "run"]) == 2
    told = capsys.readouterr().err
    assert "was made with another recipe" in told and "model.connector.kind" in told
    assert leveret([*ask, "--own", "my.py"]) == 3
    assert "is another version" in capsys.readouterr().err
    assert leveret([*ask, "--own", "nowhere.py"]) == 2
    assert "--own: nowhere.py given, but there is no such file" in capsys.readouterr().err


ROW = "from leveret.model.connectors import ConnectorRow, Settings\nfrom torch import nn\n"
BAD: dict[str, tuple[str | None, str, str]] = {
    "no file": (None, "my.py:ROW", "my.py given, but there is no such file"),
    "no name": ("", "my.py", "written path/to/my.py:NAME"),
    "no word": ("", "my.py:a-b", "written path/to/my.py:NAME"),
    "no such name": (ROW + "ROWS = ConnectorRow(nn.Linear)", "my.py:ROW", "holds no ROW; did you mean ROWS?"),
    "nothing like it": ("", "my.py:ROW", "holds no ROW, nor any ConnectorRow"),
    "wrong kind": ("\nROW = 3\n", "my.py:ROW", r"ROW of my.py \(line 2\) is a int; it must be a ConnectorRow"),
    "a class": ("class ROW:\n  pass", "my.py:ROW", r"\(line 1\) is the class ROW"),
    "raises": ("\n\nROW = 1 / 0\n", "my.py:ROW", "my.py, line 3: ZeroDivisionError: division by zero"),
    "deep": ("def f():\n    raise KeyError('x')\n\nf()\n", "my.py:ROW", "my.py, line 2: KeyError: 'x'"),
    "ends": ("raise SystemExit(0)\n", "my.py:ROW", "my.py, line 1: SystemExit"),
    "no Python": ("ROW = 1\nROW = (\n", "my.py:ROW", "my.py, line 2: SyntaxError"),
    "no text": ("\x00", "my.py:ROW", r"my.py.*: (ValueError|SyntaxError)"),
    "imports": ("import not_there_at_all\n", "my.py:ROW", "my.py, line 1: ModuleNotFoundError"),
    "build raises": (ROW + "ROW = ConnectorRow(\n  lambda w, d, n, s: nn.Linear(w))", "my.py:ROW", "line 4: TypeError"),
    "no module": (ROW + "ROW = ConnectorRow(lambda w, d, n, s: 7)", "my.py:ROW", "gave a int; it must give a module"),
    "other width": (
        ROW + "ROW = ConnectorRow(lambda w, d, n, s: nn.Linear(w, d + 1))", "my.py:ROW",
        r"makes \[2, 4, 33\] of \[2, 4, 16\]; its row promises \[2, 4, 32\]",
    ),
    "other tokens": (
        ROW + "ROW = ConnectorRow(lambda w, d, n, s: nn.Linear(w, d), tokens=lambda n, s: n + 1)", "my.py:ROW",
        r"promises \[2, 5, 32\]",
    ),
    "no tokens": (ROW + "ROW = ConnectorRow(nn.Linear, tokens=lambda n, s: 0)", "my.py:ROW", "makes 0 tokens of 4"),
    "tokens raise": (ROW + "ROW = ConnectorRow(nn.Linear, tokens=lambda n, s: n[0])", "my.py:ROW", "line 3: TypeError"),
    "settings": (ROW + "ROW = ConnectorRow(nn.Linear, settings=dict)", "my.py:ROW", "a class made from Settings"),
    "a folder": (None, "dir.py:ROW", "that is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_one_line(case: str, at: Path) -> None:
    text, name, told = BAD[case]
    (at / "dir.py").mkdir()
    if text is not None:
        (at / "my.py").write_text(text, "utf-8")
    for make in (build_meta, build, lambda given: train(
        train_fakes.recipe(train_fakes.toy_set(at / "toy")).model_copy(update={"model": given}), at / "r", dry_run=True
    )):  # fmt: skip
        with pytest.raises(RecipeError, match=told) as refused:
            make(recipe(connector=name))
        assert str(refused.value).startswith("model.connector.") and "\n" not in str(refused.value)


TOWER = "from leveret.model.towers import Family, TowerRow\nfrom torch import nn\n"
SIZES = '{"hidden_size": 8, "num_hidden_layers": 1, "patch_size": 8, "image_size": 16}'
CHAT = "from leveret.inputs import ChatFormat\n"
LANGUAGE = "from leveret.model.language import LanguageRow\n"
OTHERS: list[tuple[str, str, str]] = [
    ("tower", TOWER + "ROW = TowerRow()", "neither `like`, `family` nor a model_type"),
    ("tower", TOWER + "ROW = TowerRow(like='facebook/dinov2-bose')", "like: .*did you mean 'facebook/dinov2-base'"),
    ("tower", TOWER + "ROW = TowerRow(change={'model_type': 'resnet'})", "model_type 'resnet'; known architectures"),
    ("tower", TOWER + "ROW = TowerRow(like='facebook/dinov2-base', crop=0)", "`crop` is 0"),
    ("tower", TOWER + "ROW = TowerRow(change={'x': nn.Linear})", "must hold plain numbers"),
    ("tower", TOWER + f"ROW = TowerRow(family=Family(), change={SIZES})", "`family` needs its `build`"),
    ("tower", TOWER + "ROW = TowerRow(family=Family(build=nn.Module), change={'patch_size': 8})", "say hidden_size"),
    ("tower", TOWER + f"ROW = TowerRow(family=Family(build=lambda c: nn.Flatten(2)), change={SIZES})",
     r"makes \[1, 3, 256\] of \[1, 3, 16, 16\]; its row promises \[1, 4, 8\]"),
    ("tower", TOWER + f"ROW = TowerRow(family=Family(build=lambda c: nn.Sequential(nn.Conv2d(3, 4, 8, 8),\n"
     f"  nn.Flatten(2))), change={SIZES} | {{'hidden_size': 4}})", "must be a list of 1 blocks"),
    ("tower", TOWER + f"ROW = TowerRow(family=Family(build=lambda c: c['y']), change={SIZES})", "line 3: KeyError"),
    ("tower", TOWER + "ROW = TowerRow(build=nn.Module)", "`build` needs `size`"),
    ("tower", TOWER + "ROW = TowerRow(build=nn.Module, size=16, like='facebook/dinov2-base')", "`build` goes with"),
    ("tower", TOWER + "ROW = TowerRow(build=lambda: 3, size=16)", "gave a int; it must give a module"),
    ("tower", TOWER + "ROW = TowerRow(build=lambda: nn.Conv2d(4, 8, 8, 8), size=16)", "my.py.*: RuntimeError"),
    ("tower", TOWER + "ROW = TowerRow(build=lambda: nn.Flatten(), size=16)", r"makes \[1, 768\] of .*; a tower makes"),
    ("tower", TOWER + "ROW = TowerRow(build=lambda: nn.Conv2d(3, 8, (8, 4), (8, 4)), size=16)",
     r"makes \[1, 8, 2, 4\] of .*; 8 tokens are no square grid over 16 x 16 pixels"),
    ("tower", TOWER + "ROW = TowerRow(build=lambda: nn.Conv2d(3, 8, 8, 8), size=16, family=Family(prefix=1))",
     r"4 tokens after 1 that lead \(Family.prefix\) are no square grid"),
    ("tower", TOWER + "ROW = TowerRow(build=lambda: nn.Conv2d(3, 8, 4, 1), size=16)", "169 tokens are no square grid"),
    ("chat", CHAT + "ROW = ChatFormat('x', '{% if %}', ('<|end|>',))", "not valid Jinja"),
    ("chat", CHAT + "ROW = ChatFormat('x', 'a', ('<|end|>',))", "no generation block"),
    ("chat", CHAT + "ROW = ChatFormat('x', 'a', '<|end|>')", "`stop` a tuple of texts"),
    ("chat", CHAT + "ROW = ChatFormat('x', 'a', ('<|end|>',), faithful=True)", "are for the formats of published"),
    ("chat", CHAT + "ROW = ChatFormat('x', '{{ messages.x.y }}', ('<|end|>',))", "fails"),
    ("language", LANGUAGE + "ROW = LanguageRow()", "give `repo`"),
    ("language", LANGUAGE + "ROW = LanguageRow(like='microsoft/phi2')", "like: .*did you mean 'microsoft/phi-2'"),
    ("language", LANGUAGE + "ROW = LanguageRow(repo='x/y', change={'x': print})", "must hold plain numbers"),
    ("language", LANGUAGE + "ROW = LanguageRow(repo='x/y', change={'model_type': 'bert_'})", "no causal language"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "text", "told"), OTHERS)
def test_rows_that_say_too_little_or_the_impossible(part: str, text: str, told: str, at: Path) -> None:
    (at / "my.py").write_text(text, "utf-8")
    with pytest.raises(RecipeError, match=told) as refused:
        build_meta(recipe(**{part: "my.py:ROW"}))
    assert "\n" not in str(refused.value) and str(refused.value).startswith("model.")


def test_every_fault_of_a_recipe_is_told_at_once(at: Path) -> None:
    parts = {part: f"{part}.py:ROW" for part in PAGES}
    with pytest.raises(RecipeError) as refused:
        check(recipe(**parts))
    assert all(f"{part}.py given" in str(refused.value) for part in parts)
    for part in parts:
        (at / f"{part}.py").write_text("1 / 0\n", "utf-8")
    with pytest.raises(RecipeError) as refused:
        check(recipe(**parts))
    assert str(refused.value).count("line 1: ZeroDivisionError") == len(parts)


@pytest.mark.parametrize("where", ["config.json of a model", "a name nobody pinned"])
def test_no_code_runs_because_a_model_names_it(where: str, at: Path) -> None:
    """Not even where the file lies at the very path, beside the model, and has the right content."""
    ran = at / "ran"
    evil = f"open({str(ran)!r}, 'w').close()\n" + block("connectors.md")
    folder = save(fakes.tiny_vlm(), at / "model")
    for place in (at / "my.py", folder / "my.py"):
        place.write_text(evil, "utf-8")
    config = json.loads((folder / "config.json").read_text())
    mark = f"@{own.sha256_of(evil.encode())[:16]}" if where.startswith("config") else ""
    for kind in (f"my.py:CONNECTOR{mark}", f"{folder}/my.py:CONNECTOR{mark}"):
        for part in ("connector", "vision", "language", "chat"):
            changed = json.loads(json.dumps(config))
            if part == "connector":
                changed["recipe"]["connector"]["kind"] = kind
            elif part == "vision":
                changed["vision"][0]["family"] = kind
            elif part == "language":
                changed["recipe"]["language"]["name"] = kind
                changed["language"]["config"]["model_type"] = "mine"
            else:
                changed["recipe"]["chat"] = kind
            (folder / "config.json").write_text(json.dumps(changed))
            with pytest.raises((DataError, RecipeError)):
                load(folder)
            assert not ran.exists()
    for find in (lambda: find_chat("my.py:CHAT"), lambda: own.row("my.py:CONNECTOR", object, "here")):
        with pytest.raises(RecipeError, match="nobody named here"):
            find()
    assert not ran.exists()


def test_weights_of_a_row_lie_beside_its_file(at: Path) -> None:
    """Of an architecture of one's own, by its own names, and of a published one, by whatever names they have."""
    from safetensors.torch import save_file

    there = at / "there"
    there.mkdir()
    source = block("towers.md").replace("size=64)", 'size=64, file="mine.safetensors")')
    (there / "my.py").write_text(source, "utf-8")
    (at / "plain.py").write_text(block("towers.md"), "utf-8")
    begun = build(recipe(tower="plain.py:TOWER"), seed=5)
    state = {name: tensor.clone() for name, tensor in begun.towers["vision"].model.state_dict().items()}
    save_file(state, there / "mine.safetensors")
    again = build(recipe(tower="there/my.py:TOWER"), seed=6)
    assert all(torch.equal(state[name], tensor) for name, tensor in again.towers["vision"].model.state_dict().items())
    save_file({"cut.bias": torch.zeros(3)}, there / "mine.safetensors")
    with pytest.raises(DataError, match=r"3 missing: .*; 1 of another shape: cut\.bias"):
        build(recipe(tower="there/my.py:TOWER"))
    folder = shutil.copytree(fakes.tiny_vision_folder(), there / "siglip")
    config = json.loads((folder / "config.json").read_text())
    row = TOWER + f"ROW = TowerRow(change={ {**fakes.SIGLIP, 'model_type': config['model_type']}!r}, repo='siglip')\n"
    (there / "known.py").write_text(row, "utf-8")
    mine, plain = build(recipe(tower="there/known.py:ROW")), fakes.tiny_vlm()
    batch = fakes.tiny_batch(plain)
    with torch.no_grad():
        assert torch.equal(mine.see(batch.pixels), plain.see(batch.pixels))
    (there / "known.py").write_text(row.replace("repo='siglip'", "repo='siglip', layer=-1"), "utf-8")
    assert build_meta(recipe(tower="there/known.py:ROW")).towers["vision"].facts.depth == 3


def test_rows_like_a_published_tower_are_told_without_weights(at: Path) -> None:
    (at / "my.py").write_text(block("towers.md", file="other.py"), "utf-8")
    tower = build_meta(recipe(tower="my.py:SHARP")).towers["vision"]
    assert (tower.facts.size, tower.facts.depth, tower.tokens) == (336, 10, 24 * 24)
    assert build_meta(recipe(tower="my.py:TUNED")).towers["vision"].tokens == 196


def test_a_plain_module_may_make_tokens_lead_and_look_at_values(at: Path) -> None:
    """Tokens in place of a map, one that leads, another look at the pixels, and code that needs numbers to run."""
    (at / "my.py").write_text(
        TOWER + "import torch\n"
        "class Seen(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.cut = nn.Conv2d(3, 8, 8, 8)\n"
        "    def forward(self, pixels):\n"
        "        tokens = self.cut(pixels).flatten(2).mT\n"
        "        if float(tokens.sum()) > 1e9:\n            raise ValueError\n"
        "        return torch.cat((tokens.mean(1, keepdim=True), tokens), 1)\n"
        "ROW = TowerRow(build=Seen, size=24, family=Family(prefix=1, mean=(0, 0, 0), std=(1, 1, 1), resize='pad'))\n",
        "utf-8",
    )
    tower = build(recipe(tower="my.py:ROW")).towers["vision"]
    assert (tower.tokens, tower.width, len(tower.blocks)) == (9, 8, 1)
    assert (tower.view.size, tower.view.mean, tower.view.resize) == (24, (0, 0, 0), "pad")
    pixels = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(tower(pixels), tower.model(pixels)[:, 1:])
    for field, value, told in (("size", 32, "takes 24 pixels"), ("layer", -2, "has 1 blocks; allowed: -1 or 1")):
        other = recipe(tower="my.py:ROW")
        vision = other.vision.model_copy(update={field: value})
        with pytest.raises(RecipeError, match=told):
            build_meta(other.model_copy(update={"vision": vision}))


def test_an_architecture_told_in_full_has_blocks(at: Path) -> None:
    """Of which the last may learn alone; saved and loaded with the sizes that the row gave it."""
    (at / "my.py").write_text(
        TOWER + "class Deep(nn.Module):\n"
        "    def __init__(self, config):\n        super().__init__()\n        wide = config['hidden_size']\n"
        "        self.cut = nn.Conv2d(3, wide, config['patch_size'], config['patch_size'])\n"
        "        self.blocks = nn.ModuleList(nn.Linear(wide, wide) for _ in range(config['num_hidden_layers']))\n"
        "    def forward(self, pixels):\n        tokens = self.cut(pixels).flatten(2).mT\n"
        "        for block in self.blocks:\n            tokens = tokens + block(tokens).tanh()\n"
        "        return tokens\n"
        f"SIZES = {SIZES} | {{'num_hidden_layers': 2}}\n"
        "ROW = TowerRow(family=Family(build=Deep, sizes='fixed'), change=SIZES)\n", "utf-8"
    )  # fmt: skip
    vlm = build(recipe(tower="my.py:ROW"))
    tower = vlm.towers["vision"]
    assert (tower.tokens, tower.width, len(tower.blocks)) == (4, 8, 2)
    idle = {"model.cut.weight", "model.cut.bias", "model.blocks.0.weight", "model.blocks.0.bias"}
    assert set(tower.before(1)) == idle
    batch = fakes.tiny_batch(vlm, lengths=(30, 25))
    with torch.no_grad():
        assert torch.equal(load(save(vlm, at / "model"))(batch).logits, vlm(batch).logits)


def test_a_language_model_with_other_settings_than_its_folder_says(at: Path) -> None:
    """What the row changes holds while weights are read, and in the saved model."""
    shutil.copytree(fakes.tiny_language_folder(), at / "lm")
    (at / "my.py").write_text(
        LANGUAGE
        + "ROW = LanguageRow(repo='lm', change={'rms_norm_eps': 0.5})\nLIKE = LanguageRow(like='microsoft/phi-2')",
        "utf-8",
    )
    mine, plain = build(recipe(language="my.py:ROW")), fakes.tiny_vlm()
    assert mine.language.config.rms_norm_eps == 0.5 and mine.tokenizer is not None
    batch, state = fakes.tiny_batch(plain), plain.language.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in mine.language.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(mine(batch).logits, plain(batch).logits)
        forget()
        assert torch.equal(mine(batch).logits, load(save(mine, at / "model"))(batch).logits)
    assert build_meta(recipe(language="my.py:LIKE")).language.config.model_type == "phi"


def test_a_class_that_transformers_does_not_have(at: Path) -> None:
    """Registered in the file; a model of it needs the file, and refuses without."""
    (at / "my.py").write_text(
        LANGUAGE + "from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'my_own_lm'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
        "AutoConfig.register('my_own_lm', MyConfig, exist_ok=True)\n"
        "AutoModelForCausalLM.register(MyConfig, MyModel, exist_ok=True)\n"
        f"ROW = LanguageRow(repo='me/lm', change=dict({fakes.LLAMA!r}, model_type='my_own_lm'))\n", "utf-8"
    )  # fmt: skip
    vlm = build(recipe(language="my.py:ROW"), weights=False)
    vlm.tokenizer = fakes.tiny_tokenizer()
    folder = save(vlm, at / "model")
    assert (folder / "my.py").is_file() and type(load(folder).language).__name__ == "MyModel"
    forget()
    with pytest.raises(DataError, match=r"its language is ROW of the file my\.py"):
        load(folder)
    own.allow(folder / "my.py")
    assert type(load(folder).language).__name__ == "MyModel"


def test_a_model_that_was_loaded_is_saved_with_its_files(at: Path) -> None:
    """Two files of one name, bit for bit, and again."""
    for number, page in enumerate(("towers.md", "connectors.md")):
        (at / str(number)).mkdir()
        (at / str(number) / "my.py").write_text(block(page), "utf-8")
    vlm = build(recipe(tower="0/my.py:TOWER", connector="1/my.py:CONNECTOR"))
    folder = save(vlm, at / "model")
    files = sorted(folder.glob("*.py"))
    assert len(files) == 2 and {file.read_text() for file in files} == {block("towers.md"), block("connectors.md")}
    forget()
    own.allow(files)
    back = load(folder)
    again = save(back, at / "again")
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    batch = fakes.tiny_batch(vlm, lengths=(30, 25))
    with torch.no_grad():
        assert torch.equal(vlm(batch).logits, back(batch).logits)


@given(before=st.text(max_size=8), after=st.text(max_size=8), colon=st.sampled_from(["", ":", "@", ":x@"]))
def test_any_text_that_means_a_file_is_refused_in_one_line(before: str, after: str, colon: str) -> None:
    text = f"{before}.py{colon}{after}"
    if own.is_own(text):
        with pytest.raises(RecipeError, match=r"^here: ") as refused:
            own.pin(text, "here")
        assert refused.value.exit_code == 2


@given(name=st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True))
def test_a_pinned_name_stays_what_it_is(name: str) -> None:
    Path("my.py").write_text("")
    pinned = own.pin(f"my.py:{name}", "here")
    assert own.pin(pinned, "here") == pinned and own.parse(pinned, "here").name == name
    forget()
    assert own.lacking(pinned, "it") and own.pin(pinned, "here") == pinned and not own.lacking(pinned, "it")


def test_a_users_own_words_go_before_those_a_model_brought(at: Path) -> None:
    """A model folder may say what it likes of a reference: where the file itself was named, the file has the word."""
    (at / "my.py").write_text(block("chat-formats.md"), "utf-8")
    folder = save(build(recipe(chat="my.py:CHAT")), at / "model")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    name = config["recipe"]["chat"]
    config["chat"]["template"] = config["chat"]["template"].replace("Q: ", "Evil: ")
    (folder / "config.json").write_text(json.dumps(config))
    forget()
    load(folder)
    assert "Evil: " in find_chat(name).template
    own.allow(at / "my.py")
    assert "Q: " in find_chat(name).template


def test_two_models_with_other_words_under_one_name(at: Path) -> None:
    (at / "my.py").write_text(block("chat-formats.md"), "utf-8")
    folder = save(build(recipe(chat="my.py:CHAT")), at / "model")
    load(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["chat"]["stop"] = ["<|user|>"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="two models have it"):
        load(folder)


def test_a_stage_may_have_a_format_of_its_own(at: Path) -> None:
    (at / "my.py").write_text(block("chat-formats.md"), "utf-8")
    run: Callable[[str], Any] = lambda chat: train(  # noqa: E731
        train_fakes.recipe(train_fakes.toy_set(at / "toy"), chat=chat, steps=1), at / "run"
    )
    with pytest.raises(RecipeError, match=r"stages\.tune\.chat: me\.py given"):
        run("me.py:CHAT")
    assert run("my.py:CHAT").is_dir()
    (at / "my.py").write_text(block("chat-formats.md").replace("Q: ", "Ask: "), "utf-8")
    with pytest.raises(RecipeError, match=r"stages\.tune\.chat: .*there, .*now"):
        run("my.py:CHAT")
