"""The `model:` part of a recipe: which tower, connector, language model and chat format make the model.

Ids are rows of the tables in towers.py, connectors.py, language.py and inputs/chat.py; they are checked when the
model is built, so that a saved model can be read where a path it was once built from is gone.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from leveret.records import Resize

Kept = Literal["layers", "norm", "head"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class VisionRecipe(_Strict):
    """The model's eyes."""

    tower: str = Field(description="A row of TOWERS, or the path of a Hugging Face folder.")
    layer: int | None = Field(
        default=None,
        description="Which hidden state is taken, as an index into [embeddings, block 1, ..]: -2 is the last block but "
        "one. Default: the tower's row.",
    )
    resize: Resize | None = Field(default=None, description="How an image becomes a square. Default: the tower's row.")
    keep: list[Kept] = Field(
        default_factory=list,
        description="Published parts of the tower that the chosen layer does not need but the checkpoint shall carry.",
    )


class ConnectorRecipe(_Strict):
    """What turns the tower's tokens into the language model's."""

    kind: str = Field(default="mlp2x_gelu", description="A row of CONNECTORS; mlpNx_gelu with any N.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="The row's own settings, for example {queries: 64}; docs/connectors.md has all.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="While the connector learns, this share of its input numbers is dropped: what one number says of a "
        "pair of attributes it cannot lean on, so it composes better.",
    )

    @field_validator("options", mode="before")
    @classmethod
    def _none(cls, options: Any) -> Any:
        """`options: null` takes away what a recipe further up `extends` has set."""
        return {} if options is None else options


class LanguageRecipe(_Strict):
    """The language model."""

    name: str = Field(description="A row of LANGUAGES, a Hugging Face id or the path of a Hugging Face folder.")
    vocab: int | None = Field(
        default=None, gt=0, description="Rows of the token tables, where not as published (Bunny: len(tokenizer))."
    )
    head_bias: bool = Field(default=True, description="False drops the bias of the output layer where there is one.")
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="transformers' attention code. Default: the row's, else transformers' choice."
    )


class ModelRecipe(_Strict):
    """A whole model."""

    vision: VisionRecipe
    connector: ConnectorRecipe = Field(default_factory=ConnectorRecipe)
    language: LanguageRecipe
    chat: str = Field(description="A row of CHATS: the chat format the model speaks.")
