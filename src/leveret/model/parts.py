"""The table printed before anything is spent: every part, what it holds, what learns, at which rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from leveret.model.tables import unknown
from leveret.model.towers import Tower, whole
from leveret.model.vlm import VLM
from leveret.records import NaFlex
from leveret.runs import RecipeError

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("vision", "connector", "language")
PREFIXES = {"vision": ("towers.",), "connector": ("connector.", "tiles."), "language": ("language.",)}
"""What the names of a part's parameters begin with. The newline of tiles learns with the connector."""


class Adapters(Protocol):
    """What this table must know of adapters on a part."""

    @property
    def rank(self) -> int: ...
    @property
    def targets(self) -> tuple[str, ...] | None: ...
    @property
    def dora(self) -> bool: ...
    @property
    def embeddings(self) -> bool: ...
    @property
    def bits(self) -> int | None: ...


class Learning(Protocol):
    """What this table must know of how a part learns; train/stages.py has the whole of it."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float | None: ...
    @property
    def lora(self) -> Adapters | None: ...
    @property
    def from_layer(self) -> int | None: ...
    @property
    def towers(self) -> tuple[str, ...] | None: ...


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of a model.

    parameters    all of them, a tied one once.
    trainable     how many of them learn (with adapters: the adapters' own, which come on top of `parameters`, and the
                  embeddings where these learn too).
    lr            peak learning rate, None when frozen.
    weight_decay  the part's own, None where the stage's holds.
    """

    part: str
    parameters: int
    trainable: int
    lr: float | None
    weight_decay: float | None
    dtype: str
    note: str


def modules(vlm: VLM) -> dict[str, nn.Module]:
    """The model's parts by the names that recipes use. The newline of tiles learns with the connector."""
    connector = vlm.connector if vlm.tiles is None else nn.ModuleDict({"connector": vlm.connector, "tiles": vlm.tiles})
    return {"vision": vlm.towers, "connector": connector, "language": vlm.language}


def learnable(
    vlm: VLM, part: str, from_layer: int | None = None, towers: tuple[str, ...] | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (as in `vlm.named_parameters()`) and parameters that learn when `part` learns.

    Parts of a tower that are kept but do not run are left out. `from_layer` is the first block that learns, counted
    from 0, in every tower or in the language model; what lies before it (the embeddings too, unless it is 0) is left
    out. `towers`, by the names of their views, are the only ones that learn. RecipeError when the part is unknown, has
    no parameters, or the layer does not run: naming a part that would get no gradient is an error.
    """
    if part not in PARTS:
        raise RecipeError(unknown(dict.fromkeys(PARTS), part, "learn"))
    skipped: set[str] = set()
    if part == "vision":
        for name in towers or ():
            if name not in vlm.towers:
                raise RecipeError(unknown(dict.fromkeys(vlm.towers), name, "learn.vision.towers"))
        for name, tower in vlm.towers.items():
            assert isinstance(tower, Tower)
            if towers is not None and name not in towers:
                skipped |= {f"towers.{name}.{key}" for key, _ in tower.named_parameters()}
                continue
            skipped |= {f"towers.{name}.{key}" for key, _ in tower.unused()}
            skipped |= {f"towers.{name}.{key}" for key in tower.before(from_layer or 0)}
    elif part == "language":
        skipped = {f"language.{key}" for key in _before(vlm.language, from_layer or 0)}
    elif from_layer is not None:
        raise RecipeError(f"learn.{part}.from_layer: a connector has no layers to learn from; vision and language do")
    found = [
        (name, parameter)
        for name, parameter in vlm.named_parameters()
        if name.startswith(PREFIXES[part]) and name not in skipped
    ]
    if not found:
        raise RecipeError(f"learn.{part}: this part has no parameters, so nothing would learn; take it out of `learn`")
    yield from found


def _before(language: Any, layer: int) -> set[str]:
    """Names of a language model's parameters that come before its block `layer` (from 0): the embeddings (an output
    layer that is tied to them too) and earlier blocks; none for 0. RecipeError when there is no such block."""
    if layer == 0:
        return set()
    decoder = language.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise RecipeError(
            f"learn.language.from_layer: the blocks of a {type(language).__name__} are not found under `layers`; only "
            "the whole of it can learn"
        )
    if layer >= len(layers):
        raise RecipeError(
            f"learn.language.from_layer: {layer} given, but this language model has layers 0 to {len(layers) - 1}; "
            "nothing would learn"
        )
    children = list(decoder.children())
    after = [*layers[layer:], *children[children.index(layers) + 1 :]]
    after += [part for part in language.children() if decoder not in set(part.modules())]
    tied = {id(value) for value in language.get_input_embeddings().parameters()}
    learns = {id(value) for part in after for value in part.parameters()} - tied
    return {name for name, value in language.named_parameters() if id(value) not in learns}


def adaptable(vlm: VLM, part: str, how: Learning) -> dict[str, nn.Linear]:
    """The linear layers of a part that may get adapters, by their names in the model: those whose weights would learn,
    but the output layer, one inside torch's own attention, which never calls it, and a
    connector that is nothing else. RecipeError as in `learnable`."""
    # an adapter that is there already has put its layer a step further down
    weights = {name.replace(".base_layer.", ".") for name, _ in learnable(vlm, part, how.from_layer, how.towers)}
    head = vlm.language.get_output_embeddings()
    inside = {
        id(piece) for module in vlm.modules() if isinstance(module, nn.MultiheadAttention) for piece in module.modules()
    }
    return {
        name: module
        for name, module in vlm.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in weights and ".lora_" not in name
        and module is not head and name.rpartition(".")[2] != "lm_head" and id(module) not in inside
        and name != "connector"  # nobody could swap it
    }  # fmt: skip


def parts_table(vlm: VLM, learn: Mapping[str, Learning]) -> list[PartRow]:
    """One row per part. What `learn` does not name is frozen. Works on `meta`. RecipeError as in `learnable`."""
    for part, how in learn.items():
        list(learnable(vlm, part, how.from_layer, how.towers))
    return [_row(vlm, part, module, learn.get(part)) for part, module in modules(vlm).items()]


def _row(vlm: VLM, part: str, module: nn.Module, how: Learning | None) -> PartRow:
    adapters = {name: p for name, p in module.named_parameters() if "lora_" in name}
    own = [p for name, p in module.named_parameters() if name not in adapters]
    if how is None:
        trainable = 0
    elif how.lora is not None:
        trainable = sum(p.numel() for p in adapters.values()) or adapter_size(vlm, part, how)
        trainable += embeddings_size(vlm, how)
    else:
        trainable = sum(p.numel() for _, p in learnable(vlm, part, how.from_layer, how.towers))
    return PartRow(
        part=part,
        parameters=sum(p.numel() for p in own),
        trainable=trainable,
        lr=how.lr if how else None,
        weight_decay=how.weight_decay if how else None,
        dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in own})),
        note=_note(vlm, part, how),
    )


def adapted(vlm: VLM, part: str, how: Learning) -> dict[str, nn.Linear]:
    """Of the layers that may get adapters those that do: all, or those whose last name is in `how.lora.targets`."""
    assert how.lora is not None
    found = adaptable(vlm, part, how)
    named = how.lora.targets
    return {name: layer for name, layer in found.items() if named is None or name.rpartition(".")[2] in named}


def adapter_size(vlm: VLM, part: str, how: Learning) -> int:
    """Parameters of the adapters that a part would get: rank x (in + out) for each layer, and DoRA's length of each
    output."""
    assert how.lora is not None
    return sum(
        how.lora.rank * (layer.in_features + layer.out_features) + how.lora.dora * layer.out_features
        for layer in adapted(vlm, part, how).values()
    )


def embeddings(vlm: VLM) -> dict[str, nn.Parameter]:
    """The embeddings' weights by their name in the model, and those of an output layer that is not tied to them."""
    modules = vlm.language.get_input_embeddings(), vlm.language.get_output_embeddings()
    wanted = {id(module.weight) for module in modules if module is not None}
    return {name: p for name, p in vlm.named_parameters() if id(p) in wanted}


def embeddings_size(vlm: VLM, how: Learning) -> int:
    """Parameters of the embeddings that learn beside adapters; 0 where they do not."""
    return sum(p.numel() for p in embeddings(vlm).values()) if how.lora is not None and how.lora.embeddings else 0


def _note(vlm: VLM, part: str, how: Learning | None) -> str:
    start = f", from layer {how.from_layer}" if how and how.from_layer else ""
    start += f", only {' and '.join(how.towers)}" if how and how.towers else ""
    start += _adapters(how.lora) if how and how.lora else ""
    if part == "connector":
        return f"{vlm.recipe.connector.kind}, {tokens_of(vlm)}{start}"
    if part == "language":
        rows, width = vlm.language.get_input_embeddings().weight.shape
        return f"{vlm.recipe.language.name}, {rows} x {width}{start}"
    towers = [tower for tower in vlm.towers.values() if isinstance(tower, Tower)]
    said = "; ".join(_seen(tower) for tower in towers)
    return said + (f"; {vlm.recipe.vision.fusion} fusion" if len(towers) > 1 else "") + start


def _adapters(lora: Adapters) -> str:
    kept = f" on weights of {lora.bits} bits" if lora.bits else ""
    more = " and the embeddings" if lora.embeddings else ""
    return f", {'DoRA ' if lora.dora else ''}adapters of rank {lora.rank}{kept}{more}"


def tokens_of(vlm: VLM) -> str:
    """How many tokens an image fills, in words."""
    tiling = vlm.spec.tiling
    if tiling is None:
        return f"{vlm.spec.tokens} tokens"
    if isinstance(tiling, NaFlex):
        return f"at most {tiling.most:,} tokens"
    return f"{vlm.spec.tokens} tokens a tile, at most {tiling.most:,} an image"


def _seen(tower: Tower) -> str:
    idle = sum(p.numel() for _, p in tower.unused())
    kept = f", {idle:,} kept but idle" if idle else ""
    scales = f" at {', '.join(map(str, tower.facts.s2))} pixels" if tower.facts.s2 else ""
    return (
        f"{tower.facts.source}{scales}, {len(tower.blocks)} of {tower.published_depth} layers, "
        f"{'at most ' if tower.facts.patches else ''}{tower.tokens} tokens x {tower.width}{kept}"
    )


def count(vlm: VLM) -> int:
    """Parameters of the model, a tied one once, without adapters."""
    return sum(p.numel() for name, p in vlm.named_parameters() if "lora_" not in name)


def count_whole(vlm: VLM) -> int:
    """The same if every tower were kept whole: all layers, norm and head."""
    towers = [tower for tower in vlm.towers.values() if isinstance(tower, Tower)]
    return count(vlm) + sum(whole(t.facts) - sum(p.numel() for p in t.parameters()) for t in towers)


def totals(vlm: VLM) -> list[str]:
    """The lines under the table: image tokens and both counts."""
    lines = [f"{tokens_of(vlm).replace(' tokens', ' image tokens', 1)}; {count(vlm):,} parameters"]
    if (full := count_whole(vlm)) != count(vlm):
        lines.append(f"{full:,} parameters with the full tower (every layer, norm and head)")
    return lines


def render(rows: list[PartRow], vlm: VLM | None = None) -> Table:
    """The rows as a rich table; with the model, its totals stand below."""
    from rich.table import Table

    table = Table(title="parts", title_justify="left", caption="\n".join(totals(vlm)) if vlm else None)
    table.caption_justify = "left"
    for name in ("part", "parameters", "trainable", "lr", "weight decay", "dtype"):
        table.add_column(name, justify="left" if name in ("part", "dtype") else "right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in rows:
        decay = "" if row.lr is None else "the stage's" if row.weight_decay is None else f"{row.weight_decay:g}"
        lr = "frozen" if row.lr is None else f"{row.lr:g}"
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", lr, decay, row.dtype, row.note)
    return table
