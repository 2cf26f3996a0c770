"""Chat templates are rendered piece by piece, so that what people said can be told from what the template adds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from leveret.records import IMAGE_MARK
from leveret.runs import RecipeError

if TYPE_CHECKING:
    from leveret.inputs.formats import ChatFormat


ESCAPED = IMAGE_MARK[0] + "\ue000" + IMAGE_MARK[1:]
"""The mark with a private-use character inside: no mark, and the character is taken out when the text is tokenised."""


class Said(str):
    """What somebody said, as opposed to what the template adds.

    Survives Jinja, which calls str() on all it prints, and the methods templates tidy a turn with.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return self

    def strip(self, chars: str | None = None, /) -> Said:
        return Said(super().strip(chars))

    def lstrip(self, chars: str | None = None, /) -> Said:
        return Said(super().lstrip(chars))

    def rstrip(self, chars: str | None = None, /) -> Said:
        return Said(super().rstrip(chars))

    def replace(self, old: str, new: str, count: Any = -1, /) -> Said:  # type: ignore[override]
        return Said(super().replace(old, new, count))


class _Edge(str):
    """An empty text that marks where a generation block begins or ends."""

    __slots__ = ()

    def __str__(self) -> str:
        return self


BEGIN, END = _Edge(), _Edge()
"""What `render` yields at the two ends of a generation block; compared by identity."""


def render(
    form: ChatFormat, messages: list[dict[str, Any]], generate: bool, *, faithful: bool = False
) -> Iterator[str]:
    """The pieces of a conversation, in order: Said, the template's own text, BEGIN and END.

    Raises RecipeError when the template is not valid or fails.
    """
    template = _compiled(form.template)
    values = {"messages": messages, "add_generation_prompt": generate, "faithful": faithful}
    try:
        yield from template.root_render_func(template.new_context(values))
    except Exception as error:  # whatever a template does wrong (a type, a range too big) is the template's fault
        raise RecipeError(f"the template of chat format {form.name!r} fails: {error}") from error


def check_template(form: ChatFormat, where: str) -> None:
    """RecipeError when the template is not valid, fails, or marks nothing that would be learned."""
    asked = [{"role": "user", "content": Said("?")}, {"role": "assistant", "content": Said("!")}]
    try:
        pieces = list(render(form, asked, False))
    except RecipeError as fault:
        raise RecipeError(f"{where}: {fault}") from None
    if not any(piece is BEGIN for piece in pieces):
        raise RecipeError(f"{where}: its template has no generation block, so nothing would be learned")


@lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    """The template, compiled with the settings transformers uses, unable to reach or change anything of Python."""
    from jinja2 import TemplateError, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: puts an edge before and after its body."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)
        begin, end = BEGIN, END

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            edges = [nodes.Output([self.attr(name)], lineno=line) for name in ("begin", "end")]
            return [edges[0], *body, edges[1]]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise RecipeError(f"a chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
