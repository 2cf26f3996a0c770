"""A model folder comes back bit for bit, or says exactly what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fakes import tiny_batch, tiny_vlm
from leveret.model import checkpoint
from leveret.model.checkpoint import find, load, save
from leveret.model.parts import adapter_size, count, count_whole, learnable, parts_table, render, totals
from leveret.runs import DataError, RecipeError


def learn(lr: float = 1e-3, **more: object) -> SimpleNamespace:
    known = {"lr": lr, "weight_decay": None, "lora": None, "from_layer": None, "towers": None}
    return SimpleNamespace(**{**known, **more})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    vlm = tiny_vlm(connector="residual_2d").cast(dtype)
    batch = tiny_batch(vlm)
    folder = save(vlm, tmp_path / "run" / "model")
    back = load(folder)
    assert back.dtype == dtype and not back.training
    assert (back.recipe, back.spec, back.chat) == (vlm.recipe, vlm.spec, "tiny")
    mine, theirs = vlm.state_dict(), back.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    with torch.no_grad():
        assert torch.equal(vlm(batch).logits, back(batch).logits)
    text = "<|user|>what is <image> é<|end|>"
    assert back.tokenizer(text).input_ids == vlm.tokenizer(text).input_ids
    assert back.tokenizer.pad_token_id == vlm.tokenizer.pad_token_id
    again = save(back, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("family", ["minicpm", "phi2", "qwen1.5", "stablelm2", "llama3"])
def test_published_tokenizers_come_back_to_the_letter(family: str, parity: Path, tmp_path: Path) -> None:
    from leveret.model.language import load_tokenizer

    vlm = tiny_vlm()
    vlm.tokenizer = load_tokenizer(str(parity / f"bunny-{family}-siglip" / "checkpoint"))
    vlm.language.resize_token_embeddings(len(vlm.tokenizer))
    back = load(save(vlm, tmp_path / "m")).tokenizer
    text = "USER: x</s>y <|endoftext|>  \u4e2d\u6587\n ASSISTANT:"
    assert back(text).input_ids == vlm.tokenizer(text).input_ids
    assert back.all_special_ids == vlm.tokenizer.all_special_ids


def test_a_folder_is_whole_by_itself(tmp_path: Path) -> None:
    """Nothing of it points to the folders it was built from, nothing is a pickle, and no rest lies beside it."""
    vlm = tiny_vlm()
    folder = save(vlm, tmp_path / "model")
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "others may read all of it or nothing"
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["vision"]["tower"] = config["recipe"]["language"]["name"] = "/gone"
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).recipe.language.name == "/gone"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tied_table_is_stored_once_and_comes_back_tied(tmp_path: Path) -> None:
    from safetensors import safe_open

    vlm = tiny_vlm()
    vlm.language.config.tie_word_embeddings = True
    vlm.language.tie_weights()
    with safe_open(str(save(vlm, tmp_path / "m") / "model.safetensors"), "pt") as file:
        names = set(file.keys())
    assert "language.lm_head.weight" not in names and "language.model.embed_tokens.weight" in names
    back = load(tmp_path / "m")
    assert back.language.lm_head.weight is back.language.model.embed_tokens.weight
    assert torch.equal(back.language.lm_head.weight, vlm.language.lm_head.weight)


def test_wrong_keys_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tiny_vlm(), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    state["connector.9.weight"] = state.pop("connector.2.weight")
    state["connector.0.bias"] = state["connector.0.bias"][:3].contiguous()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError) as caught:
        load(folder)
    text = str(caught.value)
    assert "missing: connector.2.weight" in text and "unexpected: connector.9.weight" in text
    assert "connector.0.bias is (3,), the model's is (32,)" in text


def test_a_torn_file_is_a_data_error(tmp_path: Path) -> None:
    folder = save(tiny_vlm(), tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"model\.safetensors: cannot be read"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(DataError, match=r"format None.*another tool"):
        load(folder)


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny_vlm(seed=0), tmp_path / "m")
    old = (folder / "model.safetensors").read_bytes()

    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(OSError, match="no space"):
        save(tiny_vlm(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]
    monkeypatch.undo()
    save(tiny_vlm(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() != old
    assert os.listdir(tmp_path) == ["m"]


def test_training_may_choose_another_resize(tmp_path: Path) -> None:
    from dataclasses import replace

    vlm = tiny_vlm()
    vlm.spec = replace(vlm.spec, towers=(replace(vlm.spec.towers[0], resize="pad"),))
    assert load(save(vlm, tmp_path / "m")).spec.towers[0].resize == "pad"


def test_adapters_must_be_merged_first(tmp_path: Path) -> None:
    vlm = tiny_vlm()
    vlm.language.model.layers[0].mlp.up_proj.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="merge them"):
        save(vlm, tmp_path / "m")


def test_find_takes_a_run_or_a_model(tmp_path: Path) -> None:
    model = save(tiny_vlm(), tmp_path / "run" / "model")
    assert find(tmp_path / "run") == find(model) == find(str(model)) == model
    nowhere, file = tmp_path / "nowhere", model / "config.json"
    for path, words in ((tmp_path, "neither"), (nowhere, "does not exist"), (file, "no folder")):
        with pytest.raises(DataError, match=words):
            find(path)


def test_parts_table_counts_what_learns() -> None:
    vlm = tiny_vlm()
    rows = {row.part: row for row in parts_table(vlm, {"connector": learn(2e-5), "vision": learn(1e-6, from_layer=1)})}
    assert list(rows) == ["vision", "connector", "language"]
    assert rows["connector"].parameters == rows["connector"].trainable == 16 * 32 + 32 + 32 * 32 + 32
    assert rows["language"].trainable == 0 and rows["language"].lr is None
    block = sum(p.numel() for p in vlm.towers["vision"].blocks[1].parameters())
    assert rows["vision"].trainable == block and rows["vision"].lr == 1e-6
    assert sum(row.parameters for row in rows.values()) == count(vlm) == sum(p.numel() for p in vlm.parameters())
    assert count_whole(vlm) > count(vlm)
    assert "4 image tokens" in totals(vlm)[0] and "full tower" in totals(vlm)[1]
    assert "2 of 3 layers" in rows["vision"].note
    assert render(list(rows.values()), vlm).row_count == 3


def test_parts_table_counts_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    vlm = tiny_vlm()
    lora = SimpleNamespace(rank=4, targets=None, dora=False, embeddings=False, bits=None)
    how = {"language": learn(lora=lora)}
    before = parts_table(vlm, how)[2]
    vlm.language = get_peft_model(vlm.language, LoraConfig(r=4, target_modules="all-linear"))
    after = parts_table(vlm, how)[2]
    assert before.trainable == after.trainable > 0
    assert before.parameters == after.parameters
    batch = tiny_batch(vlm)
    assert vlm(batch).loss_sum.isfinite()
    few = SimpleNamespace(rank=1, targets=("q_proj",), dora=False, embeddings=False, bits=None)
    assert adapter_size(tiny_vlm(), "language", learn(lora=few)) == 2 * (32 + 32)
    few.dora = True
    assert adapter_size(tiny_vlm(), "language", learn(lora=few)) == 2 * (32 + 32 + 32)


def test_what_gets_no_gradient_cannot_learn() -> None:
    vlm = tiny_vlm()
    with pytest.raises(RecipeError, match="layers 0 to 1"):
        parts_table(vlm, {"vision": learn(from_layer=2)})
    with pytest.raises(RecipeError, match="vision and language do"):
        parts_table(vlm, {"connector": learn(from_layer=0)})
    with pytest.raises(RecipeError, match="layers 0 to 1"):
        parts_table(vlm, {"language": learn(from_layer=2)})
    with pytest.raises(RecipeError, match=r"learn\.vision\.towers.*'visoin'"):
        parts_table(vlm, {"vision": learn(towers=("visoin",))})
    with pytest.raises(RecipeError, match="'connector'"):
        list(learnable(vlm, "conector"))
    vlm.connector = torch.nn.Identity()
    with pytest.raises(RecipeError, match="no parameters"):
        parts_table(vlm, {"connector": learn()})
