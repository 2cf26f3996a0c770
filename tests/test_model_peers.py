"""Models that others wrote: recognised by their contents, and computing what the tools that wrote them computed."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import leveret
from fakes import tiny_tokenizer
from language_fakes import toy_vlm
from leveret.cli import explain, run
from leveret.inputs.resize import prepare
from leveret.model import checkpoint, peers
from leveret.model.peers.files import Folder
from leveret.model.peers.write import write
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch
from leveret.runs import DataError, EnvironmentFault, RecipeError

PARITY = Path(os.environ.get("LEVERET_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))
FAMILIES = sorted(
    folder.name for folder in (PARITY.iterdir() if PARITY.is_dir() else ())
    if (folder / "cases.json").is_file() and any(folder.glob("checkpoint*"))
)  # fmt: skip
CLOSE = 1e-5
"""What features and logits may differ by. At most 3.6e-6 is seen; a wrong epsilon in a tower's norms moves a family's
features or logits by 2e-5 or more, in a connector's or a language model's by 1.2e-5 (but MiniCPM's, by 4e-6)."""
MISSING = pytest.mark.skipif(not FAMILIES, reason=f"no parity data in {PARITY}; LEVERET_PARITY names another place")


def size_of(meta: dict[str, Any]) -> int | None:
    """Prismatic's towers were made smaller than their ids say."""
    return meta.get("default_image_size")


def row_of(vlm: VLM, case: dict[str, Any], pixels: dict[str, torch.Tensor], prismatic: bool) -> Batch:
    """One row: the case's ids, with -200 (Prismatic: the place after the first token) opened to the image's tokens."""
    ids = list(case["input_ids"])
    if prismatic and pixels:
        ids[1:1] = [-200]
    ids = [i for i in ids for i in ([-200] * vlm.spec.tokens if i == -200 else [i])]
    row = torch.tensor([ids])
    marks = row == -200
    return Batch(
        input_ids=row.masked_fill(marks, 0),
        labels=torch.full_like(row, IGNORE),
        attention_mask=torch.ones_like(marks),
        position_ids=torch.arange(len(ids))[None],
        segments=torch.zeros_like(row),
        image_mask=marks,
        pixels=pixels,
        tile_image=torch.arange(1 if pixels else 0),
    )


def pixels_of(vlm: VLM, case: dict[str, Any], arrays: Any) -> dict[str, torch.Tensor]:
    """What each tower sees, from the stored arrays: one key, or one for each tower in their order."""
    said = case.get("pixel_values")
    if not said:
        return {}
    names = [view.name for view in vlm.spec.towers]
    if isinstance(said, str):
        said = [said] * len(names)
    elif isinstance(said, dict):
        said = list(said.values())
    return {name: torch.from_numpy(arrays[key])[None] for name, key in zip(names, said, strict=True)}


def close(found: torch.Tensor, expected: np.ndarray, most: float, what: str) -> None:
    assert tuple(found.shape) == expected.shape, f"{what}: {tuple(found.shape)} for {expected.shape}"
    worst = float(np.abs(found.float().numpy() - expected).max())
    assert worst <= most, f"{what}: {worst:.2e}"


@MISSING
@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_a_peers_model_computes_what_its_own_code_computed(family: str) -> None:
    folder = PARITY / family
    said = json.loads((folder / "cases.json").read_text())
    loaded: dict[tuple[str, ...], VLM] = {}
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays, torch.no_grad():
        for case in said["cases"]:
            key = (case.get("checkpoint") or next(folder.glob("checkpoint*")).name, case.get("base") or "")
            if key not in loaded:
                base = folder / key[1] if key[1] and (folder / key[1]).exists() else key[1] or None
                told: dict[str, Any] = {"hub": folder / "hub", "base": str(base) if base else None}
                told |= {"size": size_of(said["meta"]), "dtype": torch.float32}
                loaded[key] = peers.load(folder / key[0], **told)
            check(loaded[key], case, arrays, said["meta"])
            if case.get("image"):
                seen_as_the_original(loaded[key], case, arrays, folder)


def seen_as_the_original(vlm: VLM, case: dict[str, Any], arrays: Any, folder: Path) -> None:
    """What the model's own views make of the image is what the original's processor made."""
    expected = pixels_of(vlm, case, arrays)
    with Image.open(folder / "images" / Path(case["image"]).name) as image:
        for view in vlm.spec.towers:
            close(torch.from_numpy(prepare(image.convert("RGB"), view)), expected[view.name][0].numpy(), 1e-6, "pixels")


def check(vlm: VLM, case: dict[str, Any], arrays: Any, meta: dict[str, Any]) -> None:
    pixels = pixels_of(vlm, case, arrays)
    if pixels:
        features = vlm.see(pixels)
        if isinstance(case.get("tower_features"), str):
            close(features[0], arrays[case["tower_features"]], CLOSE, "tower features")
        close(vlm.connector(features)[0], arrays[case["projected_features"]], CLOSE, "projected features")
    batch = row_of(vlm, case, pixels, prismatic=meta["system"].startswith("prismatic"))
    columns = meta.get("logits_columns") or arrays[case["logits"]].shape[1]
    first = case["logits_first_row"]
    logits = vlm(batch, logits="all").logits[0]
    assert len(logits) == case["logits_rows_total"]
    close(logits[first:, :columns], arrays[case["logits"]][:, :columns], CLOSE, "logits")
    if end := len(case.get("greedy_ids", ())):
        vlm.language.generation_config.eos_token_id = None  # what is stored ends with the end token
        found = vlm.generate(batch, do_sample=False, max_new_tokens=end, pad_token_id=0)
        assert found[0].tolist() == case["greedy_ids"]


@MISSING
@pytest.mark.parity
@pytest.mark.parametrize("part", ["towers", "language"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("tinyllava") or "lora" in name])
def test_a_wrong_epsilon_would_be_seen(family: str, part: str) -> None:
    """The check above can fail: norms with another epsilon than published do not pass it."""
    folder = PARITY / family
    said = json.loads((folder / "cases.json").read_text())
    case = next(case for case in said["cases"] if case.get("image"))
    vlm = peers.load(
        folder / (case.get("checkpoint") or next(folder.glob("checkpoint*")).name), hub=folder / "hub",
        base=str(folder / case["base"]) if case.get("base") else None, dtype=torch.float32,
    )  # fmt: skip
    changed = 0
    for module in getattr(vlm, part).modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(told := getattr(module, name, None), float):
                setattr(module, name, 1e-6 if abs(told - 1e-5) < 1e-9 else 1e-5)
                changed += 1
    assert changed
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays, torch.no_grad():
        with pytest.raises(AssertionError, match=r"tower features|projected features|logits"):
            check(vlm, case, arrays, said["meta"])


# --- what a user meets, on folders made here --------------------------------------------------------------------------


def bunny(place: Path) -> tuple[Path, Path]:
    """(checkpoint, hub): a tiny Bunny as its tool saves it, with random weights, and the tower it names on the hub."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    told = Qwen2Config(**small, num_key_value_heads=2, vocab_size=len(tokenizer) + 7, tie_word_embeddings=False)
    tower = SiglipVisionModel(SiglipVisionConfig(**{**small, "hidden_size": 16}, image_size=28, patch_size=14))
    hub, folder = place / "hub", place / "bunny"
    tower.save_pretrained(hub / "google/siglip-so400m-patch14-384")
    state = {name: x.clone() for name, x in Qwen2ForCausalLM(told).state_dict().items()}
    state |= {f"model.mm_projector.{n}.{kind}": torch.randn(32, *([16 if n == 0 else 32] if kind == "weight" else []))
              for n in (0, 2) for kind in ("weight", "bias")}  # fmt: skip
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    said = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_projector_type": "mlp2x_gelu"}
    said |= {"image_aspect_ratio": "pad", "unfreeze_vision_tower": False, "model_type": "bunny-qwen2"}
    (folder / "config.json").write_text(json.dumps(told.to_dict() | said))
    return folder, hub


def test_convert_writes_a_model_that_chat_and_eval_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, hub = bunny(tmp_path)
    assert run(["convert", str(folder), str(tmp_path / "ours"), "--hub", str(hub), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["chat"] == "bunny" and said["image_tokens"] == 4 and "Bunny" in said["kind"]
    ours, theirs = checkpoint.load(tmp_path / "ours"), peers.load(folder, hub=hub)
    assert ours.language.get_input_embeddings().weight.shape[0] == len(ours.tokenizer)  # as Bunny cuts it
    pixels = {"vision": torch.randn(1, 3, 28, 28)}
    batch = row_of(ours, {"input_ids": [5, -200, 7, 8]}, pixels, prismatic=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch, logits="all").logits, theirs(batch, logits="all").logits)
    text = (tmp_path / "ours/config.json").read_text()
    assert "google/siglip-so400m-patch14-384" in text and str(tmp_path) not in text  # no path of this machine
    assert ours.recipe.vision.resize == "pad"
    # As it was saved, in halves too, it answers on a CPU.
    assert run(["convert", str(folder), str(tmp_path / "halves"), "--hub", str(hub), "--dtype", "float16"]) == 0
    assert checkpoint.load(tmp_path / "halves").dtype == torch.float16
    picture = tmp_path / "p.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert isinstance(leveret.load(tmp_path / "halves").ask(picture, "What is this?", max_new_tokens=3), str)
    assert run(["convert", str(folder), str(folder / "inside"), "--hub", str(hub)]) == 2


class _Evil:
    """What reading would run: it leaves a folder at `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("nowhere", "there is no such folder"),
        ("no config", "no config.json that says what it is"),
        ("another tool", "model_type 'gpt9'.*asks for code"),
        ("not JSON", "not JSON"),
        ("cut short", "damaged or cut short"),
        ("code", "holds more than tensors"),
        ("a shard away", "lists model-2.safetensors, which is not there"),
        ("a shard outside", "outside its folder"),
        ("a tensor away", "missing: connector.2.bias"),
        ("a tensor too many", "unexpected: language.model.layers.9.x"),
        ("another connector", "'mlp0x_gelu' is not known"),
        ("tiles", "LLaVA 1.6"),
        ("no tower", "is not on this machine|could not be read|is not known"),
        ("openelm", "differ in heads and width"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    harm: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    folder, hub = bunny(tmp_path)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    changes: dict[str, dict[str, Any]] = {
        "another tool": {"model_type": "gpt9", "auto_map": {"AutoModel": "x.Y"}, "mm_vision_tower": None},
        "another connector": {"mm_projector_type": "mlp0x_gelu"},
        "tiles": {"image_aspect_ratio": "anyres"},
        "no tower": {"mm_vision_tower": "someone/else"},
    }
    if harm in changes:
        config |= changes[harm]
        config = {name: value for name, value in config.items() if value is not None}
    if harm == "a tensor away":
        del weights["model.mm_projector.2.bias"]
    if harm == "a tensor too many":
        weights["model.layers.9.x"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if harm == "openelm":
        for part in ("language_model", "vision_tower", "connector"):
            (folder / part).mkdir()
        text = {"model_type": "tinyllava", "connector_type": "linear", "text_config": {"model_type": "openelm"}}
        (folder / "config.json").write_text(json.dumps(text))
        named = {"language_model.model.embed_tokens.weight": weights["model.embed_tokens.weight"]}
        save_file(named, folder / "model.safetensors")
    if harm == "another tool":
        (folder / "x.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'was here')!r})\nclass Y: ...\n")
    if harm == "no config":
        (folder / "config.json").unlink()
    if harm == "not JSON":
        (folder / "config.json").write_text("{")
    if harm == "cut short":
        os.truncate(folder / "model.safetensors", 900)
    if harm in ("code", "a shard away", "a shard outside"):
        (folder / "model.safetensors").unlink()
    if harm == "code":
        torch.save({"model.embed_tokens.weight": _Evil(tmp_path / "was here")}, folder / "pytorch_model.bin")
    if harm.startswith("a shard"):
        name = "../model-2.safetensors" if harm == "a shard outside" else "model-2.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    place = tmp_path / "nothing" if harm == "nowhere" else folder
    with pytest.raises((DataError, EnvironmentFault), match=said) as caught:
        peers.load(place, hub=hub)
    assert not (tmp_path / "was here").exists()
    assert explain(caught.value)[0] in (2, 3, 5)
    capsys.readouterr()
    assert run(["convert", str(place), str(tmp_path / "out"), "--hub", str(hub)]) == explain(caught.value)[0]
    said_there = capsys.readouterr()
    first, *listed = said_there.err.strip().splitlines()
    assert first.startswith("error: ") and "Traceback" not in said_there.err
    assert bool(listed) == harm.startswith("a tensor") and all(line.startswith("  ") for line in listed)
    assert not said_there.out and not (tmp_path / "out").exists() and not (tmp_path / "was here").exists()


@pytest.mark.parametrize("model_type", ["bunny-qwen2", "llava_qwen2"])
def test_code_that_a_known_model_brings_is_not_run(model_type: str, tmp_path: Path) -> None:
    """Published Bunnys name code in config.json, some tokenizers in theirs: what is known is read without it."""
    folder, hub = bunny(tmp_path)
    (folder / "x.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'was here')!r})\nclass Y: ...\n")
    brought = {"config.json": ("AutoConfig", "AutoModelForCausalLM"), "tokenizer_config.json": ("AutoTokenizer",)}
    for file, classes in brought.items():
        told = json.loads((folder / file).read_text())
        one: Any = [None, "x.Y"] if file.startswith("tokenizer") else "x.Y"
        told |= {"auto_map": dict.fromkeys(classes, one)}
        told |= {"model_type": model_type} if file == "config.json" else {}
        (folder / file).write_text(json.dumps(told))
    try:
        assert peers.load(folder, hub=hub).spec.tokens == 4
    except (DataError, EnvironmentFault) as fault:
        assert "\n" not in str(fault) and "code" in str(fault)
    assert not (tmp_path / "was here").exists()


def test_a_number_written_as_text_is_the_config_s_fault_and_not_the_network_s() -> None:
    from transformers import LlamaConfig

    with pytest.raises(Exception, match="hidden_size") as caught:
        LlamaConfig(hidden_size="64")
    told = explain(caught.value)
    assert told is not None and told[0] == 3 and "config.json" in told[1] and "expected int, got str" in told[1]


def test_adapters_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from leveret.model.peers.files import merge_adapters

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(**small, num_key_value_heads=2, vocab_size=64))
    base = {name: x.clone() for name, x in model.state_dict().items()}
    for more in (
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    ):
        settings = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **more
        )
        adapted = get_peft_model(model, settings)
        adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
        told = json.loads((tmp_path / "a/adapter_config.json").read_text())
        from safetensors.torch import load_file

        adapters = load_file(tmp_path / "a/adapter_model.safetensors")
        found = merge_adapters(base, adapters, told, "base_model.model.")
        model = adapted.merge_and_unload()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
        model.load_state_dict(base)
    with pytest.raises(DataError, match="made for another model"):
        merge_adapters({}, adapters, told, "base_model.model.")


# --- the way back -----------------------------------------------------------------------------------------------------


def written_by(system: str) -> list[str]:
    """Families that a system wrote, as their cases say, whatever the folders are called."""
    return [
        name for name in FAMILIES if json.loads((PARITY / name / "cases.json").read_text())["meta"]["system"] == system
    ]


ROUND = {  # layout -> families whose models it can hold
    "bunny": written_by("Bunny"),
    "llava": written_by("LLaVA"),
    "tinyllava": written_by("TinyLLaVA_Factory"),
    "prismatic": written_by("prismatic-vlms"),
}


PLAIN = ("bunny-llama3-siglip", "bunny-qwen1.5-siglip", "bunny-stablelm2-siglip", "bunny-phi2-siglip",
         "llava1.5-vicuna-clip")  # fmt: skip
"""Families that transformers' LLaVA can hold; of others the writing says why it cannot, or it is tried on them too."""
OTHERS = [name for name in FAMILIES if name not in PLAIN]


def opened(family: str) -> tuple[VLM, Path]:
    folder = PARITY / family
    return peers.load(next(folder.glob("checkpoint*")), hub=folder / "hub", dtype=torch.float32), folder


def some_batch(vlm: VLM) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = {view.name: torch.randn(1, 3, view.size, view.size, generator=generator) for view in vlm.spec.towers}
    return row_of(vlm, {"input_ids": [5, 9, -200, 7, 8, 11]}, pixels, prismatic=False)


@MISSING
@pytest.mark.parity
@pytest.mark.parametrize(("layout", "family"), [(to, name) for to, names in ROUND.items() for name in names])
def test_there_and_back_is_the_same_model(layout: str, family: str, tmp_path: Path) -> None:
    vlm, folder = opened(family)
    batch = some_batch(vlm)
    with torch.no_grad():
        expected = vlm(batch, logits="all").logits
        write(vlm, tmp_path / "theirs", layout)
        again = peers.load(tmp_path / "theirs", hub=folder / "hub", dtype=torch.float32)
        close(again(batch, logits="all").logits, expected.numpy(), 1e-5, "logits")
    assert {name for name, _ in checkpoint.stored(again)} == {name for name, _ in checkpoint.stored(vlm)}
    whole = [Folder(place) for place in (next(folder.glob("checkpoint*")), tmp_path / "theirs")]
    if all(any(one.has(name) for name in ("model.safetensors", "pytorch_model.bin")) for one in whole):
        source, ours = ({name: x.shape for name, x in one.state().items()} for one in whole)
        spare = source.keys() - ours.keys()
        # parts of a tower that do not run, where the checkpoint's own tower is one that nobody reads
        idle = not (whole[0].config.get("unfreeze_vision_tower") or layout == "tinyllava")
        assert not spare or (idle and all(name.startswith("model.vision_tower.") for name in spare)), sorted(spare)
        assert not ours.keys() - source.keys()
        # token tables are cut to the tokenizer; the toy's BERT has fewer places than bert-base, whose are written
        tables = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias", "bert.embeddings.position_ids")
        assert all(shape == source[name] for name, shape in ours.items() if not name.endswith(tables))


def test_a_gemma_of_the_factory_scales_images_as_its_transformers_did(tmp_path: Path) -> None:
    """transformers 4.40 (GemmaModel.forward) multiplied all that came in by the root of the width, images too."""
    from safetensors.torch import load_file

    vlm = toy_vlm("google/gemma-2b-it")
    batch = some_batch(vlm)
    write(vlm, tmp_path / "theirs", "tinyllava")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    with torch.no_grad():
        expected = vlm(batch, logits="all").logits
        layers = [theirs[f"connector._connector.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(vlm.see(batch.pixels), *layers[:2]))
        seen = torch.nn.functional.linear(hidden, *layers[2:])
        given = theirs["language_model.model.embed_tokens.weight"][batch.input_ids]
        given = given.masked_scatter(batch.image_mask[..., None], seen) * given.shape[-1] ** 0.5
        close(vlm.language(inputs_embeds=given).logits, expected.numpy(), 1e-5, "as the Factory computed")
        again = peers.load(tmp_path / "theirs", dtype=torch.float32)
        close(again(batch, logits="all").logits, expected.numpy(), 1e-5, "read again")


@MISSING
@pytest.mark.parity
@pytest.mark.parametrize("family", ROUND["prismatic"])
def test_prismatics_pickle_can_be_made_as_the_docs_say(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, folder = opened(family)
    write(vlm, tmp_path / "theirs", "prismatic")
    docs = (Path(__file__).parents[1] / "docs/peers.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path / "theirs")
    exec(docs.split("```python\n")[1].split("```")[0], {})
    made, source = (
        torch.load(place / "checkpoints/latest-checkpoint.pt", weights_only=True)["model"]
        for place in (tmp_path / "theirs", next(folder.glob("checkpoint*")))
    )
    assert {part: set(names) for part, names in made.items()} == {part: set(names) for part, names in source.items()}
    (tmp_path / "theirs/checkpoints/latest-checkpoint.safetensors").unlink()
    again = peers.load(tmp_path / "theirs", hub=folder / "hub", dtype=torch.float32)
    with torch.no_grad():
        batch = some_batch(vlm)
        close(again(batch, logits="all").logits, vlm(batch, logits="all").logits.numpy(), 1e-5, "logits")


@MISSING
@pytest.mark.parity
@pytest.mark.parametrize("family", OTHERS)
def test_what_transformers_own_llava_cannot_hold_is_refused_by_name(family: str, tmp_path: Path) -> None:
    """The other families: a part is named, or it holds the model after all and then computes the same."""
    vlm, _ = opened(family)
    try:
        write(vlm, tmp_path / "hf", "hf-llava")
    except RecipeError as fault:
        assert str(fault).startswith("HF LLaVA") and "\n" not in str(fault)
        assert not (tmp_path / "hf").exists()
        return
    held_by_transformers(vlm, tmp_path / "hf")


@MISSING
@pytest.mark.parity
@pytest.mark.parametrize("family", [name for name in FAMILIES if name in PLAIN])
def test_transformers_own_llava_computes_the_same(family: str, tmp_path: Path) -> None:
    vlm, _ = opened(family)
    write(vlm, tmp_path / "hf", "hf-llava")
    held_by_transformers(vlm, tmp_path / "hf")


def held_by_transformers(vlm: VLM, folder: Path) -> None:
    """transformers' own class reads the folder and gives the model's logits."""
    from transformers import LlavaForConditionalGeneration

    batch = some_batch(vlm)
    rows = vlm.language.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        expected = vlm(batch, logits="all").logits[0]
        theirs, report = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        ids = batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id)
        found = theirs.eval()(input_ids=ids, pixel_values=batch.pixels["vision"]).logits[0]
    close(found[:, :rows], expected.numpy(), 1e-5, "logits")
    text = json.loads((folder / "config.json").read_text())
    assert "architectures" in text["text_config"] and "architectures" not in text["vision_config"]


def test_what_a_layout_cannot_hold_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, hub = bunny(tmp_path)
    ours = tmp_path / "ours"
    assert run(["convert", str(folder), str(ours), "--hub", str(hub)]) == 0
    for to in ("hf-llava", "bunny", "tinyllava", "llava"):
        assert run(["convert", str(ours), str(tmp_path / to), "--to", to]) == 0, to
    assert run(["convert", str(ours), str(tmp_path / "p"), "--to", "prismatic"]) == 2
    assert "Prismatic has no vision backbone" in capsys.readouterr().err
    for wrong, said in (("lava", "did you mean llava"), ("leveret", "is a model of ours already")):
        capsys.readouterr()
        assert run(["convert", str(ours), str(tmp_path / "x"), "--to", wrong]) == 2
        assert said in capsys.readouterr().err
    vlm = checkpoint.load(ours)
    tower, connector = vlm.towers["vision"], vlm.recipe.connector
    vlm.recipe = vlm.recipe.model_copy(update={"connector": connector.model_copy(update={"kind": "resampler"})})
    for to in ("hf-llava", "bunny", "llava"):
        with pytest.raises(RecipeError, match="resampler"):
            write(vlm, tmp_path / "y", to)
    vlm.recipe = vlm.recipe.model_copy(update={"connector": connector})
    tower.facts = replace(tower.facts, tokens="drop_first")
    for to in ("hf-llava", "bunny", "llava"):
        with pytest.raises(RecipeError, match="without the first"):
            write(vlm, tmp_path / "y", to)
    assert not (tmp_path / "y").exists()
