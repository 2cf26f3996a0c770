"""Towers in others' files: what their weights and configurations say, without building anything.

Pickled files are read with torch's `weights_only`: tensors and plain containers, never code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leveret.model.hub import missing, read_tensors, shards_of
from leveret.runs import DataError, EnvironmentFault

NAMES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
"""Where timm's repositories keep their weights, the safest first."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, of a pickled state dict, or of all files that an index names.

    DataError when a file is damaged, holds code, or anything else than named tensors.
    """
    files = shards_of(path) if path.name.endswith(".index.json") else [path]
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def weights_file(source: str, repo: str = "", file: str = "", where: str = "model.vision.tower") -> Path:
    """The file of a tower's weights: `source` itself, one of NAMES in the folder `source`, or `file` (one of NAMES) of
    the hub's `repo`. EnvironmentFault when it can be had from nowhere."""
    path = Path(source)
    if path.is_file():
        return path
    found = [path / name for name in (*NAMES, "model.safetensors.index.json") if (path / name).is_file()]
    if found:
        return found[0]
    if not repo:
        raise missing(source, where, OSError(f"none of {', '.join(NAMES)} in it"))
    from huggingface_hub import hf_hub_download

    fault: Exception = OSError()
    for name in (file,) if file else NAMES:
        try:
            return Path(hf_hub_download(repo, name))
        except Exception as said:  # offline, no such file, no such repository, gated: all the same to us
            fault = said
    if not file:
        raise missing(repo, where, fault)
    reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    raise EnvironmentFault(
        f"{where}: the weights of {source!r} could not be read ({reason}). With a connection: "
        f"`hf download {repo} {file} --local-dir .`, then set {where}=./{file}"
    )


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is timm's."""
    return "architecture" in config and "model_type" not in config


def timm_config(folder: Path, config: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' configuration of the tower in a timm folder: the published one of its architecture, with the sizes
    that the folder's config.json and its weights have. DataError when the number of heads cannot be known."""
    told = config.get("model_args") or {}
    shapes = _shapes(weights_file(str(folder)))
    sizes = _timm_sizes(shapes, folder)
    heads = told.get("num_heads")
    if heads is None and sizes["hidden_size"] != published["hidden_size"]:
        raise DataError(
            f"{folder / 'config.json'}: its weights are {sizes['hidden_size']} wide, the published model's "
            f"{published['hidden_size']}, and no model_args.num_heads says how many heads there are"
        )
    side = told.get("img_size") or (config.get("pretrained_cfg") or {}).get("input_size", [published["image_size"]])[-1]
    full = {**published, **sizes, "num_attention_heads": heads or published["num_attention_heads"], "image_size": side}
    tag = (config.get("pretrained_cfg") or {}).get("tag") or folder.name.partition(".")[2]
    if published.get("hidden_act") == "quick_gelu" and tag and not tag.startswith("openai"):
        full["hidden_act"] = "gelu"  # others than OpenAI trained these shapes with it
    if "mlp_ratio" in published:
        full["mlp_ratio"], rest = divmod(full.pop("intermediate_size"), full["hidden_size"])
        if rest:
            raise DataError(f"{folder}: its MLPs are no whole multiple of its width; transformers has no such class")
    if "num_register_tokens" in published:
        full["num_register_tokens"] = next((s[1] for n, s in shapes.items() if n.endswith("reg_token")), 0)
    return full


def _timm_sizes(shapes: Mapping[str, torch.Size], folder: Path) -> dict[str, int]:
    """Width, depth, MLP width and patch size, from the weights (timm's names or OpenAI's)."""

    def one(*ends: str) -> torch.Size:
        found = [shape for name, shape in shapes.items() if f".{name}".endswith(tuple("." + end for end in ends))]
        if not found:
            raise DataError(
                f"{folder}: no {' or '.join(ends)} among its weights; is it a vision transformer of timm's?"
            )
        return found[0]

    kernel = one("patch_embed.proj.weight", "visual.conv1.weight")
    numbers = [name.split("blocks.")[1].split(".")[0] for name in shapes if "blocks." in name and _seen(name)]
    return {
        "hidden_size": kernel[0],
        "patch_size": kernel[-1],
        "num_hidden_layers": 1 + max(map(int, numbers)),
        "intermediate_size": one("blocks.0.mlp.fc1.weight", "resblocks.0.mlp.c_fc.weight")[0],
    }


def _seen(name: str) -> bool:
    """Whether a name is the image side's, in a file that may hold a text side too."""
    return name.startswith(("visual.", "blocks."))


def eva_config(path: Path) -> dict[str, Any]:
    """The configuration of EvaVision that a published EVA-CLIP file needs, from the shapes of its weights.

    DataError when it is no such file, or when its rotary tables are not those that EvaVision computes.
    """
    from leveret.model.eva import rotation

    state = read_weights(path)
    stem = next(
        (name.removesuffix("rope.freqs_cos") for name in state if name.endswith("blocks.0.attn.rope.freqs_cos")), ""
    )
    stem = stem.removesuffix("blocks.0.attn.")
    try:
        kernel, table = state[stem + "patch_embed.proj.weight"], state[stem + "rope.freqs_cos"]
        grid = round((state[stem + "pos_embed"].shape[1] - 1) ** 0.5)
        hidden, head = state[stem + "blocks.0.mlp.w1.weight"].shape[0], state[stem + "head.weight"].shape[0]
    except KeyError as fault:
        raise DataError(f"{path}: not an EVA-02-CLIP file, {fault.args[0]!r} is missing") from None
    depth = 1 + max(
        int(name.removeprefix(stem + "blocks.").split(".")[0]) for name in state if name.startswith(stem + "blocks.")
    )
    config = {
        "model_type": "eva02_clip", "hidden_size": kernel.shape[0], "intermediate_size": hidden,
        "num_hidden_layers": depth, "num_attention_heads": kernel.shape[0] // table.shape[1],
        "image_size": grid * kernel.shape[-1], "patch_size": kernel.shape[-1], "projection_dim": head,
        "layer_norm_eps": 1e-6, "pretrain_grid": 16,
    }  # fmt: skip
    computed = rotation(grid, 16, table.shape[1], torch.device("cpu")).cos()
    if table.shape != computed.shape or not torch.allclose(table.float(), computed, atol=1e-3):
        raise DataError(
            f"{path}: its rotary table is not that of a pre-training on 16 x 16 patches; it is another model"
        )
    return config


def _shapes(path: Path) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in read_weights(path).items()}
