"""Models averaged, and adapters made whole: what is equal stays so to the bit, and what differs is refused by name."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fakes import tiny_batch, tiny_vlm
from leveret.cli import run
from leveret.model import checkpoint
from leveret.model.merge import add_adapters, average
from leveret.model.source import refuse_place
from leveret.runs import DataError, RecipeError
from train_fakes import recipe, toy_set

SIZES = 3


@cache
def _home() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="leveret-merge-")


@cache
def model(seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """The same composition with other weights for every seed."""
    folder = Path(_home().name) / f"m{seed}-{dtype}"
    vlm = tiny_vlm()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += seed * 0.1 * torch.randn(parameter.shape, generator=generator)
    return checkpoint.save(vlm.cast(dtype), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_with_itself_is_itself_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    one = model(1, dtype)
    average([one, one, one], tmp_path / "m", [0.3, 0.5, 0.2])
    assert bits(tmp_path / "m") == bits(one)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "m" / name).read_bytes() == (one / name).read_bytes()


def test_weights_of_one_and_zero_choose(tmp_path: Path) -> None:
    for shares, chosen in (([1.0, 0.0], 1), ([0.0, 1.0], 2)):
        average([model(1), model(2)], tmp_path / "m", shares)
        assert bits(tmp_path / "m") == bits(model(chosen))


@settings(max_examples=12)
@given(
    parts=st.lists(st.integers(0, 100), min_size=SIZES, max_size=SIZES).filter(any),
    order=st.permutations(range(SIZES)),
)
def test_the_order_does_not_matter_and_the_mean_is_the_mean(parts: list[int], order: list[int]) -> None:
    shares = [part / sum(parts) for part in parts]
    models = [model(seed) for seed in range(SIZES)]
    with TemporaryDirectory() as place:
        average(models, Path(place, "a"), shares)
        average([models[i] for i in order], Path(place, "b"), [shares[i] for i in order])
        found, other, inputs = weights(Path(place, "a")), weights(Path(place, "b")), [weights(one) for one in models]
    for name, tensor in found.items():
        expected = sum(share * one[name].double() for share, one in zip(shares, inputs, strict=True))
        torch.testing.assert_close(tensor, expected.float(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=1e-6)


def test_a_field_that_an_older_leveret_did_not_write_is_no_difference(tmp_path: Path) -> None:
    older = Path(shutil.copytree(model(2), tmp_path / "older"))
    config = json.loads((older / "config.json").read_text("utf-8"))
    assert config["vision"][0].pop("short") == 0
    (older / "config.json").write_text(json.dumps(config), "utf-8")
    average([model(1), older], tmp_path / "m")
    average([model(1), model(2)], tmp_path / "n")
    assert bits(tmp_path / "m") == bits(tmp_path / "n")


def test_the_first_models_type_is_kept_and_the_sum_is_made_in_float32(tmp_path: Path) -> None:
    half, full = model(1, torch.bfloat16), model(2)
    average([half, full], tmp_path / "m", [0.25, 0.75])
    one, two, found = weights(half), weights(full), weights(tmp_path / "m")
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        expected = (two[name] + 0.25 * (one[name].float() - two[name])).to(torch.bfloat16)
        assert torch.equal(tensor, expected)


def test_the_command_takes_weights_in_every_spelling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(model(1), run_folder / "model")
    spellings = (["--weights", "0.3", "0.7"], ["--weights", "0.3,0.7"], ["--weights", "3", "7", "--normalise"])
    for place, spelled in enumerate(spellings):
        out = tmp_path / str(place)
        assert run(["merge", str(run_folder), str(model(2)), *spelled, "-o", str(out), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["weights"] == pytest.approx([0.3, 0.7]) and said["models"][0] == "run"
        assert bits(out) == bits(tmp_path / "0")
    record = json.loads((tmp_path / "0/merged.json").read_text())
    assert record["weights"] == [0.3, 0.7] and len(record["sha256"]) == 2 and str(tmp_path) not in str(record)
    vlm = checkpoint.load(tmp_path / "0")
    with torch.no_grad():
        assert torch.isfinite(vlm(tiny_batch(vlm)).logits).all()
    assert run(["merge", str(model(1)), str(model(2)), "-o", str(tmp_path / "even")]) == 0
    assert "0.5 x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "0.3", "0.6"], "they sum to 0.9, and must sum to 1, or add --normalise"),
        (["--weights", "0.3", "0.699998"], "they sum to 0.999998"),
        (["--weights", "0.3"], "1 for 2 models"),
        (["--weights", "nan", "0.6"], "number from 0 on"),
        (["--weights=-0.5,1.5"], "number from 0 on"),
        (["--weights", "much"], "not a number"),
        (["--weights", "0,0", "--normalise"], "sum to 0"),
        (["--base", "x"], "leave --base out"),
    ],
)
def test_wrong_weights_are_told(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", str(model(1)), str(model(2)), *words, "-o", str(tmp_path / "m")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def changed(tmp_path: Path, harm: str) -> Path:
    folder = tmp_path / "other"
    shutil.copytree(model(2), folder)
    config = json.loads((folder / "config.json").read_text())
    state = weights(folder)
    if harm == "chat":
        config["recipe"]["chat"] = "vicuna_v1"
    if harm == "resize":
        config["vision"][0]["resize"] = config["spec"]["towers"][0]["resize"] = "pad"
    if harm == "connector":
        config["recipe"]["connector"]["kind"] = "linear"
    if harm == "a shape":
        state["connector.0.bias"] = torch.zeros(3)
    if harm == "a tensor":
        del state["connector.2.bias"]
    if harm in ("token", "rule"):
        told = json.loads((folder / "tokenizer.json").read_text())
        if harm == "token":
            told["model"]["vocab"] = {
                ("zzz" if name == "a" else name): at for name, at in told["model"]["vocab"].items()
            }
            told["model"]["merges"] = []
        else:
            told["pre_tokenizer"]["add_prefix_space"] = True
        (folder / "tokenizer.json").write_text(json.dumps(told))
    if harm == "no tokenizer":
        (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("chat", 'is chat: "tiny" in the first, "vicuna_v1" in the other'),
        ("resize", r'spec.towers.0.resize: "squash" in the first, "pad" in the other'),
        ("connector", "connector.kind"),
        ("a shape", r"connector.0.bias: \(32,\) in the first, \(3,\) in the other"),
        ("a tensor", r"connector.2.bias: \(32,\) in the first, not there in the other"),
        ("token", "tokenizers: 'a' is"),
        ("rule", "add_prefix_space"),
        ("no tokenizer", "only one of the two"),
    ],
)
def test_models_of_two_shapes_are_refused_by_the_first_difference(harm: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        average([model(1), changed(tmp_path, harm)], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_where_a_backbone_lay_does_not_matter(tmp_path: Path) -> None:
    folder = changed(tmp_path, "nothing")
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["language"]["name"] = config["language"]["source"] = f"somewhere/else/{'llama-0'}"
    (folder / "config.json").write_text(json.dumps(config))
    average([model(1), folder], tmp_path / "m")


def test_counts_are_rounded_and_other_whole_numbers_must_be_equal(tmp_path: Path) -> None:
    """Names that no tower of these has, so the files are looked at and not loaded."""
    folders = []
    for count, ids in ((10, 1), (21, 1), (0, 2)):
        folder = tmp_path / f"c{count}"
        shutil.copytree(model(1), folder)
        more = {
            "towers.vision.n.num_batches_tracked": torch.tensor(count),
            "towers.vision.n.running_mean": torch.full((2,), float(count)),
            "towers.vision.position_ids": torch.full((3,), ids),
        }
        save_file(weights(folder) | more, folder / "model.safetensors")
        folders.append(folder)
    average(folders[:2], tmp_path / "m", [0.25, 0.75])
    found = weights(tmp_path / "m")
    assert found["towers.vision.n.num_batches_tracked"].item() == 18  # 18.25
    assert found["towers.vision.n.running_mean"].tolist() == [18.25, 18.25]
    with pytest.raises(RecipeError, match="position_ids, which holds whole numbers"):
        average([folders[0], folders[2]], tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_the_result_takes_no_place_of_what_is_read_or_of_what_is_no_model(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    one = tmp_path / "one"
    shutil.copytree(model(1), one)
    for out, said in ((one, "is read"), (one / "in", "is read"), (precious, "is no model")):
        with pytest.raises(RecipeError, match=said):
            average([one, model(2)], out)
    assert (precious / "thesis.tex").exists()
    for several, kind in (([one], RecipeError), ([one, tmp_path / "nowhere"], DataError)):
        with pytest.raises(kind):
            average(several, tmp_path / "m")


def test_a_model_of_another_tool_is_averaged_too(tmp_path: Path) -> None:
    from test_model_peers import bunny

    theirs, hub = bunny(tmp_path)
    ours = tmp_path / "ours"
    assert run(["convert", str(theirs), str(ours), "--hub", str(hub)]) == 0
    shutil.move(theirs, theirs := tmp_path / "another name")  # which is all that its config says of a language model
    average([theirs, ours], tmp_path / "m", hub=hub)
    assert bits(tmp_path / "m") == bits(ours)
    average([ours, theirs], tmp_path / "m", hub=hub)
    assert not list(tmp_path.glob(".converted-*"))


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapters(tmp_path: Path, **more: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder that PEFT wrote for the language model of model(1), and what PEFT's own merge makes of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    vlm = checkpoint.load(model(1))
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **more)
    adapted = get_peft_model(vlm.language, settings)
    adapted.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_of_peft_become_a_whole_model(more: dict[str, Any], tmp_path: Path) -> None:
    folder, expected = adapters(tmp_path, **more)
    if "modules_to_save" in more:
        file = folder / "adapter_model.safetensors"
        state = load_file(file)
        (head,) = [name for name in state if "lm_head" in name]
        state[head] = expected["lm_head.weight"] = torch.randn_like(state[head])
        save_file(state, file)
    assert run(["merge", str(folder), "--base", str(model(1)), "-o", str(tmp_path / "m")]) == 0
    before, found = weights(model(1)), weights(tmp_path / "m")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        if name.startswith("language."):
            torch.testing.assert_close(tensor, expected[name.removeprefix("language.")], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(tensor, before[name])
    assert not torch.equal(found["language.model.layers.0.self_attn.q_proj.weight"],
                           before["language.model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("no base", "Say with --base which model"),
        ("names none", "names no base model; say with --base"),
        ("another layer", "no a layer model.layers.9|no layer|a layer model.layers.9"),
        ("another width", "do not add to a weight of"),
        ("half", r"lora_B.weight"),
        ("a stranger", "tensors of the adapters have no place"),
        ("another kind", "'IA3'"),
        ("no rank", "says no r"),
        ("no tensors", "no adapter_model.safetensors"),
        ("not adapters", "no adapter_config.json"),
        ("nowhere", "no such folder"),
        ("rest", "rest.safetensors holds connector.9"),
    ],
)
def test_adapters_that_do_not_fit_say_what_is_missing(harm: str, said: str, tmp_path: Path) -> None:
    folder, _ = adapters(tmp_path)
    file, told = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    state = load_file(file)
    name = next(name for name in state if name.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    if harm == "another layer":
        state = {key.replace("layers.1.", "layers.9."): x for key, x in state.items()}
    if harm == "another width":
        state[name] = torch.zeros(4, 48)
    if harm == "half":
        del state[name.replace("lora_A", "lora_B")]
    if harm == "a stranger":
        state["base_model.model.extra.weight"] = torch.zeros(2)
    save_file(state, file)
    told["base_model_name_or_path"] = None if harm == "names none" else "someone/phi-2"
    told |= {"peft_type": "IA3"} if harm == "another kind" else {}
    if harm == "no rank":
        del told["r"]
    (folder / "adapter_config.json").write_text(json.dumps(told))
    if harm == "no tensors":
        file.unlink()
    if harm == "rest":
        save_file({"connector.9.weight": torch.zeros(2)}, folder / "rest.safetensors")
    given = {"not adapters": model(1), "nowhere": tmp_path / "nowhere"}.get(harm, folder)
    base = None if harm in ("no base", "names none") else str(model(1))
    with pytest.raises((DataError, RecipeError), match=said) as caught:
        add_adapters(given, tmp_path / "m", base)
    assert "\n" not in str(caught.value) and not (tmp_path / "m").exists()


def test_the_adapters_of_a_run_and_what_learned_beside_them_are_the_runs_model(tmp_path: Path) -> None:
    from leveret.train import train

    learn = {"connector": {"lr": 5e-3}, "language": {"lr": 5e-3, "lora": {"rank": 4, "alpha": 8}}}
    stages: dict[str, Any] = {
        "align": {"learn": {"connector": {"lr": 5e-3}}, "steps": 2},
        "tune": {"learn": learn, "steps": 3, "resize": "pad"},
    }
    train(recipe(toy_set(tmp_path / "toy"), stages), tmp_path / "run")
    made = tmp_path / "run" / "tune" / "adapter"
    assert run(["merge", str(made), "-o", str(tmp_path / "m")]) == 0  # the base is the one that it names
    assert bits(tmp_path / "m") == bits(tmp_path / "run" / "tune" / "model") != bits(tmp_path / "run/align/model")
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "m", tmp_path / "run/model")]
    assert configs[0] == configs[1] and configs[0]["vision"][0]["resize"] == "pad"


def test_a_model_published_with_its_code_is_averaged_and_told_like_ours(tmp_path: Path) -> None:
    from leveret import doctor

    published = tmp_path / "published"
    assert run(["convert", str(model(1)), str(published), "--to", "remote-code"]) == 0
    average([model(1), published], tmp_path / "m")
    assert bits(tmp_path / "m") == bits(model(1))
    told = [doctor.examine(str(place)) for place in (model(1), published)]
    sizes = [{name: part["stored"] for name, part in one["parts"].items()} for one in told]
    assert sizes[0] == sizes[1] and told[0]["parameters"] == told[1]["parameters"]


@pytest.mark.parametrize("stranger", ["thesis.txt", ".git/HEAD", "photos/a", "env.sh"])
def test_what_is_no_part_of_a_model_is_never_deleted(tmp_path: Path, stranger: str) -> None:
    kept = tmp_path / "kept" / stranger
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    (tmp_path / "kept" / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"holds more than a model .* would delete"):
        refuse_place(tmp_path / "kept")
    assert kept.read_text() == "mine"
    kept.unlink()
    if kept.parent != tmp_path / "kept":
        kept.parent.rmdir()
    refuse_place(tmp_path / "kept")
