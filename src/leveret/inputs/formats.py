"""How a conversation is written down: every chat format as a row of one table, `CHATS`.

A format is a Jinja template in the form transformers uses, so it can travel with a saved model as
`chat_template.jinja`. What the model learns stands between `{% generation %}` and `{% endgeneration %}`.

A format of another system has a twin, `NAME/faithful`, for models that system trained: the same conversation, with the
ids and labels that system makes (`faithful.py`).

Sources: Bunny bunny/conversation.py, LLaVA llava/conversation.py, TinyLLaVA Factory tinyllava/data/template/, Prismatic
prismatic/models/backbones/llm/prompting/, nanoVLM models/config.py and data/. `docs/chat-formats.md` shows each, and
where we write it otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from leveret import own
from leveret.runs import DataError, RecipeError, closest


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a conversation is written down.

    template  Jinja over `messages` (dicts with `role` and `content`) and `add_generation_prompt`. A turn's content must
              be printed as it is (`{{ message['content'] }}`) or through its own methods (`.strip()`, `.replace(..)`):
              what a filter returns counts as structure, in which special tokens are special. `faithful` is true where
              an original's text, faults included, is wanted; elsewhere it is not defined.
    stop      texts at which an answer ends. Each must be one token of the tokenizer, unless it is blank.
    original  the row of `faithful.ORIGINALS` that says how the system it comes from makes ids and labels; "" where
              there is none: formats of our own, LLaVA's ChatML, and nanoVLM's.
    faithful  ids and labels are made as that system makes them, its faults included.
    """

    name: str
    template: str
    stop: tuple[str, ...]
    original: str = ""
    faithful: bool = False


_TINY = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        <|user|>
        {%- if loop.previtem is defined and loop.previtem['role'] == 'system' -%}
            {{ loop.previtem['content'] }}{{ '\\n' }}
        {%- endif -%}
        {{ message['content'] }}
    {%- elif message['role'] == 'assistant' -%}
        <|assistant|>
        {%- generation -%}
        {{ ' ' }}{{ message['content'] }}<|end|>
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>
{%- endif -%}
"""

_PLAIN = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{ '<image>' * message['content'].count('<image>') }}
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}
        {{ message['content'] }}{{ '\\n' }}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN = _USER.replace("user", "human")
_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_HONEST = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_RESPECTFUL = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\\n\\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

# An empty turn gets neither blank nor end token, as Bunny and LLaVA take "" for "nothing said yet".
_TWO = """\
{%- if messages[0]['role'] != 'system' -%}
    {{ "SYSTEM" }}{{ ' ' }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{ message['content'] }}{{ ' ' }}
    {%- elif message['role'] == 'user' -%}
        USER:
        {%- if message['content'] -%}
            {{ ' ' }}{{ message['content'] }}{{ ' ' }}
        {%- endif -%}
    {%- else -%}
        ASSISTANT:
        {%- generation -%}
        {%- if message['content'] -%}
            {{ ' ' }}{{ message['content'] }}END
        {%- endif -%}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    ASSISTANT:
{%- endif -%}
"""

# The same, but for empty turns, which are written in full.
_TINYLLAVA = """\
{%- if messages[0]['role'] != 'system' -%}
    {{ "SYSTEM" }}{{ ' ' }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{ message['content'] }}{{ ' ' }}
    {%- elif message['role'] == 'user' -%}
        USER:{{ ' ' }}{{ message['content'] }}{{ ' ' }}
    {%- else -%}
        ASSISTANT:
        {%- generation -%}
        {{ ' ' }}{{ message['content'] }}END
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    ASSISTANT:
{%- endif -%}
"""

# LLaVA's LLAMA_2 style; the first round's start token is the tokenizer's own.
_LLAMA_2 = """\
{%- set said = namespace(system="SYSTEM", first=true) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set said.system = message['content'] -%}
    {%- elif message['role'] == 'user' -%}
        {%- if message['content'] or said.first -%}
            {%- if not said.first -%}START{%- endif -%}
            [INST]{{ ' ' }}
            {%- if said.first and said.system -%}
                <<SYS>>{{ '\\n' }}{{ said.system }}{{ '\\n' }}<</SYS>>{{ '\\n\\n' }}
            {%- endif -%}
            {{ message['content'] }}{{ ' ' }}[/INST]
        {%- endif -%}
        {%- set said.first = false -%}
    {%- else -%}
        {%- generation -%}
        {%- if message['content'] -%}
            {{ ' ' }}{{ message['content'] }}{{ ' ' }}</s>
        {%- endif -%}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

# LLaVA's MPT style: ChatML without newlines between turns.
_MPT = """\
{%- if messages[0]['role'] != 'system' -%}
    <|im_start|>system{{ '\\n' }}{{ "SYSTEM" }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
    <|im_start|>{{ message['role'] }}{{ '\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
        {%- if message['content'] -%}
            {{ message['content'] }}<|im_end|>
        {%- endif -%}
        {%- endgeneration -%}
    {%- elif message['content'] -%}
        {{ message['content'] }}<|im_end|>
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|im_start|>assistant{{ '\\n' }}
{%- endif -%}
"""

# Prismatic: all images after the start token, texts stripped. BEGIN comes before the first question, OPEN and CLOSE
# stand around each. The blank before an answer belongs to the answer, as generation begins without it; in Prismatic's
# own training text it ends the question (and is stripped off again for Llama's tokenizers).
_PRISMATIC = """\
START
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{ '<image>' * message['content'].count('<image>') }}
    {%- endif -%}
{%- endfor -%}
{%- set said = namespace(system="SYSTEM", first=true) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set said.system = message['content'] -%}
    {%- elif message['role'] == 'user' -%}
        BEGIN
        {%- set said.first = false -%}
        {{ message['content'].replace('<image>', '').strip() }}CLOSE
        {%- if faithful -%}{{ ' ' }}{%- endif -%}
    {%- else -%}
        {%- generation -%}
        {%- if not faithful -%}{{ ' ' }}{%- endif -%}
        {{ message['content'].strip() or ' ' }}END
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
_SYSTEM_FIRST = """{%- if said.first -%}{{ said.system }}{{ ' ' }}{%- endif -%}"""
# The original opens its system text with "<<SYS>", one bracket short; all its Llama-2 chat models learnt that.
_SYS_FIRST = """[INST]{{ ' ' }}{%- if said.first -%}
            {{ '<<SYS>' if faithful else '<<SYS>>' }}{{ '\\n' }}{{ said.system }}{{ '\\n' }}<</SYS>>{{ '\\n\\n' }}
        {%- endif -%}"""

_ALIGN = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{ '<image>' * message['content'].count('<image>') }}
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}
        {{ message['content'].strip() }}END
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

# nanoVLM: all images before the first question, several each with its number; turns are written as they are.
_NANOVLM = """\
{%- set seen = namespace(images=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- set seen.images = seen.images + message['content'].count('<image>') -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    <|im_start|>{{ message['role'] }}{{ '\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
        {{ message['content'] }}<|im_end|>{{ '\\n' }}
        {%- endgeneration -%}
    {%- else -%}
        {%- if message['role'] == 'user' -%}
            {%- for place in range(seen.images) -%}
                {%- if seen.images > 1 -%}<image:{{ ' ' }}{{ place }}>{%- endif -%}
                {{ '<image>' }}
            {%- endfor -%}
            {%- set seen.images = 0 -%}
        {%- endif -%}
        {{ message['content'].replace('<image>\\n', '').replace('<image>', '') }}<|im_end|>{{ '\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|im_start|>assistant{{ '\\n' }}
{%- endif -%}
"""

# Its first version, which knew one question and no system text.
_QUESTION = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{ '<image>' * message['content'].count('<image>') }}Question:{{ ' ' }}
        {{- message['content'].replace('<image>\\n', '').replace('<image>', '') }}{{ ' ' }}Answer:
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}
        {{ message['content'] }}<|endoftext|>
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""


def _written(template: str, **words: str) -> str:
    """The template with its words in capitals replaced."""
    for word, text in words.items():
        template = template.replace(word, text)
    return template


def _two(name: str, end: str, original: str, system: str = _USER) -> ChatFormat:
    return ChatFormat(name, _written(_TWO, SYSTEM=system, END=end), (end,), original)


def _tinyllava(name: str, end: str, original: str) -> ChatFormat:
    return ChatFormat(f"tinyllava_{name}", _written(_TINYLLAVA, SYSTEM=_USER, END=end), (end,), original)


def _llama_2(name: str, system: str, start: str) -> ChatFormat:
    return ChatFormat(name, _written(_LLAMA_2, SYSTEM=system, START=start), ("</s>",), "llava_llama_2")


def _mpt(name: str, system: str) -> ChatFormat:
    return ChatFormat(name, _written(_MPT, SYSTEM=system), ("<|im_end|>",))


def _prismatic(
    name: str, begin: str, close: str, end: str = "</s>", *, start: str = "", system: str = "", tail: str = ""
) -> ChatFormat:
    words = {"START": start, "SYSTEM": system, "BEGIN": begin, "CLOSE": close, "END": tail + end}
    return ChatFormat(f"prismatic_{name}", _written(_PRISMATIC, **words), (end,), "prismatic")


_ROWS = (
    ChatFormat("tiny", _TINY, ("<|end|>",)),
    ChatFormat("plain", _PLAIN, ("\n",), "llava_plain"),
    _two("bunny", "<|endoftext|>", "bunny"),
    _two("phi3", "<|endoftext|>", "bunny_phi3"),
    _two("minicpm", "</s>", "bunny_start"),
    _two("llama", "<|end_of_text|>", "bunny_start"),
    _two("vicuna_v1", "</s>", "llava_v1"),
    _two("llava_v1", "</s>", "llava_v1", _HUMAN),
    _llama_2("llava_llama_2", _VISION, "<s>"),
    _llama_2("llama_2", _RESPECTFUL, "<s>"),
    _llama_2("mistral_instruct", "", ""),
    _mpt("mpt", _HONEST),
    _mpt("chatml_direct", "Answer the questions."),
    ChatFormat("tinyllava_pretrain", _PLAIN, ("\n",), "tinyllava_pretrain"),
    _tinyllava("phi", "<|endoftext|>", "tinyllava"),
    _tinyllava("qwen2_base", "<|endoftext|>", "tinyllava"),
    _tinyllava("qwen2_instruct", "<|im_end|>", "tinyllava"),
    _tinyllava("gemma", "<eos>", "tinyllava_start"),
    _tinyllava("llama", "</s>", "tinyllava_llama"),
    _prismatic("pure", "In:{{ ' ' }}", "{{ '\\n' }}Out:"),
    _prismatic("vicuna_v15", _SYSTEM_FIRST + "USER:{{ ' ' }}", "{{ ' ' }}ASSISTANT:", system=_USER),
    _prismatic("llama2_chat", _SYS_FIRST, "{{ ' ' }}[/INST]", system=_VISION),
    _prismatic("mistral_instruct", "[INST]{{ ' ' }}", "{{ ' ' }}[/INST]"),
    _prismatic(
        "phi", "Input:{{ ' ' }}", "{{ '\\n' }}Output:", "<|endoftext|>", start="<|endoftext|>", tail="{{ '\\n' }}"
    ),
    ChatFormat("prismatic_align", _written(_ALIGN, END="</s>"), ("</s>",), "prismatic_align"),
    ChatFormat(
        "prismatic_phi_align",
        "{%- if not faithful -%}<|endoftext|>{%- endif -%}" + _written(_ALIGN, END="<|endoftext|>"),
        ("<|endoftext|>",),
        "prismatic_align",
    ),
    ChatFormat("nanovlm", _NANOVLM, ("<|im_end|>",)),
    ChatFormat("nanovlm_question", _QUESTION, ("<|endoftext|>",)),
)


def _faithful(form: ChatFormat) -> ChatFormat:
    """The format's faithful twin, whose template says so wherever it is rendered."""
    template = "{%- set faithful = true -%}\n" + form.template
    return replace(form, name=f"{form.name}/faithful", template=template, faithful=True)


CHATS: dict[str, ChatFormat] = {
    row.name: row for row in (*_ROWS, *(_faithful(form) for form in _ROWS if form.original))
}
"""Every chat format by name; `NAME/faithful` is NAME as the system it comes from has it."""

_NAMES = {
    "LLaVA": {"v1": "vicuna_v1", "v0_plain": "plain", "mistral_direct": "chatml_direct"},
    "Prismatic": {
        "PurePromptBuilder": "prismatic_pure",
        "VicunaV15ChatPromptBuilder": "prismatic_vicuna_v15",
        "LLaMa2ChatPromptBuilder": "prismatic_llama2_chat",
        "MistralInstructPromptBuilder": "prismatic_mistral_instruct",
        "PhiPromptBuilder": "prismatic_phi",
    },
}
"""What the originals call a format, where that is not the end of our name for it."""
SYSTEMS = ("Bunny", "LLaVA", "TinyLLaVA", "Prismatic")


def published(system: str, name: str) -> ChatFormat:
    """The format a published system calls `name`: its conversation template or prompt builder.

    Raises RecipeError when the system is none of SYSTEMS, or we have no such format.
    """
    if system not in SYSTEMS:
        raise RecipeError(f"system: {system!r} has no chat formats here. Allowed: {', '.join(SYSTEMS)}")
    own = _NAMES.get(system, {}).get(name, name)
    prefix = {"TinyLLaVA": "tinyllava_", "Prismatic": "prismatic_"}.get(system, "")
    return find_chat(own if own.startswith(prefix) else prefix + own)


def find_chat(chat: str | ChatFormat) -> ChatFormat:
    """The row of CHATS or in a user's own file (own.py), or the format itself. RecipeError naming the closest names
    when there is none."""
    if isinstance(chat, ChatFormat):
        return chat
    if own.is_own(chat):
        return _own(chat)
    if chat not in CHATS:
        near = closest(chat, CHATS)
        hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
        names = ", ".join(row.name for row in _ROWS)
        raise RecipeError(
            f"chat: {chat!r} is not a chat format. Allowed: {names}; those of other systems also as NAME/faithful; "
            f"or my.py:NAME{hint}"
        )
    return CHATS[chat]


_BROUGHT: dict[str, ChatFormat] = {}
"""Formats that model folders brought along, by the reference under which their makers had them."""


def bring(chat: str, form: ChatFormat) -> None:
    """Take a format out of a model folder: it is a template, which runs in a sandbox, so no file is needed for it.

    DataError when another model brought another one under the same reference.
    """
    if _BROUGHT.setdefault(chat, form) != form:
        raise DataError(f"chat format {chat!r}: two models have it, with different templates; load them apart")


_OWN: dict[str, ChatFormat] = {}
"""Formats in users' own files, by pinned reference, that were looked at."""


def _own(chat: str) -> ChatFormat:
    if chat in _OWN:
        return _OWN[chat]
    if chat in _BROUGHT and not own.is_allowed(chat):  # the file itself, where there is one, goes before
        return _BROUGHT[chat]
    from leveret.inputs.template import check_template

    form = own.row(chat, ChatFormat, "chat")
    if not isinstance(form.template, str) or not isinstance(form.stop, tuple) or not form.stop:
        raise RecipeError(f'chat: {chat}: `template` must be text, and `stop` a tuple of texts, such as ("<|end|>",)')
    if form.faithful or form.original:
        raise RecipeError(f"chat: {chat}: `faithful` and `original` are for the formats of published systems")
    check_template(form, f"chat: {chat}")
    _OWN[chat] = form
    return form
