"""A model as a folder, and back, bit for bit.

    config.json          what rebuilds the model without the tables and folders it once came from
    model.safetensors    every weight and every stored statistic, each once, in its own type
    tokenizer files      as transformers writes them
    chat_template.jinja  the chat format, as a Jinja template
    my.py                files of the maker's own that build a part (own.py); never run because they lie there

Nothing is pickled. A folder is written beside its place and renamed into it, so a half-written one is never found.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from leveret import own
from leveret.inputs.formats import ChatFormat, bring, find_chat
from leveret.inputs.reader import end_ids
from leveret.model import fewbits, tensors, tower_keys, towers
from leveret.model import language as languages
from leveret.model.build import join
from leveret.model.language import LanguageFacts
from leveret.model.recipe import ModelRecipe
from leveret.model.towers import TowerFacts
from leveret.model.vlm import VLM
from leveret.records import IMAGE_MARK, ImageSpec
from leveret.runs import DataError, RecipeError

FORMAT = 2
"""Version of the folder's layout; raised when an older leveret could not read a newer folder. 2: `vision` in
config.json is a list of towers (in 1 it is one tower), and towers know which tokens they give and at which scales."""
READABLE = (1, FORMAT)


def save(vlm: VLM, folder: str | Path) -> Path:
    """Writes the model as a folder, replacing one that stands there; returns its path.

    Weights keep their type. A reader of `folder` finds the old model or the new one; between two renames, for an
    instant, none. Adapters must be merged before: ValueError when peft still wraps the language model. OSError when
    the disk fails; what stood there stays.
    """
    folder = Path(folder)
    if fewbits.stands_in_few_bits(vlm):
        raise ValueError(
            "the language model stands in few bits (load_in), which no folder of ours holds: load it whole"
        )
    if adapters := [name for name in vlm.state_dict() if "lora_" in name]:
        raise ValueError(f"the language model still carries adapters ({adapters[0]}, ..): merge them before saving")
    with fresh_folder(folder) as fresh:
        if vlm.tokenizer is not None:
            vlm.tokenizer.save_pretrained(fresh)
        (fresh / "chat_template.jinja").write_text(find_chat(vlm.chat).template, "utf-8")
        for name, reference in own_files(config := config_of(vlm)).items():
            (fresh / name).write_bytes(own.source_of(reference)[1])
        tensors.write(fresh / "model.safetensors", dict(stored(vlm)), {"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return folder


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A folder to write a model into, which then takes the place of `folder`: a reader finds the old one or the new
    one. At any error nothing of it stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.new"
    fresh.mkdir()
    try:
        yield fresh
        # safetensors writes for the owner alone; the model shall be as readable as the files beside it
        for weights in fresh.rglob("*.safetensors"):
            weights.chmod((fresh / "config.json").stat().st_mode)
        for file in [*fresh.rglob("*"), fresh]:
            _flush(file)
        _replace(folder, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(folder: str | Path, device: str | torch.device = "cpu") -> VLM:
    """The model in a folder that `save` wrote (or in a run folder that holds one), in evaluation mode.

    DataError when there is none, when it is of another format, when a part is built by a file of its maker's own that
    nobody named here, or when its weights are not exactly the model's; the text then lists what is missing and what is
    unexpected.
    """
    from safetensors.torch import load_file
    from transformers.initialization import no_init_weights

    folder = find(folder)
    config, recipe = read(folder)
    _look_at_own(config, folder)
    try:
        weights = load_file(folder / "model.safetensors", device=str(device))
    except Exception as fault:  # safetensors' own error class is not public
        raise DataError(f"{folder / 'model.safetensors'}: cannot be read ({fault})") from fault
    with _readable(folder), torch.device(device), no_init_weights():
        vlm = _built(config, recipe, tokenizer(folder, int(config["language"]["vocab"])))
    fill(vlm, _as_installed(vlm, our_names(weights) if "auto_map" in config else weights), folder)
    with _readable(folder):
        spec = ImageSpec.from_dict(config["spec"])
    if vlm.spec != spec:
        raise DataError(f"{folder / 'config.json'}: its `spec` does not fit its `vision`; the file was changed by hand")
    # The language model's own ends among them, which its class does not know from its configuration alone.
    if (ends := config.get("eos_token_id")) and getattr(vlm.language, "generation_config", None) is not None:
        vlm.language.generation_config.eos_token_id = ends
    return vlm.to(device).eval()


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """DataError where config.json lacks what it must have, or has it otherwise."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as fault:
        raise DataError(
            f"{folder / 'config.json'}: cannot be read ({type(fault).__name__}: {fault}); it was changed by hand, or "
            "is not whole"
        ) from fault


def outline(folder: Path) -> VLM:
    """The model in a folder on torch's meta device, from its config.json alone; it has no tokenizer."""
    config, recipe = read(folder)
    _look_at_own(config, folder)
    with _readable(folder), torch.device("meta"):
        return _built(config, recipe, None).eval()


def _built(config: dict[str, Any], recipe: ModelRecipe, tokenizer: Any) -> VLM:
    eyes = [towers.build_tower(TowerFacts.from_dict(facts)) for facts in config["vision"]]
    return join(recipe, eyes, languages.build_language(LanguageFacts(**config["language"])), tokenizer=tokenizer)


def _as_installed(vlm: VLM, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that this transformers gives its towers'; the one that saved them may have had
    others."""
    found = dict(weights)
    for name, tower in vlm.towers.items():
        if isinstance(tower, towers.Tower) and not tower.model.state_dict().keys() <= {
            key.removeprefix(before) for key in weights if key.startswith(before := f"towers.{name}.model.")
        }:
            seen = {key.removeprefix(before): found.pop(key) for key in weights if key.startswith(before)}
            renamed = tower_keys.as_installed(seen, tower.facts.family)
            found |= {before + key: tensor for key, tensor in renamed.items()}
    return found


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model published with its code (peers/remote.py), under our own names."""
    from leveret.model.hf import OUR_NAMES

    def renamed(name: str) -> str:
        found = ((ours, theirs) for ours, theirs in OUR_NAMES.items() if name.startswith(theirs))
        return next((ours.lstrip("^").replace("\\", "") + name.removeprefix(theirs) for ours, theirs in found), name)

    return {renamed(name): tensor for name, tensor in weights.items()}


def find(path: str | Path) -> Path:
    """The model folder that `path` means: itself, or `model` inside a run folder. DataError when there is none."""
    path = Path(path).expanduser()
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    state = "has neither config.json with model.safetensors nor a folder `model` with them" if path.is_dir() else (
        "is no folder" if path.exists() else "does not exist"
    )  # fmt: skip
    raise DataError(
        f"{path} is not a model: it {state}. Give a model folder or the folder of a finished run "
        "(a run that was stopped gets its model when it is started again)"
    )


def config_of(vlm: VLM) -> dict[str, Any]:
    """What config.json holds: the recipe, and the exact facts of every part as it stands in memory."""
    from leveret import __version__

    eyes = [tower for tower in vlm.towers.values() if isinstance(tower, towers.Tower)]
    assert len(eyes) == len(vlm.towers), "only towers of the table can be described"
    head, form = vlm.language.get_output_embeddings(), find_chat(vlm.chat)
    config = vlm.language.config.to_dict()
    config.pop("_name_or_path", None)  # a path of the machine it was built on
    facts = LanguageFacts(
        config=config,
        vocab=int(vlm.language.get_input_embeddings().weight.shape[0]),
        head_bias=getattr(head, "bias", None) is not None,
        attention=vlm.language.config._attn_implementation,
        source=vlm.recipe.language.name,
    )
    written = {
        "format": FORMAT,
        "leveret": __version__,
        **_for_transformers(vlm),
        "recipe": vlm.recipe.model_dump(mode="json"),
        "spec": vlm.spec.to_dict(),
        # training may have chosen another resize since the tower was built; the spec has the last word
        "vision": [
            replace(eye.facts, resize=view.resize).to_dict() for eye, view in zip(eyes, vlm.spec.towers, strict=True)
        ],
        "language": facts.to_dict(),
    }
    if own.is_own(vlm.chat):  # a template is data: whoever loads the model needs no file for it
        written["chat"] = {"name": form.name, "template": form.template, "stop": list(form.stop)}
    if needed := _own_parts(written):
        written["own"] = needed
    return written


def _own_parts(config: Mapping[str, Any]) -> dict[str, str]:
    """Part -> the reference of the user's own file that builds it. What a row only chooses (a published architecture, a
    template) is in config.json as data, and needs none."""
    said = [(f"vision.{facts.get('name')}", facts.get("family")) for facts in config["vision"]]
    said.append(("connector", config["recipe"]["connector"]["kind"]))
    if not languages.is_transformers(config["language"]["config"]):
        said.append(("language", config["recipe"]["language"]["name"]))
    return {part: reference for part, reference in said if own.is_own(reference)}


def own_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Name in the folder -> reference, for every file of the user's own that a model needs."""
    files: dict[str, str] = {}
    for reference in _own_parts(config).values():
        said = own.parse(reference, "model")
        name = Path(said.file).name
        if name in files and own.parse(files[name], "model").fingerprint != said.fingerprint:
            name = f"{Path(name).stem}-{said.fingerprint}.py"
        files.setdefault(name, reference)
    return files


def _look_at_own(config: Mapping[str, Any], folder: Path) -> None:
    """DataError naming the files that a person has to name before this model can be built."""
    try:
        if own.is_own(chat := config["recipe"]["chat"]):
            brought = config["chat"]
            bring(chat, ChatFormat(brought["name"], brought["template"], tuple(brought["stop"])))
        parts = _own_parts(config)
        faults = {reference: own.lacking(reference, f"its {part}") for part, reference in parts.items()}
        files = own_files(config)
    except (KeyError, TypeError, AttributeError, RecipeError) as fault:
        raise DataError(f"{folder / 'config.json'}: its parts cannot be read: {fault!r}") from None
    if said := list(dict.fromkeys(fault for fault in faults.values() if fault)):
        here = [folder / name for name, reference in files.items() if faults[reference]]
        known = next((str(file) for file in here if file.is_file()), f"PATH/{here[0].name}")
        raise DataError(
            f"{folder}: {'; '.join(said)}. leveret runs no code because a model names it: read the file, and if you "
            f"trust it, say so with --own {known} (in Python own=..)"
        )
    for reference in parts.values():
        if reference == config["recipe"]["language"]["name"]:
            own.row(reference, languages.LanguageRow, "model.language.name")  # it registers its classes


def _for_transformers(vlm: VLM) -> dict[str, Any]:
    """What transformers asks of a config.json (`leveret.register`): whose it is, which id stands where an image's
    tokens go, and which ids end an answer."""
    told: dict[str, Any] = {"model_type": "leveret", "architectures": ["LeveretForConditionalGeneration"]}
    if vlm.tokenizer is None:
        return told
    image = vlm.tokenizer.get_vocab().get(IMAGE_MARK)
    ends = getattr(getattr(vlm.language, "generation_config", None), "eos_token_id", None)
    return told | {
        # a tokenizer without the mark gets it behind all others
        "image_token_id": len(vlm.tokenizer) if image is None else image,
        "eos_token_id": sorted(end_ids(find_chat(vlm.chat).stop, vlm.tokenizer, ends)),
        "pad_token_id": vlm.tokenizer.pad_token_id,
    }


def stored(vlm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that a checkpoint holds: parameters and persistent buffers, a tied one once, under the first
    of its names."""
    kept = vlm.state_dict()
    seen: set[int] = set()
    for name, tensor in [*vlm.named_parameters(remove_duplicate=False), *vlm.named_buffers(remove_duplicate=False)]:
        if name in kept and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def fill(vlm: VLM, weights: dict[str, Tensor], folder: Path) -> None:
    """Puts the stored tensors in place of the model's own, type and all, and ties again what is tied."""
    own = dict(stored(vlm))
    faults = [
        f"{kind}: {', '.join(sorted(names)[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
        for kind, names in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys()))
        if names
    ]
    faults += [
        f"wrong shape: {name} is {tuple(weights[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        raise DataError(f"{folder}: the weights are not those of the model in config.json\n  " + "\n  ".join(faults))
    for name, tensor in own.items():
        tensor.data = weights[name]  # in place of the data, so that every name of a tied tensor sees it


def read(folder: Path) -> tuple[dict[str, Any], ModelRecipe]:
    """(config.json as the newest format has it, the recipe in it). DataError where it is none of ours."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as fault:
        raise DataError(f"{folder / 'config.json'}: not JSON ({fault})") from fault
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.json'}: a {type(config).__name__}, where an object with the model belongs")
    if config.get("format") not in READABLE:
        raise DataError(
            f"{folder}: format {config.get('format')!r}, written by leveret {config.get('leveret', '(unknown)')}; this "
            f"leveret reads formats {' and '.join(map(str, READABLE))}. A model of another tool is no leveret folder"
        )
    try:
        if config["format"] == 1:
            config["vision"] = [config["vision"]]
        if "text_config" in config:  # written by transformers' classes
            config["language"]["config"] = config["text_config"]
        return config, ModelRecipe.model_validate(config["recipe"])
    except (KeyError, ValidationError) as fault:
        raise DataError(f"{folder / 'config.json'}: its recipe cannot be read: {fault}") from fault


def tokenizer(folder: Path, rows: int) -> Any:
    """A model folder's tokenizer; None where it has none. What a published model has behind the token table, which has
    so many `rows`, is left out (the image mark): with us a place among the ids is marked, and no id."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    found = languages.load_tokenizer(str(folder), where=str(folder), as_saved=True)
    if found.get_vocab().get(IMAGE_MARK, 0) < rows:
        return found
    with tempfile.TemporaryDirectory() as kept:
        found.save_pretrained(kept)
        for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "extra_special_tokens")):
            said = json.loads((Path(kept) / name).read_text("utf-8"))
            if key in said:
                said[key] = [token for token in said[key] if _content(token) != IMAGE_MARK]
            (Path(kept) / name).write_text(json.dumps(said), "utf-8")
        return languages.load_tokenizer(kept, where=str(folder), as_saved=True)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(folder: Path, fresh: Path) -> None:
    """Renames `fresh` to `folder`. A folder cannot be renamed over a full one, so the old one steps aside first."""
    old = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.old"
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    try:
        _flush(folder.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)
