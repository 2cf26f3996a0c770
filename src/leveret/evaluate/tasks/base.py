"""What a row of the task table says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from leveret.evaluate.forms.base import Item

SHORT = "\nAnswer the question using a single word or phrase."
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"

PRISMATIC_CHOICE = {
    "pope": "{question}" + SHORT,
    "vsr": 'Based on the image, is this statement "True" or "False"? {caption}\n'
    'Respond with "True" or "False" directly.',
    "ai2d": "{question}\n{options}" + LETTER,
}
"""How Prismatic asks (after the image's mark and its newline); answers are the first token's probabilities."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task.

    id              public name, on the command line and in results.
    form            row of FORMS: how the files are read.
    rules           name of a lineage -> row of SCORERS; the first that reads what the answers hold is the task's own.
    files           places to look, as globs under the root; the first that finds something counts. `{split}` is the
                    split's official name.
    images          folder of the pictures under the root; "" where image names already hold it.
    prompt          what the model is asked, over the form's fields.
    max_new_tokens  no right answer is longer.
    headline        row of HEADLINES: the one figure called `score`; a rule may have its own.
    splits          our name of a split -> the files' own; "server" is the part whose answers only a server knows.
    prompts         lineage -> its own wording, where others than `prompt` are in use (`prismatic`).
    about           what is asked, in words for somebody who knows nothing.
    options         the answers that a rule over probabilities chooses between, in the order it reads them: the same for
                    every question, or told from it. A rule that reads probabilities asks by them, in one pass.
    """

    id: str
    form: str
    rules: Mapping[str, str]
    files: tuple[str, ...]
    images: str
    prompt: str
    max_new_tokens: int
    headline: str = "accuracy"
    splits: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] | Callable[[Item], tuple[str, ...]] = ()
