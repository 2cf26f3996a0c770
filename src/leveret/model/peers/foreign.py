"""A peer's model told in our words: what it is made of, and its tensors; and where what it stands on is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.inputs.formats import CHATS
from leveret.model.hub import as_id, fetch
from leveret.model.language import LanguageFacts
from leveret.model.peers.files import Folder, State
from leveret.model.recipe import ModelRecipe
from leveret.model.tower_facts import TowerFacts
from leveret.model.tower_keys import Positions
from leveret.runs import DataError, EnvironmentFault, UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hub:
    """Where what a checkpoint names by an id of the hub is looked for: folders `OWNER/NAME` in `place`, then the hub's
    own cache, then the hub. words_only: of what is on the hub, settings and tokenizers without the weights."""

    place: Path | None = None
    words_only: bool = False

    def find(self, name: str) -> Path | None:
        """The folder or file of an id on this machine, without asking anyone; None where there is none."""
        if not name:
            return None
        for path in (*([self.place / name] if self.place is not None else []), Path(name)):
            if path.exists():
                return path
        return None

    def get(self, name: str, wanted_by: str) -> Path:
        """The folder or file of an id. EnvironmentFault where it cannot be had."""
        if (found := self.find(name)) is not None:
            return found
        if as_id(name) is not None:
            try:
                return fetch(name, words_only=self.words_only)
            except UserError as fault:
                reason = str(fault)
        else:
            reason = "it is no id of the hub, and there is no such folder"
        where = f" or at {self.place / name}" if self.place is not None else ""
        raise EnvironmentFault(
            f"{wanted_by} is needed from {name!r}, which is not on this machine{where} ({reason}). With a connection: "
            f"`hf download {name} --local-dir HUB/{name}`, then add --hub HUB"
        )


@dataclass
class Foreign:
    """What a peer's folder holds.

    tool       that wrote it.
    recipe     the composition; towers are named by rows of TOWERS or by paths.
    seen       place among the towers -> its tensors, under any names of tower_keys.LAYOUTS; a tower that is not there
               has the weights that its own source holds.
    connector, language  tensors under the names of the modules they belong to.
    facts      of the language model.
    tokenizer  the folder that its tokenizer is read from.
    names      of the towers, as the checkpoint says them.
    positions  how DINOv2's positions were brought to the image's size when the tool ran (towers.fill_tower).
    cut        whether the tool cuts the token tables to the tokenizer's length when it loads them.
    notes      what was done otherwise than names say, for people.
    eyes       facts of the towers, where the folder itself has them; else they follow from the recipe.
    extra      special tokens that the tool adds behind the tokenizer's own, in this order.
    newline    [D] what stands at the end of every row of an image's tiles, where there is one.
    letter     whether the tool takes tokenizer.json to the letter, as transformers' fast tokenizers did before 5.
               Llama's class of today builds its rules anew, and then no blank stands before what follows an end token.
    """

    tool: str
    recipe: ModelRecipe
    seen: Mapping[int, State]
    connector: State
    language: State
    facts: LanguageFacts
    tokenizer: Path
    notes: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()
    positions: Positions | None = None
    cut: bool = False
    eyes: tuple[TowerFacts, ...] = ()
    newline: Tensor | None = None
    extra: tuple[str, ...] = ()
    letter: bool = False


def rows_of(state: Mapping[str, Any], name: str, where: Path) -> int:
    """Rows of a token table. DataError where there is none."""
    if name not in state:
        raise DataError(f"{where}: there is no {name}; the language model's weights are not all here")
    return int(state[name].shape[0])


def called(name: Any, folder: Folder) -> str:
    """What a language model is called in a model that is saved: an id as it is, of a path of someone's machine the end,
    and the folder's own name where nothing is said."""
    home = folder.path.resolve()
    if home.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/REVISION
        own = home.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    else:
        own = home.name
    said = str(name or own)
    return said if said.count("/") == 1 and not said.startswith((".", "/", "~")) else said.rstrip("/").split("/")[-1]


def no_tokenizer(folder: Folder) -> bool:
    """Whether a folder lacks a tokenizer of its own."""
    return not any(folder.has(name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


TEMPLATE = "chat_template.jinja"
"""Written by us, and by transformers since Bunny and the Factory wrote theirs."""


def template_of(folder: Folder) -> str:
    """The chat template, where any of the places that transformers has had for it holds one; else ""."""
    file = folder.path / TEMPLATE
    if file.is_file():
        return file.read_text("utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if isinstance(found := folder.settings(name).get("chat_template"), str):
            return found
    return ""


def written_as(folder: Folder, usual: str = "") -> str | None:
    """The row of CHATS whose template the folder carries to the letter, as those that we wrote do; None for others.
    usual: the one that its tool would take, where several are written alike."""
    template = template_of(folder).strip()
    same = [row for row in CHATS.values() if template and row.template.strip() == template]
    # some formats are written alike and come from several tools
    rank = min(same, key=lambda row: (row.name != usual, not row.original.startswith("llava")), default=None)
    return None if rank is None else rank.name
