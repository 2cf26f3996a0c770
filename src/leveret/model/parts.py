"""The table printed before anything is spent: every part, what it holds, what learns, at which rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from leveret.model.tables import unknown
from leveret.model.towers import Tower, whole
from leveret.model.vlm import VLM
from leveret.runs import RecipeError

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("vision", "connector", "language")


class Adapters(Protocol):
    """What this table must know of adapters on the language model."""

    @property
    def rank(self) -> int: ...
    @property
    def targets(self) -> tuple[str, ...] | None: ...


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


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of a model.

    parameters    all of them, a tied one once.
    trainable     how many of them learn (with adapters: the adapters' own, which come on top of `parameters`).
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


def learnable(vlm: VLM, part: str, from_layer: int | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (as in `vlm.named_parameters()`) and parameters that learn when `part` learns.

    Parts of a tower that are kept but do not run are left out. `from_layer` is the first block that learns, counted
    from 0, in every tower; what lies before it (the embeddings too) is left out. RecipeError when the part is unknown,
    has no parameters, or the layer does not run: naming a part that would get no gradient is an error.
    """
    if part not in PARTS:
        raise RecipeError(unknown(dict.fromkeys(PARTS), part, "learn"))
    prefixes = {"vision": ("towers.",), "connector": ("connector.", "tiles."), "language": ("language.",)}[part]
    skipped: set[str] = set()
    if part == "vision":
        for name, tower in vlm.towers.items():
            assert isinstance(tower, Tower)
            skipped |= {f"towers.{name}.{key}" for key, _ in tower.unused()}
            skipped |= {f"towers.{name}.{key}" for key in tower.before(from_layer or 0)}
    elif from_layer is not None:
        raise RecipeError(f"learn.{part}.from_layer: only vision can learn from a layer on")
    found = [
        (name, parameter)
        for name, parameter in vlm.named_parameters()
        if name.startswith(prefixes) and name not in skipped
    ]
    if not found:
        raise RecipeError(f"learn.{part}: this part has no parameters, so nothing would learn; take it out of `learn`")
    yield from found


def parts_table(vlm: VLM, learn: Mapping[str, Learning]) -> list[PartRow]:
    """One row per part. What `learn` does not name is frozen. Works on `meta`. RecipeError as in `learnable`."""
    for part, how in learn.items():
        list(learnable(vlm, part, how.from_layer))
    return [_row(vlm, part, module, learn.get(part)) for part, module in modules(vlm).items()]


def _row(vlm: VLM, part: str, module: nn.Module, how: Learning | None) -> PartRow:
    adapters = {name: p for name, p in module.named_parameters() if "lora_" in name}
    own = [p for name, p in module.named_parameters() if name not in adapters]
    if how is None:
        trainable = 0
    elif how.lora is not None:
        trainable = sum(p.numel() for p in adapters.values()) or adapter_size(module, how.lora)
    else:
        trainable = sum(p.numel() for _, p in learnable(vlm, part, how.from_layer))
    return PartRow(
        part=part,
        parameters=sum(p.numel() for p in own),
        trainable=trainable,
        lr=how.lr if how else None,
        weight_decay=how.weight_decay if how else None,
        dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in own})),
        note=_note(vlm, part, how),
    )


def adapter_size(language: Any, lora: Adapters) -> int:
    """Parameters of adapters of `lora.rank` on the language model's linear layers: rank x (in + out) each.

    All linear layers but the output layer, or those whose last name is in `lora.targets`.
    """
    head = language.get_output_embeddings()
    return sum(
        lora.rank * (layer.in_features + layer.out_features)
        for name, layer in language.named_modules()
        if isinstance(layer, nn.Linear) and (name.split(".")[-1] in lora.targets if lora.targets else layer is not head)
    )


def _note(vlm: VLM, part: str, how: Learning | None) -> str:
    if part == "connector":
        return f"{vlm.recipe.connector.kind}, {tokens_of(vlm)}"
    if part == "language":
        rows, width = vlm.language.get_input_embeddings().weight.shape
        adapters = f", adapters of rank {how.lora.rank}" if how and how.lora else ""
        return f"{vlm.recipe.language.name}, {rows} x {width}{adapters}"
    start = f", from layer {how.from_layer}" if how and how.from_layer else ""
    towers = [tower for tower in vlm.towers.values() if isinstance(tower, Tower)]
    said = "; ".join(_seen(tower) for tower in towers)
    return said + (f"; {vlm.recipe.vision.fusion} fusion" if len(towers) > 1 else "") + start


def tokens_of(vlm: VLM) -> str:
    """How many tokens an image fills, in words."""
    tiling = vlm.spec.tiling
    if tiling is None:
        return f"{vlm.spec.tokens} tokens"
    return f"{vlm.spec.tokens} tokens a tile, at most {tiling.most:,} an image"


def _seen(tower: Tower) -> str:
    idle = sum(p.numel() for _, p in tower.unused())
    kept = f", {idle:,} kept but idle" if idle else ""
    scales = f" at {', '.join(map(str, tower.facts.s2))} pixels" if tower.facts.s2 else ""
    return (
        f"{tower.facts.source}{scales}, {len(tower.blocks)} of {tower.published_depth} layers, "
        f"{tower.tokens} tokens x {tower.width}{kept}"
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
