"""What a model is, told from its configuration and the heads of its files: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from leveret.model import checkpoint, peers
from leveret.model import hub as hubs
from leveret.model.merge import is_adapters, language_prefix
from leveret.model.peers.assemble import outline, saved_as
from leveret.model.peers.files import Folder, Outline, adapter_changes, read_adapters
from leveret.model.source import OURS, Given, locate
from leveret.model.vlm import VLM
from leveret.runs import DataError, EnvironmentFault, RecipeError


@dataclass(frozen=True)
class Sketch:
    """What a model is, without its weights.

    vlm       on torch's meta device, without a tokenizer. tool: whose it is, in words. notes: as of peers.
    stored    name of a tensor in `vlm` -> its type in the files.
    adapters  what is added to it, where a folder of adapters was given: see `told_adapters`.
    """

    vlm: VLM
    tool: str
    stored: dict[str, torch.dtype]
    notes: list[str] = field(default_factory=list)
    adapters: dict[str, Any] | None = None


def sketch(given: str | Path, *, whole: bool = False) -> Sketch:
    """What the model that `given` means would be. Of an id only settings, tokenizer and the heads of the weights are
    downloaded; of adapters, which are small, the files.

    Adapters, or a projector alone, are told with the model they stand on; it is the one that they name. whole: adapters
    in PEFT's format are refused.

    RecipeError where weights on the hub are pickles, or what adapters stand on is not here; DataError and
    EnvironmentFault as for `locate`.
    """
    path = Path(given).expanduser()
    name = None if path.exists() else hubs.as_id(str(given))
    if name is not None:
        path = hubs.fetch(*name, words_only=True)
        if is_adapters(path):
            path = hubs.fetch(*name)
    if is_adapters(path) and peers.recognise(Folder(path)) is None:
        if whole:
            raise RecipeError(f"{given} holds adapters too, and adapters stand on a whole model")
        return _on_base(str(given), path)
    if name is None:
        found, told = locate(given), None
    else:
        ours = "format" in Folder(path).config
        tool = OURS if ours else peers.recognise(Folder(path))
        if tool is None:
            raise peers.unknown(Folder(path))
        found = Given(str(given), path, tool)
        here = any(file.suffix in (".safetensors", ".bin", ".pt") for file in path.rglob("*"))
        told = None if here else hubs.remote_outline(*name)
    if found.ours:
        vlm = checkpoint.outline(found.folder)
        tensors = hubs.outline_tensors(found.folder / "model.safetensors") if told is None else told
        tensors = checkpoint.our_names(tensors) if found.with_code else tensors
        return Sketch(vlm, OURS, {key: tensor.dtype for key, tensor in tensors.items()})
    folder = Outline(found.folder, told)
    foreign = peers.PEERS[found.tool].read(folder, peers.Hub(words_only=True), None, None)
    vlm, kind = outline(foreign), saved_as(foreign)
    made = Sketch(vlm, foreign.tool, {key: kind for key, _ in checkpoint.stored(vlm)}, list(foreign.notes))
    if not is_adapters(found.folder):
        return made
    base = str(folder.config.get("_name_or_path") or folder.config.get("llm_model_name_or_path") or "")
    return _with_adapters(made, folder, base)


def _on_base(given: str, path: Path) -> Sketch:
    """Adapters in PEFT's format, on the whole model that adapter_config.json names."""
    folder = Outline(path)
    base = folder.settings("adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise RecipeError(f"{given}: adapter_config.json names no base model, so what they are added to is not known")
    try:
        found = sketch(str(base), whole=True)
    except (RecipeError, DataError, EnvironmentFault) as fault:
        raise RecipeError(
            f"{given}: adapter_config.json says the adapters stand on {base!r}, which is no whole model here "
            f"({fault}). Name one there, or make it whole: `leveret merge {given} --base MODEL -o OUT`"
        ) from None
    shapes = {name: tuple(x.shape) for name, x in found.vlm.language.state_dict().items()}
    tensors, settings = read_adapters(folder), folder.settings("adapter_config.json")
    try:
        adapter_changes(shapes, tensors, settings, language_prefix(tensors, shapes))
    except DataError as fault:
        raise DataError(f"{given} does not fit {base}: {fault}") from None
    return _with_adapters(found, folder, str(base))


def _with_adapters(found: Sketch, folder: Folder, base: str) -> Sketch:
    told = told_adapters(folder.settings("adapter_config.json"), read_adapters(folder), base)
    whole = f", and all of {', '.join(told['whole'])}" if told["whole"] else ""
    said = (
        f"{told['kind']} adapters on {base}: rank {told['rank']}, alpha {told['alpha']}, {told['parameters']:,} "
        f"parameters in {told['layers']} layers ({', '.join(told['targets'])}){whole}; the parts are those of the whole"
    )
    return replace(found, notes=[*found.notes, said], adapters=told)


def told_adapters(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: str) -> dict[str, Any]:
    """{"base", "kind" (LoRA or DoRA), "rank", "alpha", "targets" (ends of the names of layers), "layers" (how many),
    "parameters" (the adapters' own), "whole" (modules that learned without), "dtype", "stored" (bytes)} of adapters in
    PEFT's format."""
    layers = sorted({name.split(".lora_")[0] for name in tensors if ".lora_" in name})
    return {
        "base": base,
        "kind": "DoRA" if settings.get("use_dora") else "LoRA",
        "rank": int(settings["r"]),
        "alpha": settings["lora_alpha"],
        "targets": sorted({layer.rpartition(".")[2] for layer in layers}),
        "layers": len(layers),
        "parameters": sum(tensor.numel() for name, tensor in tensors.items() if ".lora_" in name),
        "whole": sorted({name.rpartition(".")[0].rpartition(".")[2] for name in tensors if ".lora_" not in name}),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        "stored": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }
