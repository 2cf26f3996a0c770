"""Models of ours as two GGUF files, which llama.cpp and what is built on it run.

    model.gguf   the language model with its tokenizer and chat template
    mmproj.gguf  the tower and the connector

`gguf_language.py` and `gguf_tokenizer.py` say what goes into the first. The second is what llama.cpp's libmtmd calls a
projector of the type `mlp`: a CLIP or SigLIP tower, one layer of it, two linear layers with a GELU between them
(`tools/mtmd/models/llava.cpp`). A single linear layer is written as two, for GELU(x) - GELU(-x) is x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leveret.inputs.formats import find_chat
from leveret.model.peers import gguf_language, gguf_tokenizer
from leveret.model.peers.write_parts import positions
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.runs import EnvironmentFault, RecipeError

State = dict[str, Tensor]

LANGUAGE, VISION = "model.gguf", "mmproj.gguf"
INSTEAD = (
    "leveret itself runs this model (chat, eval), transformers runs it from --to remote-code, and other engines read "
    "--to hf-llava, where it fits"
)
TOWERS = ("clip_vision_model", "siglip_vision_model")
_ACTS = {
    "quick_gelu": {},
    "gelu": {"use_gelu": True},
    "gelu_pytorch_tanh": {"use_gelu": True},
    "silu": {"use_silu": True},
}
"""transformers' names of a tower's activation -> what the file says; libmtmd's default is CLIP's quick GELU."""
_PADDING = (122, 116, 104)
"""The colour with which libmtmd makes an image square."""


def write(folder: Path, vlm: VLM, tower: Tower, config: Mapping[str, Any], language: State) -> list[str]:
    """Writes both files into `folder`. Returns what llama.cpp does otherwise, for the user.

    config, language  the language model's configuration and tensors, by transformers' names.

    Weights keep their type; norms, biases and positions are float32, as llama.cpp wants them. RecipeError names what
    llama.cpp has no graph for (nothing is written then), EnvironmentFault says how to install the gguf package.
    """
    try:
        import gguf
    except ImportError as fault:
        raise EnvironmentFault(
            f"--to gguf: the gguf package is not installed ({fault}); `pip install 'leveret[gguf]'` brings it"
        ) from fault
    name = vlm.recipe.language.name
    text = gguf_language.language(config, language, name)
    ends = config.get("eos_token_id")
    end = next(iter(ends), None) if isinstance(ends, list) else ends
    words = gguf_tokenizer.vocabulary(vlm.tokenizer, find_chat(vlm.chat), text.keys["vocab_size"], end)
    seen, facts, notes = _vision(vlm, tower, text.image)
    kind = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}[vlm.dtype]
    said = {"file_type": int(gguf.LlamaFileType[kind])}

    file = gguf.GGUFWriter(folder / LANGUAGE, text.arch)
    file.add_type(gguf.GGUFType.MODEL)
    for key, value in {**said, **text.keys, **words.keys}.items():
        getattr(file, f"add_{key}")(gguf.RopeScalingType(value) if key == "rope_scaling_type" else value)
    _finish(file, text.tensors, vlm.dtype)

    file = gguf.GGUFWriter(folder / VISION, "clip")
    file.add_type(gguf.GGUFType.MMPROJ)
    for key, value in {**said, **facts}.items():
        getattr(file, f"add_{key}")(value)
    # The last layer that runs. Without it libmtmd leaves out the file's last, as old files had one too many.
    file.add_array("clip.vision.feature_layer", [facts["vision_block_count"]])
    _finish(file, seen, vlm.dtype)
    return [*text.notes, *words.notes, *notes]


def _finish(file: Any, tensors: State, dtype: torch.dtype) -> None:
    import gguf

    for name, tensor in tensors.items():
        # llama.cpp adds and multiplies with float32 alone, and looks positions up in it
        full = tensor.dim() < 2 or name.endswith(("_norm.weight", "position_embd.weight"))
        rough = torch.float32 if "patch_embd" in name and dtype == torch.bfloat16 else tensor.dtype
        tensor = tensor.detach().to("cpu", torch.float32 if full else rough).contiguous()
        if tensor.dtype == torch.bfloat16:
            file.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            file.add_tensor(name, tensor.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


# --- the tower and the connector --------------------------------------------------------------------------------------


def _vision(vlm: VLM, tower: Tower, scale: float) -> tuple[State, dict[str, Any], list[str]]:
    """(tensors, what is said of them, notes). scale: what the images' tokens are multiplied with."""
    facts, config = tower.facts, tower.facts.config
    assert vlm.spec.tiling is None, (
        "`parts.eye` refuses them: libmtmd shows the whole image behind its tiles, no newlines"
    )
    source, width, deep = facts.source, int(config["hidden_size"]), int(config["intermediate_size"])
    if facts.s2:
        raise RecipeError(f"llama.cpp has no multi-scale towers, and {source} runs at {facts.s2}")
    if facts.tokens == "cls_patch" and facts.family == "clip_vision_model":
        raise RecipeError(f"llama.cpp leaves the class token of {source} out, and this model was taught with it")
    if facts.tokens == "drop_first" and facts.family == "siglip_vision_model":
        raise RecipeError(f"llama.cpp drops no patch of {source}, and this model was taught without the first")
    if (kind := vlm.recipe.connector.kind) not in CONNECTORS:
        raise RecipeError(
            f"llama.cpp: of connectors {' and '.join(CONNECTORS)} are written as GGUF, and this model has {kind}"
        )
    if (act := str(config["hidden_act"])) not in _ACTS:
        raise RecipeError(f"llama.cpp has no activation {act} for towers, and {source} has it")
    if width == deep:
        raise RecipeError(f"llama.cpp takes the layers of {source} the wrong way round, for they are {width} x {deep}")
    state = _tower(tower)
    mlp = CONNECTORS[kind](vlm.connector.state_dict())
    for place in (0, 2):
        for what in ("weight", "bias"):
            tensor = mlp[f"{place}.{what}"]
            state[f"mm.{place}.{what}"] = tensor.float() * scale if place == 2 and scale != 1 else tensor
    view = vlm.spec.towers[0]
    said = {
        "clip_has_vision_encoder": True,
        "clip_projector_type": "mlp",
        "vision_projection_dim": len(mlp["2.bias"]),
        "vision_image_size": facts.size,
        "vision_patch_size": int(config["patch_size"]),
        "vision_embedding_length": width,
        "vision_feed_forward_length": deep,
        "vision_block_count": len(tower.blocks),
        "vision_head_count": int(config["num_attention_heads"]),
        "vision_attention_layernorm_eps": float(config["layer_norm_eps"]),
        "vision_image_mean": list(view.mean),
        "vision_image_std": list(view.std),
    }
    said |= {f"vision_{key}": value for key, value in _ACTS[act].items()}
    notes = ["llama.cpp computes the connector's GELU by its tanh approximation: features differ in the fourth digit"]
    if facts.family == "clip_vision_model":
        notes.append(
            "llama.cpp since May 2025 (up to October 2026 at least) puts CLIP's class token behind the patches and "
            "reads the positions as if it stood before them, so what it sees is shifted (ggml-org/llama.cpp issue "
            "25814). The file is right for a build with that mended; SigLIP towers are not affected"
        )
    ours = tuple(round(255 * mean) for mean in view.mean)
    if view.resize != "pad" or ours != _PADDING:
        taught = f"padded with {ours}" if view.resize == "pad" else f"made square by `{view.resize}`"
        notes.append(
            f"llama.cpp makes images square by padding with {_PADDING}, and this model learned from images {taught}: "
            "give it square images, or ones that are made square beforehand"
        )
    return state, said, notes


def _doubled(state: Mapping[str, Tensor]) -> State:
    """A linear layer as two with a GELU between them: x as GELU(x) - GELU(-x), which holds for its tanh form too."""
    weight, bias = state["weight"], state["bias"]
    one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return {
        "0.weight": torch.cat([weight, -weight]), "0.bias": torch.cat([bias, -bias]),
        "2.weight": torch.cat([one, -one], dim=1), "2.bias": torch.zeros_like(bias),
    }  # fmt: skip


CONNECTORS: dict[str, Callable[[Mapping[str, Tensor]], State]] = {"mlp2x_gelu": dict, "linear": _doubled}
"""Connectors that are written -> (state) -> weights and biases of two linear layers, 0 and 2."""

_NAMES = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip


def _tower(tower: Tower) -> State:
    """Tensors of the blocks that run, and of what comes before them, by libmtmd's names."""
    own = tower.model.embeddings
    state: State = {"v.patch_embd.weight": own.patch_embedding.weight, "v.position_embd.weight": positions(tower)}
    if own.patch_embedding.bias is not None:
        state["v.patch_embd.bias"] = own.patch_embedding.bias
    if tower.facts.family == "clip_vision_model":
        state["v.class_embd"] = own.class_embedding
        state |= {f"v.pre_ln.{what}": tensor for what, tensor in tower.model.pre_layrnorm.state_dict().items()}
    for place, block in enumerate(tower.blocks):
        for name, tensor in block.state_dict().items():
            part, _, what = name.rpartition(".")
            state[f"v.blk.{place}.{_NAMES[part]}.{what}"] = tensor
    return state
