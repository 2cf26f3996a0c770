"""What `leveret doctor MODEL` says is what the model has, and nothing of it is loaded to find out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import tiny_batch, tiny_vlm
from leveret import doctor
from leveret.cli import run
from leveret.model import checkpoint, hub
from leveret.model.parts import count
from leveret.runs import DataError, RecipeError
from test_model_peers import bunny
from train_fakes import recipe, toy_set


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(hub, "read_tensors", refuse)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_ours_by_part_and_type(dtype: torch.dtype, tmp_path: Path) -> None:
    vlm = tiny_vlm().cast(dtype)
    checkpoint.save(vlm, tmp_path / "run" / "model")
    told = doctor.examine(str(tmp_path / "run"))
    assert told["tool"] == "leveret" and told["image_tokens"] == 4 and told["chat"] == "tiny"
    assert told["parameters"] == count(vlm) == sum(part["parameters"] for part in told["parts"].values())
    size = (tmp_path / "run/model/model.safetensors").stat().st_size
    stored = sum(part["stored"] for part in told["parts"].values())
    assert 0 <= size - stored < 20_000  # the rest is the file's head
    assert told["parts"]["language"]["dtype"] == str(dtype).removeprefix("torch.")
    assert told["parts"]["connector"]["bf16"] * 2 == told["parts"]["connector"]["float32"]


def test_the_cache_is_as_large_as_transformers_makes_it() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm, lengths=(10,), images=(True,))
    with torch.no_grad():
        cache = vlm.language(inputs_embeds=vlm.embed(batch), use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert numbers == 10 * doctor.kv_bytes(vlm.language.config)


def test_the_published_recipe_needs_what_its_numbers_say() -> None:
    told = doctor.examine("bunny/v1.0-3b")
    assert told["parameters"] == 3_182_254_624 and told["image_tokens"] == 729 and told["tool"] == "recipe"
    assert told["kv_cache"] == {"bf16": 2 * 32 * 2560 * 1000 * 2, "float32": 2 * 32 * 2560 * 1000 * 4}
    assert told["parts"]["language"]["stored"] is None
    lora, full = told["ways"]["tune with LoRA"], told["ways"]["tune in full"]
    assert told["ways"]["answer"]["bf16"] < lora["bf16"] < full["bf16"]
    learned = told["parts"]["language"]["parameters"] + told["parts"]["connector"]["parameters"]
    assert full["bf16"] > 16 * learned + 2 * told["parts"]["vision"]["parameters"]


def test_what_fits_on_which_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gib = 1024**3
    devices = [
        {"id": "cpu", "name": "c", "memory": 8 * gib, "bf16": "emulated: slow"},
        {"id": "cuda:0", "name": "g", "memory": 24 * gib, "bf16": "fast"},
        {"id": "mps", "name": "m", "memory": None, "bf16": "fast"},
    ]
    monkeypatch.setattr(doctor, "_devices", lambda memory: devices)
    assert run(["doctor", "bunny/v1.0-3b", "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["model"]["fits"]
    answers = {name: ways["answer"] for name, ways in fits.items()}
    assert [answers[name]["fits"] for name in ("cpu", "cuda:0", "mps")] == [False, True, None]
    assert [answers[name]["precision"] for name in ("cpu", "cuda:0")] == ["float32", "bf16"]
    assert fits["cuda:0"]["tune with LoRA"]["fits"] and not fits["cuda:0"]["tune in full"]["fits"]
    assert run(["doctor", "bunny/v1.0-3b"]) == 0
    said = capsys.readouterr().out
    assert "3,182,254,624" in said and "does not fit" in said and "729 tokens an image" in said


@pytest.mark.usefixtures("nothing_is_read")
def test_a_model_of_another_tool_is_outlined_from_the_heads_of_its_files(tmp_path: Path) -> None:
    folder, _ = bunny(tmp_path)
    told = doctor.examine(str(folder))
    assert "Bunny" in told["tool"] and told["chat"] == "bunny"
    assert told["parts"]["language"]["dtype"] == "float32" and told["parts"]["connector"]["what"].startswith("mlp2x")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_is_outlined_too(sharded: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, _ = bunny(tmp_path)
    before = doctor.examine(str(folder))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        names = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
        for file in set(names.values()):
            torch.save({name: x for name, x in state.items() if names[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    assert doctor.examine(str(folder)) == before


def test_a_run_that_is_not_finished_is_told_by_its_recipe(tmp_path: Path) -> None:
    from leveret.train import train

    train(recipe(toy_set(tmp_path / "toy"), steps=1), tmp_path / "run")
    finished = doctor.examine(str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "model")
    told = doctor.examine(str(tmp_path / "run"))
    assert "not finished" in told["notes"][0] and told["parameters"] == finished["parameters"]


def test_what_is_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapters").mkdir()
    (tmp_path / "bad.yaml").write_text("name: x\n")
    config = {"model_type": "bunny-phi", "mm_vision_tower": "google/siglip-so400m-patch14-384"}
    (tmp_path / "adapters" / "config.json").write_text(json.dumps(config))
    for given, kind, said in (
        (str(tmp_path / "empty"), DataError, "is not a model"),
        (str(tmp_path / "adapters"), RecipeError, "adapters, or a projector alone"),
        (str(tmp_path / "bad.yaml"), RecipeError, "model"),
        ("wrold", RecipeError, "world"),
    ):
        with pytest.raises(kind, match=said):
            doctor.examine(given)
    assert run(["doctor", "nobody/nothing"]) == 5
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in said and len(said.splitlines()) == 1
