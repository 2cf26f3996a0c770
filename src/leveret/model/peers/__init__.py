"""Models of other tools: recognised by what is in the folder, never by its path, and read without running any code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leveret.model.peers import hfllava, merged, nanovlm, prismatic, tinyllava
from leveret.model.peers.files import Folder
from leveret.model.peers.foreign import Foreign, Hub
from leveret.runs import DataError, RecipeError, UserError

if TYPE_CHECKING:
    import torch

    from leveret.model.vlm import VLM


@dataclass(frozen=True)
class Peer:
    """A tool whose models are read.

    recognise  whether a folder is one of its. read: (folder, hub, base, size) -> what it holds.
    """

    name: str
    recognise: Callable[[Folder], bool]
    read: Callable[[Folder, Hub, str | None, int | None], Foreign]


PEERS: dict[str, Peer] = {
    "merged": Peer(
        "Bunny, LLaVA 1.5 and the first TinyLLaVA: whole, adapters, or a projector", merged.recognise, merged.read
    ),
    "tinyllava": Peer("TinyLLaVA Factory: tuned, after a stage, or adapters", tinyllava.recognise, tinyllava.read),
    "prismatic": Peer("Prismatic", prismatic.recognise, prismatic.read),
    "hf-llava": Peer("LLaVA as transformers saves it", hfllava.recognise, hfllava.read),
    "nanovlm": Peer("nanoVLM", nanovlm.recognise, nanovlm.read),
}


WHOLE = ("tinyllava", "hf-llava", "nanovlm")
"""Of these every folder has all its weights, and nothing is asked of a base."""


def recognise(folder: Folder) -> str | None:
    """The row of PEERS that a folder is of; None where it is of none."""
    return next((name for name, peer in PEERS.items() if peer.recognise(folder)), None)


def read(
    path: str | Path, *, hub: str | Path | None = None, base: str | None = None, size: int | None = None
) -> Foreign:
    """What a peer's folder holds.

    hub   a folder with OWNER/NAME folders, looked at before the hub itself. base: what adapters, or a projector, stand
          on, instead of what their config names. size: of the image, instead of what is published.

    Raises DataError (no model of a known tool, a damaged file, a pickle with code in it) and EnvironmentFault (what it
    stands on is not on this machine).
    """
    folder = Folder(Path(path))
    if not folder.path.is_dir():
        raise DataError(f"{path}: there is no such folder")
    name = recognise(folder)
    if name is None:
        raise unknown(folder)
    if base is not None and (name in WHOLE or (name == "merged" and folder.weights())):
        raise DataError(f"{path} is a whole model, which stands on nothing; leave --base {base} out")
    try:
        return PEERS[name].read(folder, Hub(Path(hub) if hub is not None else None), base, size)
    except RecipeError as fault:  # the recipe is made from what the folder says, not by the user
        raise DataError(f"{folder.path}: its config.json asks for what is not known here: {fault}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise DataError(
            f"{folder.path}: its config.json holds what is not understood ({type(fault).__name__}: {fault})"
        ) from fault


def unknown(folder: Folder) -> DataError:
    """What to say of a folder that is of no known tool."""
    said = folder.config.get("model_type")
    what = f"its config.json says model_type {said!r}" if said else "it has no config.json that says what it is"
    more = "; it asks for code from its repository (auto_map), and none is run" if "auto_map" in folder.config else ""
    return DataError(
        f"{folder.path} is no model of a tool that is known here: {what}{more}. Known: "
        + "; ".join(peer.name for peer in PEERS.values())
    )


def load(
    path: str | Path,
    *,
    hub: str | Path | None = None,
    base: str | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
) -> VLM:
    """The model in a peer's folder, as `read` reads it, in evaluation mode.

    dtype  of all weights; by default the one in which most of the language model was saved.
    """
    from leveret.model.peers.assemble import assemble

    return assemble(read(path, hub=hub, base=base, size=size), Path(path), dtype)
