"""The model: towers, a connector and a language model, joined by one scatter.

pixels[name] [N, 3, S, S]                          input_ids [B, T]
    |  towers (one or several; fusion.py joins them)       |  the language model's own table
    v                                                   v
features [N, n, W]                                 embeddings [B, T, D]
    |  connector                                        |
    v                                                   v
visual [N, m, D]                                        |
    |  of tiles: put together, [M, D] (tiles.py)        |
    +------- written over image_mask, in reading order ------->  [B, T, D]
                                                        |  the language model's blocks
                                                        v
                                                   hidden [B, T, D]
                                                        |  only rows whose NEXT token is supervised
                                                        v
                                                   logits [K, V]  ->  summed cross entropy

B rows, T positions, N images (or their tiles), n tokens a tower gives, m tokens a connector gives, W and D widths,
K supervised positions, V vocabulary. A batch without images never touches the towers. Nothing here trains, loads or
moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leveret.model.attention import lay, told_bounds
from leveret.model.fusion import fuse
from leveret.model.recipe import ModelRecipe
from leveret.model.rows import only_rows
from leveret.model.tiles import Tiles
from leveret.records import IGNORE, Batch, ImageSpec, NaFlex

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Logits = Literal["supervised", "all", "last"]


@dataclass(slots=True)
class VLMOutput:
    """What one forward pass gives.

    loss_sum    float32 scalar: the cross entropy summed (not averaged) over the supervised positions, so that
                micro-batches and ranks can be weighted by their tokens. Zero for logits="last".
    supervised  how many positions `loss_sum` is a sum over.
    logits      "supervised": [supervised, V]; "all": [B, T, V]; "last": [B, V].
    """

    loss_sum: Tensor
    supervised: int
    logits: Tensor


class VLM(nn.Module):
    """A vision-language model. See the module's docstring for its flow.

    towers     name of a view -> module with `forward(pixels) -> [N, tokens, width]`, in the order of `spec.towers`.
    connector  [N, n, W] -> [N, m, D], where m is `spec.tokens`.
    language   a transformers causal language model (or one that peft has wrapped).
    tiles      puts the tiles of an image together, or takes the tokens that are no padding, where `spec.tiling` says
               that there are any; else None.
    """

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        connector: nn.Module,
        language: Any,
        *,
        spec: ImageSpec,
        recipe: ModelRecipe,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        assert list(towers) == [view.name for view in spec.towers], "towers and views must have the same names"
        self.towers = nn.ModuleDict(towers)
        self.connector = connector
        width = language.get_input_embeddings().weight.shape[1]
        self.tiles = Tiles(spec.tiling, width) if spec.tiling is not None else None
        self.language: Any = language
        self.spec = spec
        self.recipe = recipe
        self.tokenizer: Any = tokenizer

    @property
    def chat(self) -> str:
        """Id of the chat format the model speaks."""
        return self.recipe.chat

    @property
    def device(self) -> torch.device:
        return self.language.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the language model's weights (the masters; what is computed in is the caller's autocast)."""
        return self.language.get_input_embeddings().weight.dtype

    def cast(self, dtype: torch.dtype) -> VLM:
        """Turn what a checkpoint holds into `dtype`, in place. Unlike `.to(dtype)` it leaves computed buffers alone:
        rounding the rotary frequencies would move every position, and the model would differ from its saved self."""
        kept = self.state_dict()
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if name in kept and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        return self

    def see(self, pixels: Mapping[str, Tensor], image_sizes: Tensor | None = None) -> Tensor:
        """Tower outputs [N, n, W], several towers fused as the recipe says; what a feature cache stores.

        image_sizes  as in `records.Batch`; only images at their own shape need it (n is then the most, and zero what an
                     image does not fill).
        Raises ValueError when a tower's pixels are missing, or the sizes.
        """
        if missing := [name for name in self.towers if name not in pixels]:
            raise ValueError(f"no pixels for {missing}: the model's towers are {list(self.towers)}, got {list(pixels)}")
        if isinstance(shape := self.spec.tiling, NaFlex):
            if image_sizes is None:
                raise ValueError("this model sees images at their own shape, and is not told how large they are")
            grids = torch.tensor([shape.grid(*size) for size in image_sizes.tolist()], device="cpu")
            return fuse([tower(pixels[name], grids) for name, tower in self.towers.items()], "channel")
        return fuse([tower(pixels[name]) for name, tower in self.towers.items()], self.recipe.vision.fusion)

    def visual(self, batch: Batch) -> tuple[Tensor | None, int]:
        """What stands in the text for the images of a batch, [N, m, D] or, of tiles, [M, D], and how many it saw."""
        features = batch.features
        if features is None and batch.pixels:
            features = self.see(batch.pixels, batch.image_sizes)
        if features is None or not len(features):
            return None, 0
        # What was frozen while the model was taught on a GPU stands in bf16 beside what learned, in float32.
        kind = next((x.dtype for x in self.connector.parameters() if x.is_floating_point()), self.dtype)
        dropped = F.dropout(features.to(kind), self.recipe.connector.dropout, self.connector.training)
        visual = self.connector(dropped)  # [N, m, D]
        if self.tiles is not None:
            visual = self.tiles(visual, batch.tile_image, batch.image_sizes)  # [M, D]
        return visual, len(features)

    def embed(self, batch: Batch, blank: Batch | None = None) -> Tensor:
        """Input embeddings [B, T, D]: the table's rows, with the images' tokens written over `image_mask`.

        Ids at image positions may be anything valid, because their rows are replaced. Raises ValueError naming both
        counts when there are not as many image positions as image tokens.

        blank  shows an image that goes through tower and connector with weight zero where `batch` shows none: ranks
               that hold a share of the model each must all run the same modules (train/strategy.py).
        """
        embeddings = self.language.get_input_embeddings()(batch.input_ids)
        visual, seen = self.visual(batch)
        if visual is None and blank is not None:
            unseen, _ = self.visual(blank)
            assert unseen is not None, "a blank batch shows an image"
            embeddings = embeddings + 0 * unseen.sum().to(embeddings.dtype)
        tokens = 0 if visual is None else visual.shape[:-1].numel()
        if (marked := int(batch.image_mask.sum())) != tokens:
            what = "image" if self.tiles is None or isinstance(self.spec.tiling, NaFlex) else "tile"
            raise ValueError(
                f"images and marks disagree: image_mask marks {marked} positions, but {seen} {what}(s) give {tokens} "
                f"tokens ({self.spec.tokens} each); samples {', '.join(batch.ids) or '(without ids)'}"
            )
        if visual is None:
            return embeddings
        return embeddings.masked_scatter(batch.image_mask.unsqueeze(-1), visual.to(embeddings.dtype))

    def forward(self, batch: Batch, *, logits: Logits = "supervised", blank: Batch | None = None) -> VLMOutput:
        """Summed loss and logits of a batch.

        The output layer, and what only it reads (rows.py), runs on the rows asked for: "supervised" (training), "last"
        (the next token of every row) or "all". Labels are shifted here, never across a segment; padding is masked on
        either side. `blank` as in `embed`.
        """
        embeddings = self.embed(batch, blank)  # [B, T, D]
        targets = next_labels(batch)  # [B, T]; IGNORE where the next token is not supervised
        rows = {"supervised": targets != IGNORE, "last": last_real(batch.attention_mask), "all": None}[logits]
        told = attention_inputs(batch, self.language)
        with only_rows(self.language, rows):
            scores = self.language(inputs_embeds=embeddings, use_cache=False, **told).logits
        if rows is not None:
            scores = scores.squeeze(0)  # [K, V]
        if logits == "last":
            return VLMOutput(scores.new_zeros((), dtype=torch.float32), 0, scores)
        chosen = targets[targets != IGNORE]  # [K]
        predicted = scores if rows is not None else scores[targets != IGNORE]
        loss = F.cross_entropy(predicted.float(), chosen, reduction="sum")
        return VLMOutput(loss, len(chosen), scores)

    @torch.no_grad()
    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """New token ids [B, <= max_new_tokens] by transformers' own generate; for compatibility and as a yardstick.

        Rows must be padded on the left. `options` go to transformers unchanged.
        """
        return self.language.generate(
            inputs_embeds=self.embed(batch), attention_mask=batch.attention_mask.long(), **options
        )


def next_labels(batch: Batch) -> Tensor:
    """What position t must predict: the label of t + 1 when that is in the same segment, else IGNORE. [B, T]."""
    targets = torch.full_like(batch.labels, IGNORE)
    same = batch.segments[:, 1:] == batch.segments[:, :-1]
    targets[:, :-1] = batch.labels[:, 1:].masked_fill(~same, IGNORE)
    return targets


def last_real(attention_mask: Tensor) -> Tensor:
    """One True per row, at its last position that is not padding. bool [B, T]."""
    place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = place.masked_fill(~attention_mask.bool(), -1).amax(dim=1, keepdim=True)
    return place == last.clamp(min=0)


def attention_inputs(batch: Batch, language: Any) -> dict[str, Any]:
    """How the language model is told who may attend to whom.

    One sample a row: the usual mask and positions. Several samples packed in one row: where they begin, to attention
    that takes it (`attention.py`, FlashAttention); the plain causal mask is then all it needs besides. For any other
    attention transformers derives a mask of blocks from positions that restart, but only if it gets no attention mask
    and no cache; otherwise samples leak into each other without a warning. Padding then gets position 0 and is a
    segment of its own.
    """
    positions = batch.position_ids.masked_fill(~batch.attention_mask.bool(), 0)
    ours = bool(batch.bounds) and told_bounds(language)
    lay(batch.bounds if ours else ())
    if ours:
        return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
    if not (batch.segments > 0).any():
        return {"position_ids": positions, "attention_mask": batch.attention_mask}
    return {"position_ids": positions, "attention_mask": None} | flash_bounds(batch, language)


def flash_bounds(batch: Batch, language: Any) -> dict[str, Any]:
    """Where the samples of a packed row begin, as transformers' FlashAttention is told it."""
    if not batch.bounds or "flash" not in str(language.config._attn_implementation):
        return {}
    begins = torch.tensor(batch.bounds, dtype=torch.int32, device=batch.input_ids.device)
    longest = max(end - begin for begin, end in pairwise(batch.bounds))
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
