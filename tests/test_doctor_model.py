"""What `leveret doctor MODEL` says is what the model has, and nothing of it is loaded to find out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes import tiny_batch, tiny_language_folder, tiny_vlm
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


def lora_of(language: Any, folder: Path, base: str, **more: Any) -> Path:
    """A folder as PEFT writes it; `base` is what it names."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **more)
    get_peft_model(language, settings).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("more", [{}, {"use_dora": True}])
def test_adapters_are_told_with_what_they_stand_on(
    more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    vlm = tiny_vlm()
    base = checkpoint.save(vlm, tmp_path / "base")
    folder = lora_of(vlm.language, tmp_path / "adapters", str(base), **more)
    request.getfixturevalue("nothing_is_read")
    told, plain = doctor.examine(str(folder)), doctor.examine(str(base))
    assert plain["adapters"] is None and told["adapters"]["base"] == str(base)
    for key in ("parts", "parameters", "kv_cache", "ways", "chat", "tool"):
        assert told[key] == plain[key], key
    # rank 4 on q_proj (32 -> 32) and down_proj (64 -> 32) of two layers; DoRA has the lengths of the rows beside them
    count = 2 * (4 * (32 + 32) + 4 * (64 + 32) + (64 if more else 0))
    about = {"rank": 4, "alpha": 8, "layers": 4, "targets": ["down_proj", "q_proj"], "parameters": count}
    about |= {"kind": "DoRA" if more else "LoRA", "dtype": "float32", "stored": 4 * count}
    assert {key: told["adapters"][key] for key in about} == about
    assert run(["doctor", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{about['kind']} adapters on" in said and f"{count:,} parameters in 4 layers (down_proj, q_proj)" in said


def test_the_adapters_that_training_wrote_are_told(tmp_path: Path) -> None:
    from leveret.train import train

    learn = {"connector": {"lr": 5e-3}, "language": {"lr": 5e-3, "lora": {"rank": 4, "alpha": 8}}}
    stages = {"align": {"learn": {"connector": {"lr": 5e-3}}, "steps": 1}, "tune": {"learn": learn, "steps": 1}}
    whole = train(recipe(toy_set(tmp_path / "toy"), stages), tmp_path / "run")
    told = doctor.examine(str(tmp_path / "run/tune/adapter"))
    assert told["adapters"]["rank"] == 4 and told["adapters"]["base"].endswith("align/model")
    assert told["parameters"] == doctor.examine(str(whole))["parameters"]


@pytest.mark.parametrize("adapted", [True, False])
def test_another_tools_adapters_and_projectors_are_told(adapted: bool, tmp_path: Path) -> None:
    """A LoRA folder of Bunny, and a projector alone: as what `convert` makes of them."""
    folder, at = bunny(tmp_path)
    whole, config = doctor.examine(str(folder)), json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: x for name, x in state.items() if "mm_projector" not in name}, base / "model.safetensors")
    for file in folder.glob("*token*"):
        shutil.copy(file, base / file.name)
    learned = {name: x for name, x in state.items() if "mm_projector" in name}
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(base)}))
    if adapted:
        named = {f"base_model.model.{name}": x for name, x in learned.items()}
        torch.save(named, folder / "non_lora_trainables.bin")
        (name,) = [name for name in state if name.endswith("layers.0.self_attn.q_proj.weight")]
        out, given = state[name].shape
        halves = {"lora_A": torch.ones(4, given), "lora_B": torch.ones(out, 4)}
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        save_file({f"{layer}.{half}.weight": x for half, x in halves.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    else:
        torch.save(learned, folder / "mm_projector.bin")
    told = doctor.examine(str(folder))
    assert told["parameters"] == whole["parameters"] and told["image_tokens"] == whole["image_tokens"]
    assert {name: part["dtype"] for name, part in told["parts"].items()} == {
        name: part["dtype"] for name, part in whole["parts"].items()
    }
    if adapted:
        assert told["adapters"]["base"] == str(base) and told["adapters"]["targets"] == ["q_proj"]
    else:
        assert told["adapters"] is None
    assert run(["convert", str(folder), str(tmp_path / "ours"), "--hub", str(at)]) == 0
    made = doctor.examine(str(tmp_path / "ours"))  # its tower is the toy of --hub, which doctor knows nothing of
    assert made["parts"]["language"]["parameters"] == told["parts"]["language"]["parameters"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("none", "names no base model"),
        ("gone", r"stand on '.*nowhere', which is no whole model here .*--base MODEL -o OUT"),
        ("language", "which is no whole model here"),
        ("adapters", "holds adapters too"),
        ("other", "does not fit .*do not add to a weight of"),
        ("kind", "adapters of the kind 'IA3'"),
        ("weights", "no adapter_model.safetensors"),
    ],
)
def test_adapters_without_their_model_are_one_clear_line(harm: str, said: str, tmp_path: Path) -> None:
    vlm = tiny_vlm()
    base = checkpoint.save(vlm, tmp_path / "base")
    named = {"gone": str(tmp_path / "nowhere"), "language": str(tiny_language_folder())}.get(harm, str(base))
    folder = lora_of(vlm.language, tmp_path / "adapters", named)
    config = json.loads((folder / "adapter_config.json").read_text())
    if harm == "none":
        config["base_model_name_or_path"] = None
    elif harm == "adapters":
        config["base_model_name_or_path"] = str(shutil.copytree(folder, tmp_path / "more"))
    elif harm == "kind":
        config["peft_type"] = "IA3"
    elif harm == "weights":
        (folder / "adapter_model.safetensors").unlink()
    elif harm == "other":
        state = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in state if "lora_A" in name)
        save_file(state | {name: torch.zeros(4, 7)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((RecipeError, DataError), match=said) as refused:
        doctor.examine(str(folder))
    assert "\n" not in str(refused.value)


def test_what_is_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapters").mkdir()
    (tmp_path / "bad.yaml").write_text("name: x\n")
    config = {"model_type": "bunny-phi", "mm_vision_tower": "google/siglip-so400m-patch14-384"}
    (tmp_path / "adapters" / "config.json").write_text(json.dumps(config))
    for given, kind, said in (
        (str(tmp_path / "empty"), DataError, "is not a model"),
        (str(tmp_path / "adapters"), DataError, "names no language model that they stand on .*--base"),
        (str(tmp_path / "bad.yaml"), RecipeError, "model"),
        ("wrold", RecipeError, "world"),
    ):
        with pytest.raises(kind, match=said):
            doctor.examine(given)
    assert run(["doctor", "nobody/nothing"]) == 5
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in said and len(said.splitlines()) == 1
