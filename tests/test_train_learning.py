"""What learns in a stage: parts, blocks from one on, towers, adapters on any part; and what PEFT reads of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fakes
import train_fakes
from leveret.model import checkpoint
from leveret.model.build import build
from leveret.model.merge import add_adapters
from leveret.model.parts import parts_table
from leveret.model.recipe import TowerRecipe, VisionRecipe
from leveret.model.sketch import told_adapters
from leveret.model.vlm import VLM
from leveret.runs import EnvironmentFault, RecipeError, read_json
from leveret.train import learning, lora, quantised, train
from leveret.train.decay import RULES
from leveret.train.loop import begin
from leveret.train.plan import plan
from leveret.train.stages import StageRecipe

PROBE = torch.arange(5, 25)[None]


def stage(learn: dict[str, Any], **more: Any) -> StageRecipe:
    return StageRecipe.model_validate({"data": "none.json", "steps": 1, "learn": learn, **more})


def names(vlm: VLM, learn: dict[str, Any]) -> list[str]:
    return [one.name for one in learning.ready(vlm, stage(learn), seed=0)]


def loud_adapters(vlm: VLM) -> None:
    """Adapters begin by changing nothing; here they do."""
    with torch.no_grad():
        for name, value in vlm.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
            elif "lora_magnitude" in name:
                value.mul_(1.25)


def pictures(vlm: VLM) -> dict[str, Tensor]:
    side = fakes.SIDE
    return {"vision": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))}


def everything(vlm: VLM) -> Tensor:
    """What the model makes of fixed pictures and ids."""
    with torch.no_grad():
        seen = vlm.connector(vlm.see(pictures(vlm)))
        return torch.cat([seen.flatten(), vlm.language(input_ids=PROBE).logits.flatten()])


def test_a_language_model_learns_from_a_block_on() -> None:
    found = names(fakes.tiny_vlm(), {"language": {"lr": 1e-3, "from_layer": 1}})
    assert any(".layers.1." in name for name in found) and "language.model.norm.weight" in found
    assert "language.lm_head.weight" in found
    assert not any(".layers.0." in name or "embed_tokens" in name for name in found)
    whole = names(fakes.tiny_vlm(), {"language": {"lr": 1e-3, "from_layer": 0}})
    assert whole == [name for name, _ in fakes.tiny_vlm().named_parameters() if name.startswith("language.")]


def test_an_output_layer_tied_to_the_embeddings_stays_with_them() -> None:
    vlm = fakes.tiny_vlm()
    vlm.language.lm_head.weight = vlm.language.model.embed_tokens.weight
    found = names(vlm, {"language": {"lr": 1e-3, "from_layer": 1}})
    assert not any("embed_tokens" in name or "lm_head" in name for name in found)


KINDS = [
    {"rank": 4, "alpha": 8},
    {"rank": 4, "alpha": 8, "dora": True},
    {"rank": 4, "alpha": 8, "rslora": True, "targets": ["q_proj", "fc1", "0"]},
]


@pytest.mark.parametrize("how", KINDS, ids=["lora", "dora", "rslora"])
def test_adapters_of_every_part_merge_into_the_model_that_was_taught(how: dict[str, Any]) -> None:
    vlm = fakes.tiny_vlm()
    plain = everything(vlm)
    parts = {part: dict(how) for part in ("vision", "connector", "language")}
    if "targets" in how:
        own = {"vision": ["q_proj", "fc1"], "connector": ["0"], "language": ["q_proj"]}
        parts = {part: {**one, "targets": own[part]} for part, one in parts.items()}
    found = names(vlm, {part: {"lr": 1e-3, "lora": one} for part, one in parts.items()})
    assert found and all(".lora_" in name for name in found)
    assert {name.split(".")[0] for name in found} == {"towers", "connector", "language"}
    assert any("magnitude" in name for name in found) == bool(how.get("dora"))
    vlm.eval()
    torch.testing.assert_close(everything(vlm), plain, rtol=1e-5, atol=1e-5)
    loud_adapters(vlm)
    taught = everything(vlm)
    assert (taught - plain).abs().max() > 0.05
    for module in (vlm.towers, vlm.connector, vlm.language):
        lora.merge(module)
    assert not any("lora" in name or "base_layer" in name for name, _ in vlm.named_modules())
    torch.testing.assert_close(everything(vlm), taught, rtol=1e-4, atol=1e-4)


def test_adapters_keep_to_the_blocks_that_run_and_learn() -> None:
    vlm = fakes.tiny_vlm()
    learn = {
        "vision": {"lr": 1e-3, "from_layer": 1, "lora": {"rank": 2}},
        "language": {"lr": 1e-3, "from_layer": 1, "lora": {"rank": 2}},
    }
    found = names(vlm, learn)
    assert found and all(".layers.1." in name for name in found)


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
def test_embeddings_learn_beside_adapters_and_peft_reads_them(tied: bool, tmp_path: Path) -> None:
    """Words that a language model never met lie at one place, and no adapter before its output layer can tell them
    apart."""
    from peft import PeftModel

    vlm = fakes.tiny_vlm()
    if tied:
        vlm.language.config.tie_word_embeddings = True
        vlm.language.tie_weights()
    base = copy.deepcopy(vlm)
    how = stage({"language": {"lr": 1e-3, "lora": {"rank": 2, "embeddings": True}}})
    due = parts_table(vlm, how.learn)[2]
    found = learning.ready(vlm, how, seed=0)
    whole = [one.name for one in found if ".lora_" not in one.name]
    assert whole == ["language.model.embed_tokens.weight", *["language.lm_head.weight"] * (not tied)]
    assert due.trainable == sum(one.value.numel() for one in found) == parts_table(vlm, how.learn)[2].trainable
    assert "adapters of rank 2 and the embeddings" in due.note
    loud_adapters(vlm)
    with torch.no_grad():
        for one in found:
            if one.name in whole:
                one.value.add_(torch.randn_like(one.value))
    vlm.eval()
    with torch.no_grad():
        taught = vlm.language(input_ids=PROBE).logits.clone()
        lora.finish(vlm, how, found, tmp_path, "base")
        torch.testing.assert_close(vlm.language(input_ids=PROBE).logits, taught, rtol=1e-4, atol=1e-4)
        read = PeftModel.from_pretrained(copy.deepcopy(base.language), tmp_path / "adapter").eval()
        torch.testing.assert_close(read(input_ids=PROBE).logits, taught, rtol=1e-4, atol=1e-4)
    checkpoint.save(base, tmp_path / "base")
    add_adapters(tmp_path / "adapter", tmp_path / "sum", str(tmp_path / "base"))
    summed = checkpoint.load(tmp_path / "sum")
    with torch.no_grad():
        torch.testing.assert_close(summed.language(input_ids=PROBE).logits, taught, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "adapter" / "rest.safetensors").exists()
    told = told_adapters(read_json(tmp_path / "adapter/adapter_config.json"), load_file(
        tmp_path / "adapter/adapter_model.safetensors"), "base")  # fmt: skip
    assert told["parameters"] == sum(one.value.numel() for one in found if ".lora_" in one.name)
    assert told["whole"] == ["embed_tokens", "lm_head"]
    with pytest.raises(ValueError, match=r"embeddings: with from_layer 1 they stay"):
        stage({"language": {"lr": 1e-3, "from_layer": 1, "lora": {"embeddings": True}}})
    with pytest.raises(ValueError, match=r"learn.vision.lora.embeddings: only the language model has embeddings"):
        stage({"vision": {"lr": 1e-3, "lora": {"embeddings": True}}})


@pytest.mark.parametrize("how", KINDS[:2], ids=["lora", "dora"])
def test_what_a_run_saves_is_what_peft_reads(how: dict[str, Any], tmp_path: Path) -> None:
    """PEFT puts the saved adapters on the model that the stage began with, and on its published tower; base, adapters
    and the rest are the run's model to the bit of what was saved."""
    from peft import PeftModel

    data = train_fakes.toy_set(tmp_path / "toy")
    learn = {
        "vision": {"lr": 1e-2, "lora": how},
        "connector": {"lr": 5e-3},
        "language": {"lr": 1e-2, "lora": how},
    }
    stages: dict[str, Any] = {
        "align": {"learn": {"connector": {"lr": 5e-3}}, "steps": 2},
        "tune": {"learn": learn, "steps": 4},
    }
    recipe = train_fakes.recipe(data, stages)
    model = checkpoint.load(train(recipe, tmp_path / "run"))
    base = checkpoint.load(tmp_path / "run" / "align" / "model")
    folder = tmp_path / "run" / "tune"
    with torch.no_grad():
        due = model.language(input_ids=PROBE).logits
        adapted = PeftModel.from_pretrained(copy.deepcopy(base.language), folder / "adapter").eval()
        torch.testing.assert_close(adapted(input_ids=PROBE).logits, due, rtol=1e-4, atol=1e-4)
        assert (base.language(input_ids=PROBE).logits - due).abs().max() > 0.05
        seen = model.see(pictures(model))
        other = copy.deepcopy(base)
        assert (other.see(pictures(other)) - seen).abs().max() > 0.01
        other.towers["vision"].model = PeftModel.from_pretrained(
            other.towers["vision"].model, folder / "adapter-vision"
        ).base_model.model
        torch.testing.assert_close(other.see(pictures(other)), seen, rtol=1e-4, atol=1e-4)
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert told["use_dora"] is bool(how.get("dora")) and told["task_type"] == "CAUSAL_LM"
    add_adapters(folder / "adapter", tmp_path / "sum")
    ours, summed = (load_file(place / "model.safetensors") for place in (folder / "model", tmp_path / "sum"))
    assert ours.keys() == summed.keys()
    for name in ours:
        torch.testing.assert_close(summed[name], ours[name], rtol=1e-5, atol=1e-6)


def test_a_run_with_adapters_on_every_part_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = train_fakes.toy_set(tmp_path / "toy")
    learn = {
        "vision": {"lr": 1e-2, "lora": {"rank": 2, "dropout": 0.2}},
        "connector": {"lr": 5e-3, "lora": {"rank": 2}},
        "language": {"lr": 1e-2, "from_layer": 1, "lora": {"rank": 2, "dora": True}},
    }
    recipe = train_fakes.recipe(data, learn=learn, steps=4, save_every=2)
    whole = load_file(train(recipe, tmp_path / "whole") / "model.safetensors")

    def stop(vlm: VLM, step: int) -> dict[str, Any]:
        if step == 2 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return {}

    halted = train_fakes.recipe(data, learn=learn, steps=4, save_every=1, validate_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(halted, tmp_path / "run", validators=[stop])
    again = load_file(train(halted, tmp_path / "run") / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_connector_that_is_one_linear_layer_has_none_to_adapt() -> None:
    vlm = fakes.tiny_vlm(connector="linear")
    found = learning.faults(vlm, stage({"connector": {"lr": 1e-3, "lora": {}}}))
    assert found == ["learn.connector.lora: this part has no linear layer that learns, so none to adapt"]


def test_few_bits_are_refused_without_a_gpu_and_a_dry_run_counts_them(tmp_path: Path) -> None:
    data = train_fakes.toy_set(tmp_path / "toy")
    learn = {"language": {"lr": 1e-3, "lora": {"rank": 2, "bits": 4}}}
    recipe = train_fakes.recipe(data, learn=learn)
    with pytest.raises(EnvironmentFault, match=r"lora\.bits: 4 needs a GPU"):
        train(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("step-*"))
    (few,) = plan(recipe, ["tune"])
    (all_of_it,) = plan(train_fakes.recipe(data, learn={"language": {"lr": 1e-3, "lora": {"rank": 2}}}), ["tune"])
    layers = sum(
        module.weight.numel() for name, module in all_of_it.vlm.language.named_modules() if name.endswith("_proj")
    )
    saved = all_of_it.memory.weights - few.memory.weights
    assert saved == pytest.approx(layers * (4 - 0.5 - 1 / 128), abs=2)  # in fp32 a frozen weight has 4 bytes
    assert "on weights of 4 bits" in few.parts[2].note


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_few_bits_are_for_the_language_model(part: str) -> None:
    with pytest.raises(ValueError, match=f"learn.{part}.lora.bits: only the language"):
        stage({part: {"lr": 1e-3, "lora": {"bits": 4}}})


def test_the_rules_of_decay_differ_where_they_are_said_to() -> None:
    vlm = fakes.tiny_vlm()
    ours, trainers = RULES["matrices"](vlm), RULES["trainer"](vlm)
    assert "language.model.norm.weight" not in ours | trainers  # Llama's, of which the Trainer was told
    assert "connector.0.bias" not in ours | trainers and "connector.0.weight" in ours & trainers
    type(vlm.language.model.norm).__name__, kept = "Qwen2RMSNorm", type(vlm.language.model.norm).__name__
    try:
        assert RULES["trainer"](vlm) - trainers >= {"language.model.norm.weight"}
        assert RULES["matrices"](vlm) == ours
    finally:
        type(vlm.language.model.norm).__name__ = kept


def test_decay_goes_by_the_stage_and_by_the_part() -> None:
    learn = {"connector": {"lr": 1e-3, "weight_decay": 0.3}, "language": {"lr": 1e-3}}
    found = learning.ready(fakes.tiny_vlm(), stage(learn, weight_decay=0.1, decays="trainer"), seed=0)
    said = {one.name: one.weight_decay for one in found}
    assert said["connector.0.weight"] == 0.3 and said["connector.0.bias"] == 0.0
    assert said["language.lm_head.weight"] == 0.1 and said["language.model.norm.weight"] == 0.0


def test_only_one_of_two_towers_learns() -> None:
    eyes = [TowerRecipe(tower=str(fakes.tiny_vision_folder(seed)), name=f"eye{seed}") for seed in (0, 1)]
    vlm = build(fakes.tiny_recipe().model_copy(update={"vision": VisionRecipe(towers=eyes)}))
    other = list(vlm.towers)[1]
    found = names(vlm, {"vision": {"lr": 1e-3, "towers": [other]}})
    assert found and all(name.startswith(f"towers.{other}.") for name in found)


def test_a_name_that_no_layer_of_the_part_has_is_told_with_those_there_are() -> None:
    vlm = fakes.tiny_vlm()
    learn = {"vision": {"lr": 1e-3, "lora": {"targets": ["q_prij"]}}}
    (fault,) = learning.faults(vlm, stage(learn))
    assert fault.startswith("learn.vision.lora.targets names q_prij") and "q_proj" in fault
    with pytest.raises(RecipeError, match="q_prij"):
        lora.attach(vlm, stage(learn))
    assert begin(train_fakes.recipe(Path("none.json")), None, "cpu")


# --- few bits, by a stand-in for bitsandbytes: what it is asked for, in torch's own arithmetic ------------------------


class Params4bit(torch.nn.Parameter):
    """A weight that is rounded to sixteen numbers a row when it comes onto a device; `codes` are whole numbers."""

    def __new__(cls, data: Tensor, requires_grad: bool = False, **more: Any) -> Any:
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.__dict__ |= {"quant_state": None, "compress_statistics": more["compress_statistics"]}
        made.quant_type = more["quant_type"]  # type: ignore[attr-defined]
        return made

    def __deepcopy__(self, memo: Any) -> Any:
        told = {"compress_statistics": self.compress_statistics, "quant_type": self.quant_type}
        made = Params4bit(self.data.clone(), **told)
        made.quant_state = self.quant_state
        return made

    def to(self, *where: Any, **more: Any) -> Any:
        if self.quant_state is None:
            scale = self.data.abs().amax(1, keepdim=True) / 7
            self.data, self.quant_state = (self.data / scale).round().to(torch.int8), scale
        return self


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale


class Linear4bit(torch.nn.Linear):
    def __init__(self, inner: int, outer: int, bias: bool = True, **more: Any) -> None:
        super().__init__(inner, outer, bias, device=more["device"])
        self.compute_dtype = more["compute_dtype"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, dequantised(self.weight.data, self.weight.quant_state), self.bias)  # type: ignore[arg-type]


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import importlib.machinery
    import sys
    from types import ModuleType

    from peft import import_utils

    def forget() -> None:
        import_utils.is_bnb_available.cache_clear()
        import_utils.is_bnb_4bit_available.cache_clear()
        sys.modules.pop("peft.tuners.lora.bnb", None)

    fake, inside, arithmetic = (ModuleType(f"bitsandbytes{end}") for end in ("", ".nn", ".functional"))
    fake.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    fake.__dict__.update(nn=inside, functional=arithmetic)
    inside.__dict__.update(
        Linear4bit=Linear4bit, Params4bit=Params4bit, Linear8bitLt=type("Linear8bitLt", (torch.nn.Module,), {})
    )
    arithmetic.__dict__.update(dequantize_4bit=dequantised)
    for name, module in {"": fake, ".nn": inside, ".functional": arithmetic}.items():
        monkeypatch.setitem(sys.modules, f"bitsandbytes{name}", module)
    monkeypatch.setattr(quantised, "refuse", lambda *given: None)
    forget()
    yield
    forget()


@pytest.mark.parametrize("how", KINDS[:2], ids=["lora", "dora"])
def test_adapters_learn_on_few_bits_and_are_merged_into_what_these_say(
    how: dict[str, Any], bits: None, tmp_path: Path
) -> None:
    data = train_fakes.toy_set(tmp_path / "toy")
    learn = {"connector": {"lr": 1e-3}, "language": {"lr": 1e-2, "lora": {**how, "bits": 4}}}
    recipe = train_fakes.recipe(data, learn=learn, steps=3)
    kept: list[str] = []

    def look(vlm: VLM, step: int) -> dict[str, Any]:
        kept.extend(name for name, module in vlm.language.named_modules() if type(module) is Linear4bit)
        return {}

    made = load_file(train(recipe, tmp_path / "run", validators=[look]) / "model.safetensors")
    assert len(kept) == 14 and all(".layers." in name for name in kept)  # neither the output layer nor the embeddings
    base = begin(recipe, None, "cpu").state_dict()
    adapters = load_file(tmp_path / "run" / "tune" / "adapter" / "adapter_model.safetensors")
    for name in kept:
        name = name.removesuffix(".base_layer")
        own = base[f"language.{name}.weight"]
        scale = own.abs().amax(1, keepdim=True) / 7
        due = ((own / scale).round() * scale).bfloat16().float()
        of = {key.rpartition(f"{name}.")[2]: value for key, value in adapters.items() if f".{name}." in key}
        due = due + 2 * of["lora_B.weight"] @ of["lora_A.weight"]
        if how.get("dora"):
            due *= (of["lora_magnitude_vector"] / torch.linalg.vector_norm(due, dim=1))[:, None]
        torch.testing.assert_close(made[f"language.{name}.weight"].float(), due, rtol=2e-2, atol=1e-3)
    assert torch.equal(made["language.model.embed_tokens.weight"], base["language.model.embed_tokens.weight"])


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_the_few_bits_of_bitsandbytes(
    bits: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same by the package itself, where it is installed; on a GPU where there is one, else on its CPU code."""
    bnb = pytest.importorskip("bitsandbytes", reason="pip install 'leveret[quant]'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(quantised, "refuse", lambda *given: None)
    learn = {"connector": {"lr": 1e-3}, "language": {"lr": 1e-2, "lora": {"rank": 4, "alpha": 8, "bits": bits}}}
    recipe = train_fakes.recipe(train_fakes.toy_set(tmp_path / "toy"), learn=learn, steps=3)
    recipe = recipe.model_copy(update={"device": device})
    made = load_file(train(recipe, tmp_path / "run") / "model.safetensors")
    base = begin(recipe, None, "cpu").state_dict()
    adapters = load_file(tmp_path / "run" / "tune" / "adapter" / "adapter_model.safetensors")
    layers = [name.removesuffix(".lora_A.weight") for name in adapters if name.endswith(".lora_A.weight")]
    assert len(layers) == 14
    for layer in layers:
        name = f"language.{layer.removeprefix('base_model.model.')}.weight"
        if bits == 4:
            codes, state = bnb.functional.quantize_4bit(
                base[name].to(device), quant_type="nf4", compress_statistics=True
            )
            kept = bnb.functional.dequantize_4bit(codes, state).cpu()
        else:
            scale = base[name].half().float().abs().amax(1, keepdim=True) / 127
            kept = (base[name] / scale).round() * scale
        added = 2 * adapters[f"{layer}.lora_B.weight"] @ adapters[f"{layer}.lora_A.weight"]
        assert (kept - base[name]).abs().max() > 0 and added.abs().max() > 0
        torch.testing.assert_close(made[name].float(), kept + added, rtol=2e-2, atol=2e-2)
