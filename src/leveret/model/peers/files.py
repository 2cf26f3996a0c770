"""What lies in someone's checkpoint folder, read without running any of it.

Weights are safetensors, or pickles that torch reads with `weights_only`: tensors and nothing else. Names and shapes are
as they were saved; what they mean is the business of each peer's own file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.model.hub import as_id, outline_tensors, read_tensors, remote_outline, shards_of
from leveret.runs import DataError

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
"""Tensors by name."""

STEMS = ("model", "pytorch_model")
"""Names of a folder's weights: STEM.safetensors or STEM.bin, or shards that an index lists."""


@dataclass(frozen=True)
class Folder:
    """A folder with a model of another tool."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty where there is none. DataError where it is not a JSON object."""
        return self.settings("config.json")

    def settings(self, name: str) -> dict[str, Any]:
        """A JSON file's object; empty where there is none. DataError where it is anything else."""
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as fault:
            raise DataError(f"{file}: not JSON ({fault})") from None
        if not isinstance(found, dict):
            raise DataError(f"{file}: a {type(found).__name__}, where an object with the model's settings belongs")
        return found

    @property
    def eos(self) -> str:
        """The end token that its tokenizer names; "" where none does."""
        said = self.settings("tokenizer_config.json").get("eos_token") or ""
        return str(said.get("content") if isinstance(said, Mapping) else said)

    def has(self, *names: str) -> bool:
        """Whether all of these files or folders are there."""
        return all((self.path / name).exists() for name in names)

    def weights(self, inside: str = ".") -> list[Path]:
        """The files that hold the weights of a folder in here: safetensors where there are any. Empty where none are.

        DataError where an index lists a file that is not there.
        """
        folder = self.path / inside
        for ending in ("safetensors", "bin"):
            for stem in STEMS:
                index = folder / f"{stem}.{ending}.index.json"
                if index.is_file():
                    return shards_of(index)
                if (folder / f"{stem}.{ending}").is_file():
                    return [folder / f"{stem}.{ending}"]
        return []

    def state(self, inside: str = ".") -> State:
        """All tensors of a folder in here. DataError where there are none, or a file cannot be read."""
        files = self.weights(inside)
        if not files:
            wanted = ", ".join(f"{stem}.safetensors or {stem}.bin" for stem in STEMS)
            raise DataError(f"{self.path / inside} holds no weights: none of {wanted}, or an index of shards")
        return {name: tensor for file in files for name, tensor in self.tensors(file).items()}

    def tensors(self, file: Path) -> State:
        """The tensors of a file in here."""
        return read_tensors(file)

    def base(self, path: Path, name: str) -> Folder:
        """The folder of what this one stands on, which it calls `name`, read in the same way."""
        return Folder(path)


@dataclass(frozen=True)
class Outline(Folder):
    """The same, but tensors come on the meta device: their names, types and shapes, to see what a model would be.

    told  the tensors of weights that are not on this machine, as the hub tells them.
    """

    told: State | None = None

    def weights(self, inside: str = ".") -> list[Path]:
        return [self.path / "model.safetensors"] if self.told is not None and inside == "." else super().weights(inside)

    def tensors(self, file: Path) -> State:
        return dict(self.told) if self.told is not None else outline_tensors(file)

    def base(self, path: Path, name: str) -> Folder:
        found = Outline(path)
        return found if found.weights() or as_id(name) is None else Outline(path, remote_outline(name))


def renamed(state: Mapping[str, Any], *pairs: tuple[str, str]) -> State:
    """The tensors whose names begin with the first of a pair, under the second; the first pair that fits counts."""
    out: State = {}
    for name, tensor in state.items():
        for old, new in pairs:
            if name.startswith(old):
                out[new + name.removeprefix(old)] = tensor
                break
    return out


def merge_adapters(base: State, adapters: Mapping[str, Any], settings: Mapping[str, Any], prefix: str) -> State:
    """The base weights with PEFT's LoRA adapters added: W + (alpha / r) B A, in float32.

    base      names as the language model has them. settings: adapter_config.json.
    adapters  `PREFIX<layer>.lora_A.weight`, `.lora_B.weight` and perhaps `.lora_magnitude_vector` (DoRA); and whole
              tensors `PREFIX<name>` that were saved beside them (PEFT's modules_to_save, biases).
    DataError where an adapter fits no layer, lacks its other half, or is of a kind that is not known.
    """
    out = dict(base)
    for name, change in adapter_changes({name: tuple(x.shape) for name, x in base.items()}, adapters, settings, prefix):
        out[name] = change(out[name])
    return out


_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways in which adapters begin (PEFT's init_lora_weights) by taking something off the weights that they stand on."""

Change = Callable[["Tensor"], "Tensor"]


def adapter_changes(
    shapes: Mapping[str, tuple[int, ...]], adapters: Mapping[str, Any], settings: Mapping[str, Any], prefix: str
) -> list[tuple[str, Change]]:
    """What `merge_adapters` does to each tensor it changes, so that one of them at a time need stand in memory.

    shapes  of the base's tensors, by name. A change takes a tensor of the base; an adapter's comes back in float32.
    """
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise DataError(f"adapters of the kind {kind!r}; LORA is what can be merged")
    if "r" not in settings or "lora_alpha" not in settings:
        raise DataError("adapter_config.json says no r or no lora_alpha; these scale what is added")
    begun = str(settings.get("init_lora_weights", ""))
    if begun.startswith(_MOVES_THE_BASE):
        raise DataError(
            f"adapters that began as {begun!r}: PEFT changes the base's weights when it loads such, and what is saved "
            "does not say to what. Save them converted (path_initial_model_for_weight_conversion of save_pretrained), "
            "or merge them with PEFT"
        )
    alpha, patterns = float(settings["lora_alpha"]), settings.get("alpha_pattern") or {}
    left, changes = dict(adapters), list[tuple[str, Change]]()
    for name in [name for name in adapters if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        own = layer.removeprefix(prefix)
        down, up = left.pop(name), left.pop(f"{layer}.lora_B.weight", None)
        if up is None or f"{own}.weight" not in shapes:
            missing = f"{layer}.lora_B.weight" if up is None else f"a layer {own}"
            raise DataError(f"the adapters have {name}, but there is no {missing}; they were made for another model")
        turned = bool(settings.get("fan_in_fan_out"))
        given = (up.shape[0], down.shape[1])[:: -1 if turned else 1]
        if given != shapes[f"{own}.weight"] or up.shape[1] != down.shape[0]:
            raise DataError(
                f"the adapters of {own} are {tuple(up.shape)} and {tuple(down.shape)}, which do not add to a weight of "
                f"{shapes[f'{own}.weight']}; they were made for another model"
            )
        r = down.shape[0]  # whatever rank_pattern says of the layer
        scale = _pattern(patterns, own, alpha) / (r**0.5 if settings.get("use_rslora") else r)
        magnitude = left.pop(f"{layer}.lora_magnitude_vector", None)
        if magnitude is None:
            magnitude = left.pop(f"{layer}.lora_magnitude_vector.weight", None)
        changes.append((f"{own}.weight", _adding(down, up, scale, magnitude, turned)))
    whole = []
    for name in [name for name in left if ".lora_" not in name]:
        own = name.removeprefix(prefix)
        if shapes.get(own) == tuple(left[name].shape):
            whole.append(left.pop(name))
            changes.append((own, _putting(whole[-1])))
    for name in [name for name in left if any(_same(left[name], one) for one in whole)]:
        del left[name]  # a tied weight under its other name, as PEFT writes it
    if left:
        raise DataError(
            f"{len(left)} tensors of the adapters have no place in the model: "
            f"{shown({f'{name} {tuple(x.shape)}': x for name, x in left.items()})}"
        )
    return changes


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _adding(down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None, turned: bool) -> Change:
    def change(weight: Tensor) -> Tensor:
        import torch

        added = scale * (up.float() @ down.float())
        merged = weight.float() + (added.T if turned else added)
        if magnitude is not None:  # DoRA (arXiv 2402.09353): the direction is learned, the length apart from it
            merged = merged * (magnitude.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged

    return change


def _putting(whole: Tensor) -> Change:
    return lambda weight: whole.to(weight.dtype)


def _pattern(table: Mapping[str, Any], layer: str, default: float) -> float:
    """PEFT's own override for a layer: keys are regular expressions of the end of its name (peft/utils/other.py,
    get_pattern_key). DataError where one is none."""
    try:
        return next((float(value) for key, value in table.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
    except re.error as fault:
        raise DataError(f"adapter_config.json: alpha_pattern {list(table)}: {fault}") from None


def read_adapters(folder: Folder) -> State:
    """A folder's adapters in PEFT's format. DataError where there are none."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if folder.has(name):
            return folder.tensors(folder.path / name)
    raise DataError(f"{folder.path}: adapter_config.json is there, but no adapter_model.safetensors or .bin")


def shown(names: Sequence[str] | Mapping[str, Any], most: int = 12) -> str:
    """Names for a message."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
