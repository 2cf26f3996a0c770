"""`show`: one sample at every seam."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from leveret.records import IGNORE
from leveret.runs import DataError
from leveret.show import plain, preview, show


def picture(width: int = 40, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    picture().save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")

    def row(id: str, image: str | None, *texts: str) -> dict[str, Any]:
        said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        return {"id": id, "conversations": said} | ({"image": image} if image else {})

    rows = [
        row("first", "a.png", "<image>\nWhat colour is the square?", "red"),
        row("text", None, "Is it [red]? \x1b[31m<|end|>", "no", "Sure?", "yes"),
        row("bad-picture", "broken.png", "<image>\nWhat?", "red"),
        row("malformed", "a.png", "What?", "red"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "data.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fakes = pytest.importorskip("fakes")
    from leveret.model.checkpoint import save

    folder = tmp_path_factory.mktemp("show") / "model"
    save(fakes.tiny_vlm(), folder)
    return folder


def test_without_a_model_the_record_and_what_a_model_would_add(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = show(source)
    assert facts["images"][0]["width"] == 40 and facts["images"][0]["height"] == 20
    assert "tokens" not in facts and "--model" in facts["without"]
    printed = capsys.readouterr().out
    for text in ("sample 0 of 4", "first", "What colour is the square?", "40 x 20", "--model"):
        assert text in printed


def test_with_a_model_every_seam(source: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = show(source, model=model)
    assert facts["prompt"]["text"] == "<|user|><image>\nWhat colour is the square?<|assistant|> red<|end|>"
    tokens = facts["tokens"]
    assert tokens["images"] == 4 and sum(run["length"] for run in tokens["runs"]) == tokens["positions"]
    assert [run["kind"] for run in tokens["runs"]] == ["other", "image", "other", "supervised"]
    assert tokens["runs"][-1]["tokens"][-1] == "<|end|>"
    length = tokens["positions"]
    assert facts["shapes"]["input_ids"] == [1, length] and facts["shapes"]["embeddings"][:2] == [1, length]
    assert facts["shapes"]["tower features"] == [1, 4, 16]
    assert facts["loss"]["supervised"] == tokens["supervised"] and facts["loss"]["mean"] > 0
    assert facts["answer"]["reference"] == "red"
    assert facts["answer"]["equal"] == (facts["answer"]["model"].strip() == "red")
    printed = capsys.readouterr().out
    assert "<image> x 4" in printed and "+1:<|end|>" in printed and "1 x 4 x 16" in printed
    assert "reference  red" in printed and ("equal" in printed or "different" in printed)


def test_what_is_shown_is_what_training_makes(source: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from leveret.inputs import encode
    from leveret.model.checkpoint import load
    from leveret.pool import open_source

    vlm = load(model)
    sample = open_source(source).sample(1)
    encoded = encode(sample.turns, vlm.chat, vlm.tokenizer, vlm.spec, [])
    runs = show(source, id="text", model=model, json=True)["tokens"]["runs"]
    assert [token for run in runs for token in run["ids"]] == encoded.input_ids
    learned = [token for run in runs if run["kind"] == "supervised" for token in run["ids"]]
    assert learned == [label for label in encoded.labels if label != IGNORE]
    assert json.loads(capsys.readouterr().out)["tokens"]["runs"] == runs


def test_a_model_in_halves_is_shown_on_a_cpu(source: Path, model: Path, tmp_path: Path) -> None:
    import torch

    from leveret.model import checkpoint

    halves = checkpoint.save(checkpoint.load(model).cast(torch.float16), tmp_path / "halves")
    assert show(source, model=halves)["loss"]["mean"] > 0


def test_a_typed_escape_does_not_reach_the_terminal(
    source: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(source, index=1, model=model)
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed and r"Is it [red]? \x1b[31m<|end|>" in printed
    assert plain("a\x07\u202eb\n") == "a\\x07\\u202eb\n"


def test_pictures_are_saved_as_the_model_sees_them(source: Path, model: Path, tmp_path: Path) -> None:
    from leveret.inputs import fit
    from leveret.model.checkpoint import load

    (view,) = load(model).spec.towers
    facts = show(source, model=model, out=tmp_path / "seen.png", json=True)
    assert facts["files"] == [str(tmp_path / "seen.png")]
    np.testing.assert_array_equal(Image.open(tmp_path / "seen.png"), np.asarray(fit(picture(), view)))
    show(source, out=tmp_path / "folder", json=True)
    np.testing.assert_array_equal(Image.open(tmp_path / "folder" / "sample-0.png"), np.asarray(picture()))


def test_faults_come_after_what_could_be_shown(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="not an image"):
        show(source, index=2)
    printed = capsys.readouterr().out
    assert "bad-picture" in printed and "not an image" in printed
    with pytest.raises(DataError, match="image marks do not match"):
        show(source, id="malformed", json=True)
    assert "image marks" in json.loads(capsys.readouterr().out)["fault"]


def test_no_such_sample(source: Path) -> None:
    with pytest.raises(DataError, match="holds samples 0 to 3"):
        show(source, index=4)
    with pytest.raises(DataError, match="did you mean 'first'"):
        show(source, id="frist")


def test_preview_shows_two_pixels_a_cell() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    text = preview(image)
    assert text.plain == "\u2580" * 4 + "\n" + "\u2580" * 4 + "\n"
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as capture:
        console.print(text)
    assert "38;2;255;0;0;48;2;255;0;0" in capture.get() and "48;2;0;0;255" in capture.get()
    wide = preview(Image.new("RGB", (1000, 3)), columns=20).plain
    assert max(map(len, wide.splitlines())) == 20


def test_nothing_heavy_is_imported_for_a_record() -> None:
    code = "import sys, leveret.show; print([m for m in ('torch', 'transformers', 'PIL', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
