"""Language models: any transformers causal language model; the table names those whose exact configuration is known.

A row is only needed to compose a model without its weights (`--dry-run`) and for facts the configuration does not
hold. A folder, or any other id of the hub, works without one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from leveret.model.hub import from_pretrained, missing, package_file, read_config
from leveret.model.recipe import LanguageRecipe
from leveret.model.tables import unknown
from leveret.model.towers import backbones
from leveret.runs import RecipeError


@dataclass(frozen=True, slots=True)
class LanguageRow:
    """A language model with a name: an entry of backbones.json, or a folder of this package.

    attention  transformers' attention code, where the default is not the best. The drawn world's model is so narrow
               that plain matrix products are 1.6 to 1.9 times as fast as sdpa on CPU under bf16 autocast.
    """

    package: str = ""
    attention: str | None = None


LANGUAGES: dict[str, LanguageRow] = {
    "world/language": LanguageRow(package="world/weights/language", attention="eager"),
    "microsoft/phi-2": LanguageRow(),
    "microsoft/phi-1_5": LanguageRow(),
    "Qwen/Qwen2.5-0.5B": LanguageRow(),
    "HuggingFaceTB/SmolLM2-135M": LanguageRow(),
    "HuggingFaceTB/SmolLM2-360M": LanguageRow(),
    "meta-llama/Llama-3.2-1B": LanguageRow(),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": LanguageRow(),
}


@dataclass(frozen=True, slots=True)
class LanguageFacts:
    """Everything that rebuilds a language model without its row; saved in a model's config.json.

    source  where weights and tokenizer come from: a folder or an id of the hub.
    """

    config: Mapping[str, Any]
    vocab: int
    head_bias: bool
    attention: str | None
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(recipe: LanguageRecipe, where: str = "model.language") -> LanguageFacts:
    """The facts of the language model a recipe names, without building it.

    Raises RecipeError when the name is no row, folder or reachable id, EnvironmentFault when the package's own
    weights are not there.
    """
    row = LANGUAGES.get(recipe.name, LanguageRow())
    source = recipe.name
    if row.package:
        source = str(package_file(row.package, recipe.name))
        config = read_config(Path(source))
    elif recipe.name in LANGUAGES:
        config = backbones()["language"][recipe.name]["config"]
    elif (Path(recipe.name) / "config.json").is_file():
        config = read_config(Path(recipe.name))
    else:
        config = _hub_config(recipe.name, where)
    full = _full(config, f"{where}.name", recipe.name)
    return LanguageFacts(
        config=full,
        vocab=recipe.vocab or int(full["vocab_size"]),
        head_bias=recipe.head_bias,
        attention=recipe.attention or row.attention,
        source=source,
    )


def _full(config: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    """The configuration with every default written out."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if config.get("model_type") not in CAUSAL:
        raise RecipeError(
            f"{where}: {name} is a {config.get('model_type')!r} model, which is no causal language model that "
            "transformers knows; leveret runs no code from model repositories"
        )
    return AutoConfig.for_model(**config).to_dict()


def _hub_config(name: str, where: str) -> dict[str, Any]:
    from transformers import AutoConfig

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RecipeError(f"{where}.name: {name} is given, but there is no config.json in that folder")
    if name.count("/") != 1:
        raise RecipeError(unknown(LANGUAGES, name, f"{where}.name", ", an id of the hub (owner/name), or a folder"))
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as fault:
        raise missing(name, f"{where}.name", fault) from fault


def build_language(facts: LanguageFacts) -> Any:
    """The language model that `facts` describe, with fresh weights on the current default device, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**facts.config, "vocab_size": facts.vocab})
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=facts.attention, trust_remote_code=False
    )
    model.tie_weights()  # transformers leaves it out where it draws no weights
    return _finish(model, facts)


def load_language(facts: LanguageFacts) -> Any:
    """The same with its published weights. EnvironmentFault when they cannot be had.

    Shrinking the vocabulary keeps the first rows of both tables, as Bunny's `resize_token_embeddings` does.
    """
    model = from_pretrained(
        "AutoModelForCausalLM", facts.source, "model.language.name", attn_implementation=facts.attention
    )
    if model.config.vocab_size != facts.vocab:
        model.resize_token_embeddings(facts.vocab, mean_resizing=False)
    return _finish(model, facts)


def _finish(model: Any, facts: LanguageFacts) -> Any:
    head = model.get_output_embeddings()
    if not facts.head_bias and isinstance(head, nn.Linear):
        head.register_parameter("bias", None)
    return model


def load_tokenizer(source: str, where: str = "model.language.name", *, as_saved: bool = False) -> Any:
    """The tokenizer of a row, of a folder or on the hub. EnvironmentFault when it cannot be had.

    Where it has no padding token, its unknown or end token pads (Bunny's and LLaVA's habit; padding is masked anyway).
    `as_saved` takes tokenizer.json to the letter, as do folders that name no class of their own: AutoTokenizer may
    choose a class by the model's type and build the rules anew, and then splits some texts otherwise.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source in LANGUAGES and LANGUAGES[source].package:
        source = str(package_file(LANGUAGES[source].package, source))
    letter = (Path(source) / "tokenizer.json").is_file() and (as_saved or _declared(Path(source)) in _GENERIC)
    loader = PreTrainedTokenizerFast if letter else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as fault:
        raise missing(source, where, fault, what="the tokenizer") from fault
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def _declared(folder: Path) -> str:
    config = folder / "tokenizer_config.json"
    return json.loads(config.read_text("utf-8")).get("tokenizer_class", "") if config.is_file() else ""
