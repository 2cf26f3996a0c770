"""From what a person names (our folder, a run, another tool's folder, or `OWNER/NAME[/FOLDER][@REVISION]`) to a model.

What lies on this machine wins over an id. A model of another tool is read as it is, by `peers`; nothing is converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leveret.model import hub as hubs
from leveret.runs import DataError, RecipeError

if TYPE_CHECKING:
    import torch

    from leveret.model.vlm import VLM

OURS = "leveret"


@dataclass(frozen=True)
class Given:
    """A model on this machine.

    name    as it was given. folder: where its config.json is.
    tool    OURS, or a row of peers.PEERS.
    """

    name: str
    folder: Path
    tool: str

    @property
    def ours(self) -> bool:
        return self.tool == OURS

    @property
    def with_code(self) -> bool:
        """Whether it is one of ours that was published with its code, whose tensors have other names."""
        return self.ours and "auto_map" in hubs.read_config(self.folder)


def locate(given: str | Path, hub: str | Path | None = None) -> Given:
    """The folder that `given` means; of an id what is lacking on this machine is downloaded, never code.

    hub  a folder with OWNER/NAME folders, looked at before the hub itself.

    DataError when there is no model, or it is of no tool that is known; EnvironmentFault when the hub cannot be asked.
    """
    path = Path(given).expanduser()
    if not path.exists() and (name := hubs.as_id(str(given))) is not None:
        path = _kept(*name, hub)
    return Given(str(given), *look(path))


def _kept(name: str, revision: str | None, hub: str | Path | None) -> Path:
    """An id's folder in `hub`, else in the hub's own cache."""
    kept = Path(hub) / name if hub is not None and revision is None else None
    return kept if kept is not None and kept.is_dir() else hubs.fetch(name, revision)


def look(path: Path) -> tuple[Path, str]:
    """(a model's folder, its tool) of a folder on this machine, or of a finished run. DataError where it is neither."""
    from leveret.model import checkpoint, peers

    fault: DataError | None = None
    try:
        found = checkpoint.find(path)
        if "format" in hubs.read_config(found):
            return found, OURS
    except DataError as error:
        fault, found = error, path
    if not found.is_dir():
        assert fault is not None, "`find` gives folders"
        raise fault
    folder = peers.Folder(found)
    if (tool := peers.recognise(folder)) is not None:
        return found, tool
    if fault is not None and not folder.has("config.json"):
        raise fault
    raise peers.unknown(folder)


def load(
    given: str | Path,
    device: str | torch.device = "cpu",
    *,
    hub: str | Path | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> VLM:
    """The model that `given` means (see `locate`), in evaluation mode.

    base  what another tool's adapters, or a projector, stand on. dtype: of all weights; by default as they were saved.

    Raises as `locate`, `checkpoint.load` and `peers.read` do.
    """
    return open_given(locate(given, hub), device, hub=hub, base=base, dtype=dtype)[0]


def open_given(
    given: Given,
    device: str | torch.device = "cpu",
    *,
    hub: str | Path | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[VLM, str, list[str]]:
    """(the model, whose it was, notes on what was read otherwise than names say)."""
    from leveret.model import checkpoint, peers
    from leveret.model.peers.assemble import assemble

    if given.ours:
        if base is not None:
            raise RecipeError(f"--base {base}: {given.name} is a whole model, which stands on nothing; leave it out")
        vlm = checkpoint.load(given.folder, device)
        return (vlm.cast(dtype) if dtype is not None else vlm), OURS, []
    foreign = peers.read(given.folder, hub=hub, base=base)
    return assemble(foreign, given.folder, dtype).to(device).eval(), foreign.tool, foreign.notes


@contextmanager
def as_ours(given: Given, beside: Path, *, hub: str | Path | None = None) -> Iterator[Path]:
    """The model as a folder of ours: itself, or while the block runs a converted copy, hidden in `beside`."""
    from tempfile import TemporaryDirectory

    from leveret.model import checkpoint

    if given.ours and not given.with_code:
        yield given.folder
        return
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".converted-", dir=beside) as scratch:
        yield checkpoint.save(open_given(given, hub=hub)[0], Path(scratch) / "model")


def refuse_place(out: Path, *read: Path) -> None:
    """RecipeError where a model written to `out` would take the place of a folder that is read, of one inside it, or of
    anything that is no model: what stands there is replaced whole."""
    for source in read:
        if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
            raise RecipeError(f"{out} lies in the folder that is read ({source}); give another place for the result")
        if out.resolve() in source.resolve().parents:
            raise RecipeError(f"{out} holds the folder that is read ({source}); give another place for the result")
    if out.is_file():
        raise RecipeError(f"{out} is a file; give a folder for the result")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not ((out / "config.json").is_file() or any(out.glob("*.gguf"))):
        raise RecipeError(f"{out} is there already and is no model; give another place for the result")
    if strangers := sorted(str(path.relative_to(out)) for path in out.rglob("*") if not _of_a_model(path)):
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise RecipeError(
            f"{out} holds more than a model ({', '.join(strangers[:3])}{more}), which writing there would delete; "
            "give another place for the result"
        )


_KINDS = {".json", ".safetensors", ".jinja", ".model", ".gguf", ".py", ".pyc", ".yaml"}
_NAMES = {"merges.txt", "vocab.txt", "README.md", "LICENSE", ".gitattributes"}


def _of_a_model(path: Path) -> bool:
    """Whether something in a model's folder is what models are made of, whoever wrote it."""
    if path.name in _NAMES:
        return True
    return not path.name.startswith(".") and (path.is_dir() or path.suffix in _KINDS)
