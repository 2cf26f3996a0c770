"""Our models inside other people's evaluators, against stand-ins with their interfaces."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from leveret.evaluate import lmms
from leveret.runs import RecipeError

REPO = Path(__file__).resolve().parents[1]


class StandIn:
    """What lmms-eval's base class gives its subclasses, as far as we use it."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, parts in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": StandIn},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }.items():
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    lmms._made.cache_clear()
    yield
    lmms._made.cache_clear()


class Engine:
    """Remembers what it was asked, answers out of order."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def answer(self, requests: list[Any]) -> list[Any]:
        self.asked += requests
        said = [SimpleNamespace(question_id=r.question_id, text=f" {r.turns[0].text[-3:]}\n\nmore") for r in requests]
        return said[::-1]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    import leveret.generate

    made = Engine()
    loaded: dict[str, Any] = {}

    def load(path: str, device: str = "auto", **more: Any) -> Any:
        loaded.update(path=path, device=device, **more)
        return SimpleNamespace(engine=made, ask=lambda image, question, **m: f"{image}: {question}")

    monkeypatch.setattr(leveret.generate, "load", load, raising=False)
    monkeypatch.setattr("leveret.load", load, raising=False)
    return made


def test_the_entry_point_names_a_manifest_whose_class_is_there(lmms_eval: None) -> None:
    points = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points["lmms_eval.models"]["leveret"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    home, _, kind = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(home), kind)
    assert manifest.model_id == "leveret" and issubclass(found, StandIn) and found.is_simple
    assert found.__name__ == kind


def test_it_imports_without_lmms_eval() -> None:
    assert "lmms_eval" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="lmms_eval"):
        lmms.manifest()
    with pytest.raises(AttributeError):
        lmms.Nothing  # noqa: B018


def request(context: str, number: int, **options: Any) -> Any:
    def pictures(document: Any) -> list[Any]:
        return document["pictures"]

    return SimpleNamespace(args=(context, options, pictures, number, "mme", "test"))


def test_answers_come_in_the_order_of_the_requests(lmms_eval: None, engine: Engine) -> None:
    model = lmms.Leveret(pretrained="a/model", batch_size=1)
    picture = Image.new("RGB", (4, 4))
    model.task_dict = defaultdict(dict, mme={"test": [{"pictures": [picture]}, {"pictures": []}, {"pictures": None}]})
    said = model.generate_until(
        [
            request("one <image>?", 0, max_new_tokens=16, until=["\n\n"]),
            request("two", 1, until="\n\n"),
            request("how is <image> spelled: end", 2, until=["", "\n\n"]),
        ]
    )
    assert said == ["e>?", "two", "end"]
    first, second, third = engine.asked
    assert len(first.images) == 1 and first.turns[0].text == "one <image>?" and first.max_new_tokens == 16
    assert second.images == () and second.turns[0].text == "two" and second.max_new_tokens is None
    assert third.images == () and "<image>" not in third.turns[0].text, "a mark in the words is no picture"
    many = [request("which", 0)]
    model.task_dict["mme"]["test"][0]["pictures"] = [picture, picture]
    model.generate_until(many)
    assert engine.asked[-1].turns[0].text == "<image><image>\nwhich" and len(engine.asked[-1].images) == 2


def test_what_it_cannot_do_is_said(lmms_eval: None, engine: Engine) -> None:
    with pytest.raises(RecipeError, match="beams is not known"):
        lmms.Leveret(pretrained="x", beams=5)
    model = lmms.Leveret(pretrained="x")
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(RecipeError, match="leveret"):
            ask([])
    model.task_dict = {"mme": {"test": [{"pictures": []}]}}
    with pytest.raises(RecipeError, match="greedily"):
        model.generate_until([request("x", 0, do_sample=True, temperature=0.7)])


def test_the_documented_vlmevalkit_adaptor_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"```python\n(# vlmeval/vlm/leveret.py\n.*?)```", (REPO / "docs/evaluate.md").read_text(), re.DOTALL
    )

    class BaseModel:
        def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            return self.generate_inner(message, dataset)  # type: ignore[attr-defined]

        def message_to_promptimg(self, message: list[dict[str, str]]) -> tuple[str, str | None]:
            pictures = [part["value"] for part in message if part["type"] == "image"]
            return "\n".join(p["value"] for p in message if p["type"] == "text"), (pictures or [None])[0]

    package, base = ModuleType("vlmeval.vlm"), ModuleType("vlmeval.vlm.base")
    package.__path__ = []  # type: ignore[attr-defined]
    base.BaseModel = BaseModel  # type: ignore[attr-defined]
    for module in (ModuleType("vlmeval"), package, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    space: dict[str, Any] = {"__name__": "vlmeval.vlm.leveret", "__package__": "vlmeval.vlm"}
    exec(compile(code, "docs/evaluate.md", "exec"), space)
    model = space["Leveret"]("a/model")
    message = [{"type": "image", "value": "a.jpg"}, {"type": "text", "value": "What?"}]
    assert model.generate(message, "MMBench") == "a.jpg: What?"
    assert model.generate([{"type": "text", "value": "What?"}]) == "None: What?"
