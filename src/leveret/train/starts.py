"""Weights to begin with: those of an earlier run or of any model, of ours or of another tool, whole or in parts.

The recipe says what the model is; a start only fills it. What does not fit by name, shape or settings is refused whole
and listed. Of a part that is filled no backbone is fetched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.model.parts import PARTS, PREFIXES
from leveret.runs import DataError, EnvironmentFault, RecipeError, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from leveret.model.vlm import VLM
    from leveret.train.stages import Start, TrainRecipe

MOST = 3
"""Names that a refusal lists of each kind."""

SETTINGS = ("model_type", "hidden_act", "num_attention_heads", "num_key_value_heads", "rope_parameters")
"""Of a backbone's configuration: what changes its numbers and cannot be told from the shapes of its weights."""


@dataclass(frozen=True)
class Brought:
    """What a start brings, under our names.

    idle       names in `state` that do not run where they come from.
    settings   part -> what of SETTINGS its backbones say there. tokenizer: of its language model, where that is read.
    """

    state: Mapping[str, Tensor]
    idle: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None


def parts_of(how: Start) -> tuple[str, ...]:
    """The parts that a start fills."""
    return tuple(how.parts or PARTS)


def of_stage(recipe: TrainRecipe, name: str | None) -> dict[str, Start]:
    """The starts of a stage, by their key paths, in the order in which they are laid; without a name what the run
    begins with."""
    found = {}
    if recipe.start is not None and name in (None, next(iter(recipe.stages))):
        found["start"] = recipe.start
    if name is not None and (own := recipe.stages[name].start) is not None:
        found[f"stages.{name}.start"] = own
    return found


def begin(recipe: TrainRecipe, folder: str | Path | None, device: str, name: str | None = None) -> VLM:
    """The model that the stage `name` begins with: the one in `folder`, or the recipe's backbones, with its starts laid
    over. DataError where one of them does not fit, EnvironmentFault where it cannot be had."""
    from leveret.model.build import build
    from leveret.model.checkpoint import load

    laid = of_stage(recipe, name)
    if folder is not None:
        vlm, empty = load(folder, device), set[str]()
    else:
        empty = {part for how in laid.values() for part in parts_of(how)}
        vlm = build(recipe.model, device=device, seed=recipe.seed, empty=empty)
    for where, how in laid.items():
        lay(vlm, how, where, empty)
        empty -= {*parts_of(how)}
    return vlm


def look(recipe: TrainRecipe, chosen: Sequence[str], *, strict: bool = True) -> None:
    """DataError with every start of the chosen stages that is not there, or does not fit the recipe's model as far as
    its settings and the heads of its files tell, before anything is computed. strict: False passes over those that are
    not on this machine."""
    from leveret.model.build import build_meta

    laid = {where: how for name in chosen for where, how in of_stage(recipe, name).items()}
    laid = {where: how for where, how in laid.items() if strict or Path(how.source).expanduser().exists()}
    if not laid:
        return
    vlm, faults = build_meta(recipe.model), []
    first = of_stage(recipe, next(iter(recipe.stages)))
    for where, how in laid.items():
        try:
            brought = _outline(how, where)
            if brought is not None:
                _refuse(vlm, brought, how, where, set(parts_of(how)) if where in first else set())
        except DataError as fault:
            faults.append(str(fault))
    if faults:
        raise DataError("\n".join(dict.fromkeys(faults)))


def fingerprint(recipe: TrainRecipe, name: str, below: str) -> str:
    """What binds a run to what a stage begins with. below: of the model before anything is laid over it."""
    laid = of_stage(recipe, name)
    if not laid:
        return below
    found = []
    for where, how in laid.items():
        place = _place(how, where)
        if place.is_dir():  # of ours the weights alone: a run's page may be written again
            weights = place / "model.safetensors"
            place = weights if weights.is_file() else place
        found.append([sha256_of(place), parts_of(how)])
    return sha256_of([below, found])


def base_of(recipe: TrainRecipe, name: str, folder: Path | None) -> tuple[str, set[str]]:
    """(what a stage's adapters say they stand on, parts that were laid over it): a whole model where there is one."""
    laid = of_stage(recipe, name)
    parts = {part for how in laid.values() for part in parts_of(how)}
    if folder is None:
        whole = [how.source for how in laid.values() if parts_of(how) == PARTS]
        return (whole[0], parts - set(PARTS)) if len(laid) == len(whole) == 1 else (recipe.model.language.name, parts)
    return str(folder), parts


def in_words(how: Start) -> str:
    """One line for the plan."""
    here = "" if Path(how.source).expanduser().exists() else " (not on this machine under that name)"
    return f"{' and '.join(parts_of(how)) if how.parts else 'all'} from {how.source}{here}"


def lay(vlm: VLM, how: Start, where: str, empty: Collection[str] = ()) -> None:
    """Put what a start brings into `vlm`, in the types that are there; the language model brings its tokenizer.

    where  the start's key path, for messages. empty: parts of `vlm` that hold nothing yet, so that what does not run
           must come too.
    DataError naming what is missing, unexpected, of another shape or of other settings.
    """
    import torch

    brought = read(how, where)
    own, given = _refuse(vlm, brought, how, where, empty)
    if "language" in parts_of(how) and brought.tokenizer is not None:
        rows = vlm.language.get_input_embeddings().weight.shape[0]
        if len(brought.tokenizer) > rows:
            raise DataError(
                f"{where}: the tokenizer of {how.source} has {len(brought.tokenizer)} tokens, and the token table "
                f"{rows} rows"
            )
        vlm.tokenizer = brought.tokenizer
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])


State = dict[str, "Tensor"]


def _refuse(vlm: VLM, brought: Brought, how: Start, where: str, empty: Collection[str]) -> tuple[State, State]:
    """(the model's own tensors, those that come), of the parts of a start; DataError as `lay` says."""
    from leveret.model.checkpoint import stored

    parts = parts_of(how)
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    own = {name: tensor for name, tensor in stored(vlm) if name.startswith(prefixes)}
    first: dict[int, str] = {id(tensor): name for name, tensor in own.items()}
    # Further names of a tied tensor, and its first: what comes may have both, where they are one tensor there too.
    again = {name: first[id(x)] for name, x in vlm.named_parameters(remove_duplicate=False) if id(x) in first}
    spare = _idle(vlm) - {name for name in own if any(name.startswith(PREFIXES[part]) for part in empty)}
    given = {name: tensor for name, tensor in brought.state.items() if name.startswith(prefixes)}
    faults = {
        "of other settings": [
            f"{part} {key} {brought.settings[part][key]!r} for {mine!r}"
            for part, said in _settings(vlm).items()
            if part in parts and part in brought.settings
            for key, mine in said.items()
            if brought.settings[part][key] != mine
        ],
        "missing": [name for name in own if name not in given and name not in spare],
        "unexpected": [
            name
            for name in given
            if name not in own and name not in brought.idle and given[name] is not given.get(again.get(name, ""))
        ],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    if any(faults.values()) or not given:
        listed = "; ".join(f"{len(names)} {kind}: {_shown(names)}" for kind, names in faults.items() if names)
        raise DataError(
            f"{where}: {how.source} does not fit the recipe's model in {', '.join(parts)}: "
            f"{listed if given else 'it holds nothing of it'}. Say another model, other parts, or a recipe of the same "
            "composition"
        )
    return own, given


def _outline(how: Start, where: str) -> Brought | None:
    """What a start would bring, without reading the weights of a whole model; None where that takes reading them."""
    from leveret.model.sketch import sketch

    alone = parts_of(how) == ("connector",)
    if (place := _place(how, where)).is_file():
        return read(how, where)
    try:
        return _of_model(sketch(place).vlm)
    except (RecipeError, EnvironmentFault):  # adapters, a projector alone, or one that stands on what is not here
        return read(how, where) if alone else None


def read(how: Start, where: str = "start") -> Brought:
    """What a start brings. DataError and EnvironmentFault as `source.locate` and `source.load` raise them.

    A connector alone is read without what its model stands on: from a projector's file or folder (mm_projector.bin of
    Bunny, LLaVA or TinyLLaVA), or out of any model; which is all that Prismatic reads of an earlier stage
    (prismatic/models/vlms/prismatic.py, load_from_checkpoint).
    """
    from leveret.model.hub import read_tensors
    from leveret.model.source import locate, open_given

    if parts_of(how) == ("connector",):
        place = _place(how, where)
        if place.is_file():
            return Brought(_connector(read_tensors(place)))
        given = locate(how.source)
        if not given.ours:
            return Brought(_of_peer(given.folder, given.tool))
        if not given.with_code:
            return Brought(_connector(read_tensors(given.folder / "model.safetensors")))
    elif _place(how, where).is_file():
        raise RecipeError(
            f"{where}.from: {how.source} is a file, which can hold a connector alone; say parts: [connector], or give "
            "a model's folder"
        )
    vlm = open_given(locate(how.source))[0]
    return _of_model(vlm, vlm.tokenizer)


def _of_model(vlm: VLM, tokenizer: Any = None) -> Brought:
    from leveret.model.checkpoint import stored

    kept = vlm.state_dict()
    # under all names of a tied tensor: the model it goes to may have two of it
    tied = {name: tensor for name, tensor in vlm.named_parameters(remove_duplicate=False) if name in kept}
    return Brought({**tied, **dict(stored(vlm))}, frozenset(_idle(vlm)), _settings(vlm), tokenizer)


def _place(how: Start, where: str) -> Path:
    """The file or folder of a start. RecipeError for a file of another kind, DataError where there is none."""
    from leveret.model.source import locate

    path = Path(how.source).expanduser()
    if path.is_file():
        if path.suffix not in (".bin", ".pt", ".pth", ".safetensors"):
            raise RecipeError(f"{where}.from: {path} is no file of weights (.safetensors, .bin, .pt)")
        return path
    try:
        return locate(how.source).folder
    except DataError as fault:
        raise DataError(f"{where}.from: {fault}") from None


def _connector(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The connector among the tensors of a file of any tool."""
    from leveret.model.peers.merged import NEWLINE
    from leveret.model.published import read_state

    flat = {name.removeprefix("model.projector."): x for name, x in weights.items()}  # Prismatic's
    found = {f"connector.{name}": x for name, x in read_state(flat).items()}
    if not found:
        found = {name: x for name, x in weights.items() if name.startswith(PREFIXES["connector"])}
    return found | ({"tiles.newline": weights[NEWLINE]} if NEWLINE in weights else {})


def _of_peer(folder: Path, tool: str) -> dict[str, Tensor]:
    """The connector of a peer's model, without its language model where that stands elsewhere."""
    from leveret.model import peers
    from leveret.model.peers import merged, prismatic

    there = peers.Folder(folder)
    if tool == "merged" and not there.weights():
        return _connector(merged.beside(there))
    if tool == "prismatic":
        ending = next((end for end in ("safetensors", "pt") if there.has(prismatic.WEIGHTS + end)), "pt")
        return _connector(there.tensors(there.path / f"{prismatic.WEIGHTS}{ending}"))
    found = peers.read(folder)
    newline = {} if found.newline is None else {"tiles.newline": found.newline}
    return {f"connector.{name}": tensor for name, tensor in found.connector.items()} | newline


def _idle(vlm: VLM) -> set[str]:
    """Names of what the towers carry though it does not run."""
    from leveret.model.towers import Tower

    towers = {name: tower for name, tower in vlm.towers.items() if isinstance(tower, Tower)}
    return {f"towers.{name}.{key}" for name, tower in towers.items() for key, _ in tower.unused()}


def _settings(vlm: VLM) -> dict[str, dict[str, Any]]:
    """Of each backbone what SETTINGS names; of several towers one after the other."""
    from leveret.model.towers import Tower

    seen = [tower.facts for tower in vlm.towers.values() if isinstance(tower, Tower)]
    return {
        "vision": {key: [facts.config.get(key) for facts in seen] for key in SETTINGS[1:3]}
        | {"family": [facts.family for facts in seen]},
        "language": {key: getattr(vlm.language.config, key, None) for key in SETTINGS},
    }


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(sorted(names)[:MOST]) + more
