"""Where weights come from: a folder on this machine, this package, or the Hugging Face hub through transformers.

Remote code is never run, and pickled weights are only read with torch's `weights_only`, which transformers does.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import DataError, EnvironmentFault

if TYPE_CHECKING:
    from torch import Tensor


def package_file(path: str, wanted_by: str) -> Path:
    """A file or folder of this package. EnvironmentFault when the installation lacks it."""
    place = Path(str(resources.files("leveret"))) / path
    if not place.exists():
        raise EnvironmentFault(
            f"{wanted_by}: its weights should be at {place}, but this installation lacks them; reinstall leveret, or "
            "train them again with `leveret world backbones`"
        )
    return place


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. DataError when it is not JSON."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as fault:
        raise DataError(f"{folder / 'config.json'}: cannot be read as JSON ({fault})") from None


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing but errors: nothing of old settings, nor of types that it does not know."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


def from_pretrained(class_name: str, source: str, where: str, **options: Any) -> Any:
    """`transformers.<class_name>.from_pretrained(source)` in float32, refusing a checkpoint that lacks weights.

    Raises EnvironmentFault when the weights can be had neither from a folder nor from the hub (it names what to
    download and how), DataError when the checkpoint does not fill the model.
    """
    import torch
    import transformers
    from transformers.utils import logging

    loader = getattr(transformers, class_name)
    bars = logging.is_progress_bar_enabled()
    if Path(source).is_dir():
        logging.disable_progress_bar()  # reading a local file is quick; a download keeps its bar
    try:
        with quiet():  # what it would report (parts we leave out on purpose) is checked below
            model, report = loader.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
            )
    except (OSError, ImportError) as fault:
        raise missing(source, where, fault) from fault
    finally:
        if bars:
            logging.enable_progress_bar()
    if lacking := sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", ()))):
        raise DataError(
            f"{where}: the checkpoint {source} lacks {len(lacking)} weights of the model it configures: "
            f"{', '.join(lacking[:8])}{', ..' if len(lacking) > 8 else ''}"
        )
    return model


def missing(source: str, where: str, fault: Exception, what: str = "the weights") -> EnvironmentFault:
    """What to say when a backbone is not on this machine and the hub did not give it."""
    reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    name = source.rstrip("/").split("/")[-1]
    return EnvironmentFault(
        f"{where}: {what} of {source!r} could not be read ({reason}). With a connection: "
        f"`hf download {source} --local-dir {name}`, then set {where}={name}; a gated model also needs `hf auth login`"
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle; nested dictionaries have their names joined by dots.

    DataError where the file is damaged, holds anything but tensors, or would run code.
    """
    import pickle

    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as fault:
        raise DataError(
            f"{file}: cannot be read as weights: a pickle that holds more than tensors "
            f"({str(fault).splitlines()[0][:120]}). Reading it could run code; ask its author for safetensors"
        ) from None
    except Exception as fault:  # neither torch nor safetensors has an error class of its own for a broken file
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0][:120]
        raise DataError(f"{file}: cannot be read as weights; it is damaged or cut short ({reason})") from None
    return dict(_flat(found, file))


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(2) == b"PK"


def _flat(found: Any, file: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    import torch

    if not isinstance(found, Mapping):
        raise DataError(f"{file}: holds a {type(found).__name__} that is not names and tensors")
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, file, f"{prefix}{name}.")
        else:
            raise DataError(f"{file}: holds a {type(value).__name__} ({prefix}{name}) that is not names and tensors")


def shards_of(index: Path) -> list[Path]:
    """The shards of an index, each once, as they are named first. DataError where the file is no index, or names a
    file outside its folder or one that is not there."""
    try:
        named = json.loads(index.read_text("utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError) as fault:
        raise DataError(f"{index}: not an index of shards ({type(fault).__name__}: {fault})") from None
    files = [index.parent / name for name in dict.fromkeys(named)]
    for file in files:
        if file.resolve().parent != index.parent.resolve():
            raise DataError(f"{index}: names {file.name!r} outside its folder; nothing there is read")
        if not file.is_file():
            raise DataError(f"{index}: lists {file.name}, which is not there; the download is not complete")
    return files
