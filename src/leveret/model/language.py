"""Language models: any transformers causal language model; the table names those whose exact configuration is known.

A row is only needed to compose a model without its weights (`--dry-run`) and for facts the configuration does not
hold. A folder, or any other id of the hub, works without one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from leveret import own
from leveret.model.hub import from_pretrained, missing, package_file, read_config
from leveret.model.recipe import LanguageRecipe
from leveret.model.tables import unknown
from leveret.model.towers import backbones
from leveret.runs import EnvironmentFault, RecipeError


@dataclass(frozen=True, slots=True)
class LanguageRow:
    """A language model with a name: an entry of backbones.json, or a folder of this package.

    attention  transformers' attention code, where the default is not the best. The drawn world's model is so narrow
               that plain matrix products are 1.6 to 1.9 times as fast as sdpa on CPU under bf16 autocast.
    like       the entry of backbones.json whose configuration it has, where not that of its own name.
    change     what is different in that configuration.
    foreign    its own config.json asks for code of its own; its weights fit the class that backbones.json says.
    repo       in a user's own file: where weights and tokenizer are, an id of the hub or a folder beside that file.
               Without `like` and without a model_type in `change` its configuration is read there too.
    """

    package: str = ""
    attention: str | None = None
    like: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)
    foreign: bool = False
    repo: str = ""


def _like(name: str, **change: Any) -> LanguageRow:
    return LanguageRow(like=name, change=change)


_QWEN, _QWEN_END, _SMOL_END = "Qwen/Qwen2.5-0.5B", 151645, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA_3_ENDS = [128001, 128008, 128009]
LANGUAGES: dict[str, LanguageRow] = {
    "world/language": LanguageRow(package="world/weights/language", attention="eager"),
    # a smaller one, and the same before it read conversations (world/languages.py)
    **{
        f"world/{name}": LanguageRow(package=f"world/weights/languages/{name}", attention="eager")
        for name in ("language-small", "language-small-base")
    },
    "microsoft/phi-1_5": LanguageRow(),
    "microsoft/phi-2": LanguageRow(),
    "microsoft/Phi-3-mini-4k-instruct": LanguageRow(),
    "microsoft/Phi-4-mini-instruct": LanguageRow(),
    "stabilityai/stablelm-2-1_6b": LanguageRow(),
    "stabilityai/stablelm-2-zephyr-1_6b": _like("stabilityai/stablelm-2-1_6b"),
    "Qwen/Qwen1.5-1.8B": LanguageRow(),
    "Qwen/Qwen2-0.5B": _like(_QWEN, max_position_embeddings=131072, sliding_window=131072),
    "Qwen/Qwen2-0.5B-Instruct": _like(_QWEN, eos_token_id=_QWEN_END),
    "Qwen/Qwen2-1.5B": LanguageRow(),
    "Qwen/Qwen2-1.5B-Instruct": _like(
        "Qwen/Qwen2-1.5B", max_position_embeddings=32768, sliding_window=32768, eos_token_id=_QWEN_END
    ),
    "Qwen/Qwen2.5-0.5B": LanguageRow(),
    "Qwen/Qwen2.5-0.5B-Instruct": _like(_QWEN, max_window_layers=21, eos_token_id=_QWEN_END),
    "Qwen/Qwen2.5-1.5B-Instruct": _like(
        "Qwen/Qwen2-1.5B",
        max_position_embeddings=32768, sliding_window=32768, max_window_layers=21, eos_token_id=_QWEN_END,
    ),
    "Qwen/Qwen2.5-3B": LanguageRow(),
    "Qwen/Qwen2.5-3B-Instruct": _like("Qwen/Qwen2.5-3B", max_window_layers=70, eos_token_id=_QWEN_END),
    "Qwen/Qwen3-0.6B": LanguageRow(),
    "Qwen/Qwen3-1.7B": LanguageRow(),
    "openbmb/MiniCPM-2B-history": LanguageRow(foreign=True),
    "meta-llama/Llama-2-7b-hf": LanguageRow(),
    "meta-llama/Llama-2-7b-chat-hf": _like("meta-llama/Llama-2-7b-hf"),
    "lmsys/vicuna-7b-v1.5": _like("meta-llama/Llama-2-7b-hf", pad_token_id=0),
    "meta-llama/Llama-2-13b-hf": LanguageRow(),
    "meta-llama/Llama-2-13b-chat-hf": _like("meta-llama/Llama-2-13b-hf"),
    "lmsys/vicuna-13b-v1.5": _like("meta-llama/Llama-2-13b-hf", pad_token_id=0),
    "meta-llama/Meta-Llama-3-8B-Instruct": LanguageRow(),
    "meta-llama/Llama-3.2-1B": LanguageRow(),
    "meta-llama/Llama-3.2-1B-Instruct": _like("meta-llama/Llama-3.2-1B", eos_token_id=_LLAMA_3_ENDS),
    "meta-llama/Llama-3.2-3B": LanguageRow(),
    "meta-llama/Llama-3.2-3B-Instruct": _like("meta-llama/Llama-3.2-3B", eos_token_id=_LLAMA_3_ENDS),
    "mistralai/Mistral-7B-v0.1": LanguageRow(),
    "mistralai/Mistral-7B-Instruct-v0.1": _like("mistralai/Mistral-7B-v0.1"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": LanguageRow(),
    "google/gemma-2b-it": LanguageRow(change={"hidden_act": "gelu_pytorch_tanh"}),  # what "gelu" has always meant there
    "google/gemma-2-2b": LanguageRow(),
    "google/gemma-3-1b-pt": LanguageRow(),
    "google/gemma-3-1b-it": _like("google/gemma-3-1b-pt", eos_token_id=[1, 106]),
    "HuggingFaceTB/SmolLM2-135M": LanguageRow(),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _like("HuggingFaceTB/SmolLM2-135M", **_SMOL_END),
    "HuggingFaceTB/SmolLM2-360M": LanguageRow(),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _like("HuggingFaceTB/SmolLM2-360M", **_SMOL_END),
    "HuggingFaceTB/SmolLM2-1.7B": LanguageRow(),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _like("HuggingFaceTB/SmolLM2-1.7B", **_SMOL_END),
    "HuggingFaceTB/SmolLM3-3B": LanguageRow(),
    "allenai/OLMo-2-0425-1B": LanguageRow(),
    "ibm-granite/granite-3.1-2b-instruct": LanguageRow(),
    "ibm-granite/granite-3.3-2b-instruct": LanguageRow(),
}  # fmt: skip

REFUSED = {
    "openelm": "its layers differ in heads and width, which no class of transformers builds",
}
"""Model types that are met but cannot be had, and why."""

_FOREIGN = ("minicpm", "stablelm_epoch")
"""Model types with code of their own whose weights are, name for name, those of one of transformers' classes."""


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
    row, source = LANGUAGES.get(recipe.name, LanguageRow()), recipe.name
    if own.is_own(source):
        row = own.row(source, LanguageRow, f"{where}.name")
        config = _own_config(source, row, f"{where}.name")
    elif row.package:
        source = str(package_file(row.package, recipe.name))
        config = read_config(Path(source))
    elif recipe.name in LANGUAGES:
        config = {**backbones()["language"][row.like or recipe.name]["config"], **row.change}
    elif (Path(recipe.name) / "config.json").is_file():
        config = read_config(Path(recipe.name))
        if config.get("model_type") in _FOREIGN:
            from leveret.model.peers.languages import language_config

            config = language_config(config, f"{where}.name: {recipe.name}")
    else:
        config = _hub_config(recipe.name, where)
    full = _full(config, f"{where}.name", recipe.name)
    pad = full.get("pad_token_id")
    if recipe.vocab is not None and isinstance(pad, int) and pad >= recipe.vocab:
        raise RecipeError(
            f"{where}.vocab: {recipe.vocab} rows given, and {recipe.name} pads with token {pad}; give {pad + 1} or more"
        )
    return LanguageFacts(
        config=full,
        vocab=recipe.vocab or int(full["vocab_size"]),
        head_bias=recipe.head_bias,
        attention=recipe.attention or row.attention,
        source=source,
    )


def _own_config(name: str, row: LanguageRow, where: str) -> dict[str, Any]:
    """The configuration of a row in a user's own file."""
    if row.package or not (row.repo or row.like):
        raise RecipeError(
            f"{where}: {name}: give `repo` (an id of the hub, or a folder beside the file) or `like` (an entry of "
            "backbones.json), and no `package`"
        )
    entries = backbones()["language"]
    if row.like and row.like not in entries:
        raise RecipeError(unknown(entries, row.like, f"{where}: {name}: like"))
    try:  # as it will stand in a saved model's config.json
        change = json.loads(json.dumps(dict(row.change)))
    except TypeError as fault:
        raise RecipeError(f"{where}: {name}: `change` must hold plain numbers, words and lists ({fault})") from None
    if row.like:
        return {**entries[row.like]["config"], **change}
    if "model_type" in change:
        return change
    return {**describe(LanguageRecipe(name=_place(name)), f"{where}: {name}: repo").config, **change}


def _place(source: str) -> str:
    """Where weights and tokenizer are: of a row in a user's own file its `repo`, else what it is like."""
    if not own.is_own(source):
        return source
    row = own.row(source, LanguageRow, "model.language.name")
    beside = own.source_of(source)[0].parent / row.repo
    return str(beside) if row.repo and beside.is_dir() else row.repo or row.like


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Whether transformers comes with a causal language model for a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    return config.get("model_type") in CAUSAL


def _registered(config: Mapping[str, Any]) -> bool:
    """Whether a user's own file has registered classes for it (`AutoModelForCausalLM.register`)."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.get("model_type")
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


def _full(config: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    """The configuration with every default written out."""
    from transformers import AutoConfig

    said = config.get("model_type")
    if said in REFUSED:
        raise RecipeError(f"{where}: {name} is a {said!r} model, which is not supported: {REFUSED[said]}")
    if not is_transformers(config) and not _registered(config):
        raise RecipeError(
            f"{where}: {name} is a {said!r} model, which is no causal language model that "
            "transformers knows; leveret runs no code from model repositories"
        )
    return AutoConfig.for_model(**config).to_dict()


def _hub_config(name: str, where: str) -> dict[str, Any]:
    from transformers import AutoConfig

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RecipeError(f"{where}.name: {name} is given, but there is no config.json in that folder")
    if refused := next((why for kind, why in REFUSED.items() if f"/{kind}-" in name.lower()), None):
        raise RecipeError(f"{where}.name: {name} is not supported: {refused}")
    if name.count("/") != 1:
        raise RecipeError(
            unknown(LANGUAGES, name, f"{where}.name", ", an id of the hub (owner/name), a folder, or my.py:NAME")
        )
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
        config, dtype=torch.float32, attn_implementation=_here(facts.attention), trust_remote_code=False
    )
    model.tie_weights()  # transformers leaves it out where it draws no weights
    return _finish(model, facts)


def _here(attention: str | None) -> str | None:
    """The attention code, or transformers' default in place of one that this machine has no package for: a model is
    looked at, or asked, elsewhere than it was taught, and says the same with either."""
    from transformers.utils import is_flash_attn_2_available

    return None if attention == "flash_attention_2" and not is_flash_attn_2_available() else attention


def load_language(facts: LanguageFacts) -> Any:
    """The same with its published weights. EnvironmentFault when they cannot be had.

    Shrinking the vocabulary keeps the first rows of both tables, as Bunny's `resize_token_embeddings` does.
    """
    from transformers import AutoConfig

    # A config of its own would ask for code of its own.
    told = {"config": AutoConfig.for_model(**facts.config)} if _foreign(facts.source) else {}
    source = _place(facts.source)
    if _here(facts.attention) != facts.attention:
        raise EnvironmentFault(
            f"model.language.attention: {facts.attention} needs the package flash-attn and a GPU; install it, or leave "
            "the setting out"
        )
    model = from_pretrained(
        "AutoModelForCausalLM", source, "model.language.name", attn_implementation=facts.attention, **told
    )
    if model.config.vocab_size != facts.vocab:
        model.resize_token_embeddings(facts.vocab, mean_resizing=False)
    return _finish(model, facts)


def _foreign(source: str) -> bool:
    """Whether the configuration beside the weights is not the one to build by."""
    if own.is_own(source):
        row = own.row(source, LanguageRow, "model.language.name")
        return row.foreign or bool(row.like or row.change) or _foreign(_place(source))
    if source in LANGUAGES:
        return LANGUAGES[source].foreign
    folder = Path(source)
    return (folder / "config.json").is_file() and read_config(folder).get("model_type") in _FOREIGN


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

    source = _place(source)
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


def reach(config: Any) -> int | None:
    """How many positions a prompt and its answer may fill; None where the configuration sets no bound.

    `longrope` (Phi-4-mini) turns every row by other angles as soon as the longest is past the length it was first
    trained at: keys that are kept would not fit those that follow, and an answer would depend on its company. There the
    bound is that length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return getattr(config, "max_position_embeddings", None)


_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def _declared(folder: Path) -> str:
    config = folder / "tokenizer_config.json"
    return json.loads(config.read_text("utf-8")).get("tokenizer_class", "") if config.is_file() else ""
