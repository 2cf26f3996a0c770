"""A model of ours as transformers' classes: `AutoModelForImageTextToText` reads our folders once `register` was called.

    LeveretConfig                    config.json of our folder, with the language model's part as `text_config`
    LeveretModel                     towers, connector and language model without its output layer
    LeveretForConditionalGeneration  the same with it: loss, logits, `generate`

The parts are those of vlm.py and their names those that engines look for (`get_image_features`, `language_model`,
`lm_head`). peers/remote.py writes the classes, and what they need of others, as the code of a published model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from leveret.model.connectors import build_connector
from leveret.model.fusion import fuse, fused
from leveret.model.tiles import Tiles
from leveret.model.tower_facts import TowerFacts
from leveret.model.towers import build_tower
from leveret.records import read_tiling

OUR_NAMES = {
    r"^towers\.": "model.vision_tower.",
    r"^connector\.": "model.multi_modal_projector.",
    r"^tiles\.": "model.tiles.",
    r"^language\.model\.": "model.language_model.",
    r"^language\.lm_head\.": "lm_head.",
}
"""What weights are called in our folders -> what they are called here."""


class LeveretConfig(PretrainedConfig):
    """config.json of a model of ours.

    text_config     the language model's configuration; in our own folders it stands in `language`.
    vision          facts of every tower, in fusion order.
    recipe, spec    how the parts are joined, and what the towers want to see.
    language        what else rebuilds the language model (`head_bias`).
    image_token_id  stands in `input_ids` where an image's tokens go; may lie behind the token table.
    """

    model_type = "leveret"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers' own declaration)

    def __init__(
        self,
        text_config: Any = None,
        vision: Any = (),
        language: Any = None,
        recipe: Any = None,
        spec: Any = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        said = {**(language or {})}
        given = said.pop("config", None)
        text = text_config if text_config is not None else given or {"model_type": "llama"}
        if isinstance(text, dict):
            rows = {"vocab_size": said["vocab"]} if text_config is None and said.get("vocab") else {}
            text = AutoConfig.for_model(**{**text, **rows})
        self.text_config = text
        self.vision = [vision] if isinstance(vision, dict) else list(vision)
        self.language = said
        self.recipe = recipe or {}
        self.spec = spec or {}
        self.image_token_id = image_token_id
        kwargs["tie_word_embeddings"] = bool(getattr(text, "tie_word_embeddings", False))
        super().__init__(**kwargs)


@dataclass
class LeveretOutput(ModelOutput):
    """What one forward pass gives. loss: the mean over supervised positions. logits [B, T, V] and last_hidden_state
    [B, T, D]: one of the two, by the class. image_hidden_states: the images' tokens [N, m, D], in tiles [M, D]."""

    loss: Any = None
    logits: Any = None
    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    image_hidden_states: Any = None


class LeveretPreTrainedModel(PreTrainedModel):
    config_class = LeveretConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; weights may have the names of our own folders."""
        kwargs.setdefault("key_mapping", OUR_NAMES)
        return super().from_pretrained(*args, **kwargs)


class LeveretModel(LeveretPreTrainedModel):
    """Towers, a connector and a language model, joined by one scatter."""

    def __init__(self, config: LeveretConfig) -> None:
        super().__init__(config)
        towers = [build_tower(TowerFacts.from_dict(facts)) for facts in config.vision]
        self.vision_tower = nn.ModuleDict({tower.facts.name: tower for tower in towers})
        self.fusion = config.recipe["vision"].get("fusion", "channel")
        tokens, width = fused([(tower.facts.name, tower.tokens, tower.width) for tower in towers], self.fusion)
        kind, options = config.recipe["connector"]["kind"], config.recipe["connector"].get("options", {})
        hidden = config.text_config.hidden_size
        self.multi_modal_projector = build_connector(kind, width, hidden, tokens, options)
        self.dropout = float(config.recipe["connector"].get("dropout", 0.0))
        tiling = read_tiling(config.spec.get("tiling"))
        self.tiles = None if tiling is None else Tiles(tiling, hidden)
        self.language_model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` [N, m, D], in tiles N times [m, D]: what stands at an image's positions;
        `last_hidden_state`: what the towers see.

        pixel_values  [N, 3, S, S]; of several towers [N, towers, 3, S, S] in fusion order, where a tower that sees less
                      than the largest finds its pixels in the upper left corner. In tiles [N, T, 3, S, S] or
                      [N, T, towers, 3, S, S]; or for every image its own [T, ..].
        image_sizes   [N, 2], (height, width) of the images; only in tiles, and there says how many T are.

        ValueError when the sizes are not given, or do not fit the tiles.
        """
        if self.tiles is None:
            features = self.see(pixel_values)
            return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.connect(features))
        if image_sizes is None or len(image_sizes) != len(pixel_values):
            raise ValueError("this model sees images in tiles: give image_sizes, (height, width) of every image")
        tiling = self.tiles.tiling
        sizes = [(int(height), int(width)) for height, width in torch.as_tensor(image_sizes).tolist()]
        counts = [tiling.tiles(*size) for size in sizes]
        whole = 4 if len(self.vision_tower) == 1 else 5  # an engine may give every image a row of its own around it
        given = [tiles.flatten(0, 1) if tiles.dim() > whole else tiles for tiles in pixel_values]
        tiles = [tiles[:count] for tiles, count in zip(given, counts, strict=True)]
        owner = torch.tensor([image for image, own in enumerate(tiles) for _ in range(len(own))])
        features = self.see(torch.cat(tiles))
        laid = self.tiles(self.connect(features), owner, torch.tensor(sizes))  # [K, D]
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=laid.split([tiling.count(*size) for size in sizes])
        )

    def connect(self, features: Tensor) -> Tensor:
        """Features [N, n, W] in the language model's width: [N, m, D]."""
        kind = next((x.dtype for x in self.multi_modal_projector.parameters()), self.language_model.dtype)
        dropped = F.dropout(features.to(kind), self.dropout, self.training)
        return self.multi_modal_projector(dropped)

    def see(self, pixel_values: Tensor) -> Tensor:
        """What the towers see of pictures [N, 3, S, S], or [N, towers, 3, S, S]: [N, n, W]."""
        towers = list(self.vision_tower.values())
        seen = [pixel_values] if len(towers) == 1 else pixel_values.unbind(1)
        sizes = [tower.facts.size for tower in towers]
        seen = [pixels[..., :size, :size] for pixels, size in zip(seen, sizes, strict=True)]
        return fuse([tower(pixels) for tower, pixels in zip(towers, seen, strict=True)], self.fusion)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> LeveretOutput:
        """ValueError when image positions and image tokens disagree, or not one of ids and embeddings is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and input_ids is None:
            raise ValueError("pixel_values need input_ids, which say where the images stand")
        visual = None
        if input_ids is not None:
            marks = input_ids == (-1 if self.config.image_token_id is None else self.config.image_token_id)
            # an id behind the token table is no fault here, its row is written over; one in it may also be said
            behind = marks & (input_ids >= self.config.text_config.vocab_size)
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(behind, 0))
            if pixel_values is not None:
                visual = self.get_image_features(pixel_values, image_sizes, return_dict=True).pooler_output
                if self.tiles is not None:
                    visual = torch.cat(visual)
            tokens = 0 if visual is None else visual.shape[:-1].numel()
            # a lone id is a step of an answer: nothing is counted there, which would make a device wait
            if (tokens or input_ids.shape[1] > 1) and (marked := int(marks.sum())) != tokens:
                raise ValueError(
                    f"images and marks disagree: {marked} positions hold image_token_id "
                    f"({self.config.image_token_id}), but the images give {tokens} tokens"
                )
            if visual is not None:
                inputs_embeds = inputs_embeds.masked_scatter(marks.unsqueeze(-1), visual.to(inputs_embeds))
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "return_dict": True},
        )
        return LeveretOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual,
        )


class LeveretForConditionalGeneration(LeveretPreTrainedModel, GenerationMixin):
    """`LeveretModel` and the output layer."""

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: LeveretConfig) -> None:
        super().__init__(config)
        self.model = LeveretModel(config)
        text = config.text_config
        self.lm_head: nn.Module = nn.Linear(
            text.hidden_size, text.vocab_size, bias=bool(config.language.get("head_bias", False))
        )
        table = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is table)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    def scaled(self, logits: Tensor) -> Tensor:
        """What families do to their logits: Granite divides, Cohere multiplies, Gemma 2 caps."""
        text = self.config.text_config
        if scale := getattr(text, "logits_scaling", None):
            logits = logits / scale
        if scale := getattr(text, "logit_scale", None):
            logits = logits * scale
        if cap := getattr(text, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LeveretOutput:
        """labels [B, T]: not shifted, -100 where nothing is supervised. logits_to_keep: how many, from the end; 0 is
        all."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        hidden = hidden[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept, :]
        logits = self.scaled(self.lm_head(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return LeveretOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def register() -> None:
    """Lets transformers' Auto classes read folders of ours: `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`,
    `AutoProcessor`. Calling it again changes nothing."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from leveret.model.hf_inputs import FolderProcessor

    AutoConfig.register(LeveretConfig.model_type, LeveretConfig, exist_ok=True)
    AutoModel.register(LeveretConfig, LeveretModel, exist_ok=True)
    AutoModelForImageTextToText.register(LeveretConfig, LeveretForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LeveretConfig, FolderProcessor, exist_ok=True)
