"""GGUF files: what they hold is computed here again from the files alone, by graphs written after llama.cpp's, and must
be what the model computes. Where llama.cpp itself is at hand (`pip install cyllama`), it runs them too."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import test_model_peers as peers_tests
from fakes import LLAMA, SIGLIP, loud, tiny_tokenizer, tiny_vlm
from leveret.cli import run
from leveret.inputs.formats import CHATS
from leveret.model import checkpoint
from leveret.model.build import build
from leveret.model.peers.gguf_language import FAMILIES, language
from leveret.model.peers.gguf_tokenizer import chat_template, vocabulary
from leveret.model.peers.write import write
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch
from leveret.runs import EnvironmentFault, RecipeError

gguf = pytest.importorskip("gguf", reason="pip install 'leveret[gguf]'")

DEEP = {**LLAMA, "num_hidden_layers": 4}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GRANITE = {
    "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("Llama", {"head_dim": 16}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA_3}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "granite": ("Granite", GRANITE),
    "smollm3": ("SmolLM3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {"sliding_window": 128}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
}
HERE = [name for name in MODELS if name.startswith(("llama", "mistral", "qwen"))]  # those that this file computes


@cache
def language_model(name: str) -> Any:
    import transformers

    kind, more = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = loud(getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**DEEP | more)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases of their own
    return model.eval()


def model_of(
    place: Path, name: str = "llama", tower: str = "siglip", connector: str = "mlp2x_gelu", **vision: Any
) -> VLM:
    """A model of a tower, a connector and a row of MODELS, all drawn at random."""
    import transformers

    language_model(name).save_pretrained(place / "language")
    tiny_tokenizer().save_pretrained(place / "language")
    kind = {"siglip": "Siglip", "clip": "CLIP"}[tower]
    torch.manual_seed(1)
    eye = loud(getattr(transformers, f"{kind}VisionModel")(getattr(transformers, f"{kind}VisionConfig")(**SIGLIP)))
    eye.save_pretrained(place / "tower")
    recipe = ModelRecipe(
        vision=VisionRecipe(tower=str(place / "tower"), **vision),
        connector=ConnectorRecipe(kind=connector),
        language=LanguageRecipe(name=str(place / "language")),
        chat="tiny",
    )
    vlm = build(recipe, seed=0)
    loud(vlm.connector, 0.3)
    return vlm


class File:
    """A GGUF file: `file["key"]`, and `file.tensors[name]` as float32 in torch's order of dimensions."""

    def __init__(self, path: Path) -> None:
        self.reader = gguf.GGUFReader(path)
        self.types = {tensor.name: tensor.tensor_type.name for tensor in self.reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in self.reader.tensors
        }
        self.arch = self["general.architecture"]

    def __getitem__(self, key: str) -> Any:
        return self.reader.get_field(key.replace("*", getattr(self, "arch", "")).strip()).contents()

    def __contains__(self, key: str) -> bool:
        return self.reader.get_field(key) is not None


# --- llama.cpp's graphs, from the files alone -------------------------------------------------------------------------


def rope(x: Tensor, file: File) -> Tensor:
    """x [T, heads, n]. Architectures "llama" turn neighbours (ggml's NORM), the others halves (NEOX)."""
    turned, base = file["*.rope.dimension_count"], file["*.rope.freq_base"]
    angle = torch.arange(len(x))[:, None] * base ** -(torch.arange(0, turned, 2) / turned)
    angle = angle / file.tensors.get("rope_freqs.weight", torch.ones(1))
    if "llama.rope.scaling.factor" in file:
        angle = angle / file["llama.rope.scaling.factor"]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    near = file.arch == "llama"
    a, b = (x[..., 0:turned:2], x[..., 1:turned:2]) if near else (x[..., : turned // 2], x[..., turned // 2 : turned])
    a, b = a * cos - b * sin, a * sin + b * cos
    return torch.cat([torch.stack([a, b], -1).flatten(-2) if near else torch.cat([a, b], -1), x[..., turned:]], -1)


def logits_of(file: File, ids: list[int]) -> Tensor:
    """llama.cpp's llama, qwen2 and qwen3 (src/models): [T, V]."""
    eps, heads, groups = (file[f"*.attention.{n}"] for n in ("layer_norm_rms_epsilon", "head_count", "head_count_kv"))
    wide = file["*.attention.key_length"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * file.tensors[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, file.tensors[f"{name}.weight"], file.tensors.get(f"{name}.bias"))

    x = file.tensors["token_embd.weight"][ids]
    ahead = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for n in range(file["*.block_count"]):
        y = norm(x, f"blk.{n}.attn_norm")
        q, k, v = (linear(y, f"blk.{n}.attn_{name}").unflatten(-1, (-1, wide)) for name in "qkv")
        if f"blk.{n}.attn_q_norm.weight" in file.tensors:
            q, k = norm(q, f"blk.{n}.attn_q_norm"), norm(k, f"blk.{n}.attn_k_norm")
        q, k, v = rope(q, file), *(z.repeat_interleave(heads // groups, 1) for z in (rope(k, file), v))
        weights = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(wide) + ahead).softmax(-1)
        x = x + linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), f"blk.{n}.attn_output")
        y = norm(x, f"blk.{n}.ffn_norm")
        x = x + linear(F.silu(linear(y, f"blk.{n}.ffn_gate")) * linear(y, f"blk.{n}.ffn_up"), f"blk.{n}.ffn_down")
    head = "output" if "output.weight" in file.tensors else "token_embd"
    return linear(norm(x, "output_norm"), head)


def features_of(file: File, pixels: Tensor, *, shifted: bool = False) -> Tensor:
    """libmtmd's llava graph with the projector `mlp`: pixels [3, S, S] -> [tokens, D]. Its GELU is the tanh
    approximation; here the connector's is exact, so that what is compared is the file.

    shifted  as builds do that put the class token behind the patches (issue 25814).
    """
    eps, heads = file["clip.vision.attention.layer_norm_epsilon"], file["clip.vision.attention.head_count"]
    quick = "clip.use_gelu" not in file
    tensors = file.tensors

    def both(name: str) -> tuple[Tensor, Tensor]:
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *both(name), eps)

    x = F.conv2d(
        pixels[None],
        tensors["v.patch_embd.weight"],
        tensors.get("v.patch_embd.bias"),
        stride=file["clip.vision.patch_size"],
    )
    x = x.flatten(2)[0].T
    first = "v.class_embd" in tensors
    if first:
        parts = [tensors["v.class_embd"][None], x]
        x = torch.cat(parts[::-1] if shifted else parts)
    x = x + tensors["v.position_embd.weight"]
    if first:
        x = norm(x, "v.pre_ln")
    last = file["clip.vision.feature_layer"]
    for n in range(last[-1] if isinstance(last, list) else last):
        y = norm(x, f"v.blk.{n}.ln1")
        q, k, v = (
            F.linear(y, *both(f"v.blk.{n}.attn_{name}")).unflatten(-1, (heads, -1)).transpose(0, 1) for name in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = x + F.linear(y, *both(f"v.blk.{n}.attn_out"))
        y = F.linear(norm(x, f"v.blk.{n}.ln2"), *both(f"v.blk.{n}.ffn_up"))
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y, approximate="tanh")
        x = x + F.linear(y, *both(f"v.blk.{n}.ffn_down"))
    x = x[int(first) :]
    return F.linear(F.gelu(F.linear(x, *both("mm.0"))), *both("mm.2"))


IDS = torch.randint(5, 300, (20,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("name", HERE)
def test_the_file_of_the_language_model_computes_its_logits(name: str, tmp_path: Path) -> None:
    vlm = model_of(tmp_path, name)
    write(vlm, tmp_path / "out", "gguf")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["mmproj.gguf", "model.gguf"]
    file = File(tmp_path / "out/model.gguf")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(file, IDS), vlm.language(torch.tensor([IDS])).logits[0], atol=1e-4, rtol=0)
    assert file["*.context_length"] == (64 if name == "mistral" else 512)


@pytest.mark.parametrize(
    ("tower", "vision"),
    [
        ("siglip", {}),
        ("siglip", {"layer": -1}),
        ("siglip", {"size": 64, "layer": -3}),
        ("siglip", {"keep": ["layers", "norm"]}),
        ("clip", {}),
        ("clip", {"size": 64}),
        ("clip", {"tokens": "drop_first"}),
    ],
)
def test_the_mmproj_computes_the_tower_and_the_connector(tower: str, vision: dict[str, Any], tmp_path: Path) -> None:
    vlm = model_of(tmp_path, tower=tower, **vision)
    notes = write(vlm, tmp_path / "out", "gguf")
    file = File(tmp_path / "out/mmproj.gguf")
    view = vlm.spec.towers[0]
    pixels = torch.randn(3, view.size, view.size)
    with torch.no_grad():
        expected = vlm.connector(vlm.see({view.name: pixels[None]}))[0]
        torch.testing.assert_close(features_of(file, pixels), expected, atol=1e-4, rtol=0)
    assert file["clip.vision.image_size"] == view.size and file["clip.projector_type"] == "mlp"
    np.testing.assert_allclose(file["clip.vision.image_mean"], view.mean, atol=1e-7)
    assert ("issue 25814" in " ".join(notes)) == (tower == "clip")


def test_images_are_scaled_beforehand_where_the_graph_scales_them(tmp_path: Path) -> None:
    vlm = model_of(tmp_path, "gemma")
    write(vlm, tmp_path / "out", "gguf")
    pixels = torch.randn(3, 32, 32)
    with torch.no_grad():
        expected = vlm.connector(vlm.see({"vision": pixels[None]}))[0]
    found = features_of(File(tmp_path / "out/mmproj.gguf"), pixels) * math.sqrt(DEEP["hidden_size"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_convert_writes_every_type(dtype: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vlm = tiny_vlm()
    checkpoint.save(vlm, tmp_path / "ours")
    out = tmp_path / "theirs"
    assert run(["convert", str(tmp_path / "ours"), str(out), "--to", "gguf", "--dtype", dtype, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["to"] == "gguf" and any("GELU" in note for note in said["notes"])
    words, eyes = File(out / "model.gguf"), File(out / "mmproj.gguf")
    full = re.compile(r".*(_norm\.weight|\.bias|position_embd\.weight|ln\d\.weight)$")
    patch = "F32" if name == "BF16" else name
    for file in (words, eyes):
        for tensor, kind in file.types.items():
            assert kind == ("F32" if full.match(tensor) else patch if "patch_embd" in tensor else name), tensor
    table = vlm.cast(getattr(torch, dtype)).language.get_input_embeddings().weight
    assert torch.equal(words.tensors["token_embd.weight"], table.float())
    assert words["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[name]


# --- tokenizers -------------------------------------------------------------------------------------------------------

_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
THEIRS = {  # llama.cpp's src/llama-vocab.cpp: name -> what it splits by, one after the other
    "gpt-2": [_GPT_2],
    "smollm": [r"\p{N}", _GPT_2],
    "qwen2": [_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST],
    "smaug-bpe": [_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST],
    "llama-bpe": [_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST],
}
_PUBLISHED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER" + _REST


@cache
def split_as(name: str) -> Any:
    """The tiny tokenizer, splitting as the published one of that name does."""
    import copy

    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shared = copy.deepcopy(tiny_tokenizer())
    state = json.loads(shared.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = name == "llama-bpe"
    own = Tokenizer.from_str(json.dumps(state))
    words = _PUBLISHED.replace("NUMBER", "" if name == "qwen2" else "{1,3}")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    steps = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    first = steps.get(name, [pre_tokenizers.Split(Regex(words), "isolated")])
    own.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_]) if first else bytes_
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<|pad|>", eos_token="<|end|>")


@cache
def read_back(name: str) -> Any:
    """A BPE of what is written of `split_as(name)`, splitting as llama.cpp does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    keys = vocabulary(split_as(name), CHATS["tiny"], 320).keys
    assert (keys["tokenizer_model"], keys["tokenizer_pre"]) == ("gpt2", name)
    vocab = {text: place for place, text in enumerate(keys["token_list"])}
    merges = [tuple(pair.split(" ")) for pair in keys["token_merges"]]
    own = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in THEIRS[name]]
    own.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return own


TEXTS = st.text(st.sampled_from("ab redsquare Blue'sLL 0123456789.,!?\n\t\r  é한🚀") | st.characters(codec="utf-8"))
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", THEIRS)
@QUIET
@given(text=TEXTS)
def test_byte_level_bpe_splits_text_alike(name: str, text: str) -> None:
    assert read_back(name).encode(text).ids == split_as(name).backend_tokenizer.encode(text).ids


@cache
def pieces(kind: str = "metaspace") -> Any:
    """A SentencePiece BPE with bytes, as transformers reads Llama's; as tokenizer.json had it before ("prepend"); as
    Gemma's has it ("bare")."""
    import tempfile

    import sentencepiece
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind != "metaspace":
        state = json.loads(pieces().backend_tokenizer.to_str())
        blank = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        before = {"type": "Prepend", "prepend": "\u2581"}
        both = {"type": "Sequence", "normalizers": [before, blank]}
        state |= {"pre_tokenizer": None, "normalizer": both if kind == "prepend" else blank}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)

    texts = ["a red square and a blue circle .", "is there a green triangle in the image ? yes no left right"] * 40
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        minloglevel=9,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        told = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        told["add_bos_token"] = True
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(told))
        return AutoTokenizer.from_pretrained(folder)


def spm(keys: dict[str, Any], text: str) -> list[int]:
    """llama.cpp's llm_tokenizer_spm_session: always join the two neighbours whose piece has the highest score, the
    leftmost first; what is no piece is written in bytes."""
    place = {text: n for n, text in reversed(list(enumerate(keys["token_list"])))}
    if keys["add_space_prefix"] and text:
        text = " " + text
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (-keys["token_scores"][place[joined]], at)
            for at in range(len(parts) - 1)
            if (joined := parts[at] + parts[at + 1]) in place
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    written = ([place[p]] if p in place else [place[f"<0x{b:02X}>"] for b in p.encode()] for p in parts)
    return [token for tokens in written for token in tokens]


@pytest.mark.parametrize("kind", ["metaspace", "prepend", "bare"])
@QUIET
@given(text=st.text(st.sampled_from("a redsquare bluecircle gren tril?.xyz\né한")))
def test_sentencepiece_joins_alike(kind: str, text: str) -> None:
    tokenizer = pieces(kind)
    told = vocabulary(tokenizer, CHATS["vicuna_v1"], 330)
    assert told.keys["tokenizer_model"] == "llama" and told.keys["add_space_prefix"] == (kind != "bare")
    if kind == "metaspace":  # the one difference, and the user is told of it
        assert "where none stands already" in told.notes[0]
        text = text.lstrip(" ")
    assert spm(told.keys, text) == tokenizer(text, add_special_tokens=False).input_ids


def test_what_is_said_of_special_tokens() -> None:
    tokenizer = pieces()
    keys = vocabulary(tokenizer, CHATS["vicuna_v1"], 334).keys
    assert [keys["token_types"][n] for n in (0, 1, 2, 3, 258, 259, 333)] == [2, 3, 3, 6, 6, 1, 5]
    assert keys["token_list"][333] == "[PAD333]" and len(keys["token_scores"]) == 334
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["unk_token_id"]) == (1, 2, 0)
    assert keys["add_bos_token"] is True and keys["chat_template"] == chat_template(CHATS["vicuna_v1"])
    keys = vocabulary(tiny_tokenizer(), CHATS["tiny"], 300, end=3).keys
    assert keys["add_bos_token"] is False and "bos_token_id" not in keys and "eot_token_id" not in keys
    assert len(keys["token_list"]) == 300 and keys["token_types"][:6] == [3, 3, 3, 3, 3, 1]
    assert vocabulary(tiny_tokenizer(), replace(CHATS["tiny"], stop=("<|user|>",)), 300).keys["eot_token_id"] == 2


def written(template: str, messages: list[dict[str, str]], generate: bool) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = re.sub(
        r"\{%-? (end)?generation -?%\}", lambda tag: "{%- " + ("endif" if tag[1] else "if 1") + " -%}", template
    )
    own = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return own.from_string(plain).render(messages=messages, add_generation_prompt=generate)


@pytest.mark.parametrize("name", CHATS)
def test_the_chat_template_puts_images_where_the_model_learned_them(name: str) -> None:
    """What llama-server hands over (no newline around a picture, wherever it stood) becomes what `encode` makes."""
    mark = "<__media_k3J__>"
    turns = [("user", "Is there {} a red square?"), ("assistant", "Yes."), ("user", "And a {}<image>?")]
    for images, system in ((("", ""), False), ((mark, ""), False), ((mark * 2, mark), True)):
        theirs = [{"role": "system", "content": "Be brief."}] * system
        ours = list(theirs)
        for place, (role, text) in enumerate(turns):
            given = text.format(images[place // 2])
            count = given.count(mark)
            theirs.append({"role": role, "content": given})
            words = given.replace(mark, "").replace("<image>", "image" if count else "<image>")
            ours.append({"role": role, "content": "<image>\n" * count + words})
        for generate in (True, False):
            expected = written(CHATS[name].template, ours, generate)
            if any(images):
                expected = expected.replace("<image>", mark)
            assert written(chat_template(CHATS[name]), theirs, generate) == expected


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"model_type": "opt"}, "no architecture is known here for the language model it \\(opt\\).*llama, "),
        ("llama", {"hidden_act": "relu"}, "no activation relu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "of the kind yarn"),
        ("qwen2", {"rope_parameters": LLAMA_3}, "qwen2 has no rotary positions of the kind llama3"),
        ("qwen2", {"head_dim": 16}, "wider or narrower"),
        ("phi", {"qk_layernorm": True}, "norms of queries"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "by the width of a head"),
        ("gemma2", {"final_logit_softcapping": None}, "always caps"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "every second layer"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "every fourth"),
        ("stablelm", {"use_parallel_residual": True}, "parallel"),
        ("llama", {"num_local_experts": 4}, "experts"),
    ],
)
def test_a_language_model_that_llama_cpp_has_not_is_named(name: str, change: dict[str, Any], said: str) -> None:
    model = language_model(name)
    config = model.config.to_dict()
    language(config, dict(model.named_parameters()), "it")
    with pytest.raises(RecipeError, match=said):
        language(config | change, dict(model.named_parameters()), "it")


def test_an_output_layer_that_llama_cpp_has_not_is_named() -> None:
    model = language_model("llama")
    bias = {"lm_head.bias": torch.ones(320)}
    with pytest.raises(RecipeError, match="no bias in the output layer"):
        language(model.config.to_dict(), dict(model.named_parameters()) | bias, "it")
    with pytest.raises(RecipeError, match=r"no tensor for model\.strange\.weight"):
        language(model.config.to_dict(), dict(model.named_parameters()) | {"model.strange.weight": torch.ones(2)}, "it")
    gemma = language_model("gemma")
    with pytest.raises(RecipeError, match="no output layer of its own"):
        language(gemma.config.to_dict(), dict(gemma.named_parameters()) | {"lm_head.weight": torch.ones(320, 32)}, "it")
    phi = language_model("phi")  # Bunny's has no bias, and the graph asks for one
    state = {name: x for name, x in phi.state_dict().items() if name != "lm_head.bias"}
    assert not language(phi.config.to_dict(), state, "it").tensors["output.bias"].any()


def test_a_composition_that_libmtmd_has_not_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vlm = tiny_vlm()
    tower, facts, recipe = vlm.towers["vision"], vlm.towers["vision"].facts, vlm.recipe
    for change, said in (
        ({"tokens": "drop_first"}, "taught without the first"),
        ({"s2": (32, 64)}, "multi-scale"),
        ({"family": "dinov2"}, "no name for the tower .*dinov2"),
        ({"config": {**facts.config, "hidden_act": "relu"}}, "no activation relu for towers"),
        ({"config": {**facts.config, "intermediate_size": 16}}, "wrong way round"),
    ):
        tower.facts = replace(facts, **change)
        with pytest.raises(RecipeError, match=said):
            write(vlm, tmp_path / "x", "gguf")
    tower.facts = facts
    vlm.recipe = recipe.model_copy(update={"connector": ConnectorRecipe(kind="ldp")})
    with pytest.raises(RecipeError, match=r"mlp2x_gelu and linear are written.*has ldp"):
        write(vlm, tmp_path / "x", "gguf")
    vlm.recipe, words = recipe, vlm.tokenizer
    vlm.tokenizer = None
    with pytest.raises(RecipeError, match="needs a tokenizer"):
        write(vlm, tmp_path / "x", "gguf")
    vlm.tokenizer = words
    assert not any(tmp_path.iterdir())
    # A model that the package ships: the tower is none that libmtmd has.
    checkpoint.save(tiny_vlm(connector="residual_2d"), tmp_path / "ours")
    assert run(["convert", str(tmp_path / "ours"), str(tmp_path / "x"), "--to", "gguf"]) == 2
    said = capsys.readouterr().err
    assert "mlp2x_gelu" in said and "--to hf-llava" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"no name for how .* \(Whitespace\?\)"),
        ({"normalizer": {"type": "Lowercase"}}, "normalised by Lowercase"),
        ({"model": {"ignore_merges": True}}, "no name for how"),
        ({"model": {"byte_fallback": True}}, "not SentencePiece's way"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change: dict[str, Any], said: str) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for name, value in change.items():
        state[name] = state[name] | value if name == "model" else value
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>")
    with pytest.raises(RecipeError, match=said):
        vocabulary(own, CHATS["tiny"], 320)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'leveret\[gguf\]'"):
        write(tiny_vlm(), tmp_path / "x", "gguf")
    assert not any(tmp_path.iterdir())


# --- llama.cpp itself -------------------------------------------------------------------------------------------------


@cache
def llama_cpp() -> Any:
    """llama.cpp through cyllama, where it is installed."""
    cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="pip install cyllama, and llama.cpp itself is asked")
    cpp.llama_backend_init()
    cpp.disable_logging()
    return cpp


def opened(folder: Path) -> tuple[Any, Any]:
    """(model, a new context on one thread, keys and values in float32)."""
    cpp = llama_cpp()

    class Model(cpp.LlamaModel):  # type: ignore[name-defined]
        n_vocab = property(lambda self: self.get_vocab().n_vocab)  # cyllama 0.2.18 asks for it and has it not

    model = Model(str(folder / "model.gguf"), verbose=False)
    said = cpp.LlamaContextParams()
    said.n_ctx, said.n_batch, said.n_ubatch, said.n_threads, said.n_threads_batch = 256, 64, 64, 1, 1
    said.type_k = said.type_v = said.flash_attn_type = 0
    return model, cpp.LlamaContext(model, said, verbose=False)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """A picture and a question: every token's logits, the picture's tokens, the text's ids, the answer's logits."""
    cpp = llama_cpp()
    vlm = model_of(tmp_path, name)
    write(vlm, tmp_path / "out", "gguf")
    model, context = opened(tmp_path / "out")
    # ggml looks GELU up in a table of float16
    most = 2e-2 if "silu" not in FAMILIES[vlm.language.config.model_type].acts else 1e-4
    batch = cpp.LlamaBatch(n_tokens=len(IDS), embd=0, n_seq_max=1)
    for place, token in enumerate(IDS):
        batch.add(token, place, [0], True)
    context.decode(batch)
    found = np.array([context.get_logits_ith(place) for place in range(len(IDS))])
    with torch.no_grad():
        expected = vlm.language(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=most)

    said = cpp.MtmdContextParams()
    said.use_gpu, said.n_threads, said.warmup = False, 1, False
    eye = cpp.MtmdContext(str(tmp_path / "out/mmproj.gguf"), model, said)
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    bitmap = cpp.MtmdBitmap.create_image(32, 32, picture.tobytes())
    text = "\nIs there a red square?<|assistant|>"
    chunks = eye.tokenize(f"<|user|>{cpp.get_default_media_marker()}{text}", [bitmap], True, True)
    parts = [chunks[n] for n in range(len(chunks))]
    rows = [[-1] * part.n_tokens if int(part.type) == 1 else list(part.get_text_tokens()) for part in parts]
    assert rows == [[2], [-1] * 4, vlm.tokenizer(text, add_special_tokens=False).input_ids]
    assert eye.encode_chunk(parts[1]) == 0
    view = vlm.spec.towers[0]
    pixels = (torch.from_numpy(picture) / 255 - torch.tensor(view.mean)) / torch.tensor(view.std)
    row = torch.tensor([[token for part in rows for token in part]])
    batch = Batch(
        input_ids=row.clamp(min=0), labels=torch.full_like(row, IGNORE), attention_mask=torch.ones_like(row).bool(),
        position_ids=torch.arange(row.shape[1])[None], segments=torch.zeros_like(row), image_mask=row == -1,
        pixels={view.name: pixels.permute(2, 0, 1)[None]}, tile_image=torch.arange(1),
    )  # fmt: skip
    with torch.no_grad():
        features = vlm.connector(vlm.see(batch.pixels))[0]
        answer = vlm(batch, logits="last").logits[0].numpy()
    found = np.array(eye.get_output_embeddings(4, 32)) * (math.sqrt(32) if name.startswith("gemma") else 1)
    np.testing.assert_allclose(found, features.numpy(), atol=2e-2)
    _, context = opened(tmp_path / "out")
    eye.eval_chunks(context, chunks, 0, 0, 64, True)
    np.testing.assert_allclose(np.array(context.get_logits_ith(-1)), answer, atol=3e-2)


def test_llama_cpp_sees_with_clip_as_it_should_or_as_its_issue_says(tmp_path: Path) -> None:
    cpp = llama_cpp()
    vlm = model_of(tmp_path, tower="clip")
    write(vlm, tmp_path / "out", "gguf")
    model, _ = opened(tmp_path / "out")
    said = cpp.MtmdContextParams()
    said.use_gpu, said.n_threads, said.warmup = False, 1, False
    eye = cpp.MtmdContext(str(tmp_path / "out/mmproj.gguf"), model, said)
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    chunks = eye.tokenize(
        cpp.get_default_media_marker(), [cpp.MtmdBitmap.create_image(32, 32, picture.tobytes())], True, True
    )
    eye.encode_chunk(next(chunks[n] for n in range(len(chunks)) if int(chunks[n].type) == 1))
    found = np.array(eye.get_output_embeddings(4, 32))
    view, file = vlm.spec.towers[0], File(tmp_path / "out/mmproj.gguf")
    pixels = ((torch.from_numpy(picture) / 255 - torch.tensor(view.mean)) / torch.tensor(view.std)).permute(2, 0, 1)
    worst = [np.abs(found - features_of(file, pixels, shifted=shifted).numpy()).max() for shifted in (False, True)]
    assert min(worst) < 2e-2, worst


@peers_tests.MISSING
@pytest.mark.parity
@pytest.mark.parametrize("family", [name for name in peers_tests.FAMILIES if name in peers_tests.PLAIN])
def test_llama_cpp_reads_and_computes_what_bunny_and_llava_do(family: str, tmp_path: Path) -> None:
    """Ids of a text, and the logits of them."""
    cpp = llama_cpp()
    vlm, _ = peers_tests.opened(family)
    write(vlm, tmp_path / "out", "gguf")
    model, context = opened(tmp_path / "out")
    text = "USER: What is the red square doing in 2024?\nIt's 3.14 ASSISTANT:"
    ids = vlm.tokenizer(text, add_special_tokens=False).input_ids
    assert list(model.get_vocab().tokenize(text, False, True)) == ids
    batch = cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for place, token in enumerate(ids):
        batch.add(token, place, [0], True)
    context.decode(batch)
    found = np.array([context.get_logits_ith(place) for place in range(len(ids))])
    with torch.no_grad():
        expected = vlm.language(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-2 if "phi" in family else 1e-4)


def test_llama_server_answers_as_the_model_does(tmp_path: Path) -> None:
    """Picture and question through chat template, tokenizer, mmproj and language model: the same greedy tokens."""
    server = pytest.importorskip("xllamacpp", reason="pip install xllamacpp, and llama-server itself is asked")
    import base64
    import socket

    from PIL import Image

    import leveret

    vlm = model_of(tmp_path)
    write(vlm, tmp_path / "out", "gguf")
    checkpoint.save(vlm, tmp_path / "ours")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    said = server.CommonParams()
    said.model.path, said.mmproj.path = str(tmp_path / "out/model.gguf"), str(tmp_path / "out/mmproj.gguf")
    said.mmproj_use_gpu, said.n_gpu_layers, said.warmup, said.use_jinja = False, 0, False, True
    said.n_ctx, said.n_parallel, said.cpuparams.n_threads, said.cpuparams_batch.n_threads = 256, 1, 1, 1
    said.cache_type_k = said.cache_type_v = server.ggml_type.GGML_TYPE_F32
    said.flash_attn_type = server.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said.port = free.getsockname()[1]
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "p.png").read_bytes()).decode()
    question = "Is there a red square?"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
    answer = server.Server(said).handle_chat_completions(asked)
    found = answer["choices"][0]["message"]["content"]
    assert found == leveret.load(tmp_path / "ours").ask(tmp_path / "p.png", question, max_new_tokens=12)
