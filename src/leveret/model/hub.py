"""Where weights come from: a folder on this machine, this package, or the Hugging Face hub through transformers.

Remote code is never run, and pickled weights are only read with torch's `weights_only`, which transformers does.
"""

from __future__ import annotations

import glob
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from leveret.runs import DataError, EnvironmentFault, RecipeError, closest

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
    files = []
    for name in dict.fromkeys(map(str, named)):
        # by the name alone: in the hub's cache a file is a link to where its bytes are kept
        if PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
            raise DataError(f"{index}: names {name!r} outside its folder; nothing there is read")
        files.append(file := index.parent / name)
        if not file.is_file():
            raise DataError(f"{index}: lists {file.name}, which is not there; the download is not complete")
    return files


def read_head(file: Path) -> tuple[bytes, dict[str, Any]]:
    """(the first bytes of a safetensors file, up to the tensors; what they say of each tensor, in the file's order).

    DataError where it is no such file.
    """
    try:
        with open(file, "rb") as opened:
            size = opened.read(8)
            head = opened.read(int.from_bytes(size, "little"))
        told = {name: about for name, about in json.loads(head).items() if name != "__metadata__"}
        return size + head, dict(sorted(told.items(), key=lambda row: row[1]["data_offsets"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise DataError(f"{file}: cannot be read as weights; it is damaged or cut short") from None


_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


def told_tensor(kind: str, shape: Sequence[int]) -> Tensor:
    """A tensor on the meta device, as a safetensors head tells it; a type that is not known counts as bytes."""
    import torch

    return torch.empty(tuple(shape), dtype=getattr(torch, _TYPES.get(kind, "uint8")), device="meta")


def outline_tensors(file: Path) -> dict[str, Tensor]:
    """What `read_tensors` gives, on the meta device: names, types and shapes, and no number is read."""
    if file.suffix == ".safetensors":
        return {name: told_tensor(about["dtype"], about["shape"]) for name, about in read_head(file)[1].items()}
    return {name: tensor.to("meta") for name, tensor in read_tensors(file).items()}


# --- whole repositories of the hub ------------------------------------------------------------------------------------

_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9_][\w.+-]*)*)(?:@(?P<revision>[\w][\w./-]*))?"
)
_FOLDERS = ("", "language_model", "vision_tower", "connector", "checkpoints")
"""Of a repository only these are looked into: a model's own folder, and the parts that published systems put apart."""
_WORDS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_SAFE = (*_WORDS, ".safetensors")
_ADAPTERS, _BESIDE = "adapter_model", ("non_lora_trainables.bin", "mm_projector.bin")


def as_id(given: str) -> tuple[str, str | None] | None:
    """(OWNER/NAME, or OWNER/NAME/FOLDER of a model in a folder of its repository; revision or None) where `given` is
    written as an id of the hub, `OWNER/NAME[/FOLDER][@REVISION]`."""
    found = _ID.fullmatch(given)
    return (found["name"], found["revision"]) if found else None


def parted(name: str) -> tuple[str, str]:
    """(OWNER/NAME, the folder in it with a slash behind it, or "") of an id."""
    owner, repository, *folder = name.split("/")
    return f"{owner}/{repository}", "".join(f"{step}/" for step in folder)


def to_fetch(files: Sequence[str]) -> list[str]:
    """Of a repository's files those that a model is read from: settings, tokenizers and weights. Never code, never a
    second copy of the weights (`consolidated.safetensors`, `onnx/`), and a pickle only where no safetensors in its
    folder hold the same."""
    folders = {(str(path.parent) if path.parent.name else ""): set[str]() for path in map(PurePosixPath, files)}
    for path in map(PurePosixPath, files):
        folders[str(path.parent) if path.parent.name else ""].add(path.name)
    chosen = []
    for folder, names in folders.items():
        if folder not in _FOLDERS:
            continue
        safe = {name for name in names if name.endswith(".safetensors") and not name.startswith("consolidated")}
        adapters = {name for name in safe if name.startswith(_ADAPTERS)}
        pickled = {name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")}
        kept = safe | {name for name in names if name.endswith(_WORDS)}
        if not safe - adapters:
            kept |= pickled | {name for name in _BESIDE if name in names and not pickled}
            kept |= {f"{_ADAPTERS}.bin"} & names if not adapters else set()
            kept |= {name for name in names if folder == "checkpoints" and name.endswith(".pt")}
        chosen += [f"{folder}/{name}" if folder else name for name in kept]
    return sorted(chosen)


def fetch(name: str, revision: str | None = None, *, words_only: bool = False) -> Path:
    """The folder of an id on this machine, in the hub's own cache; what is lacking there is downloaded.

    Only files of `to_fetch`, and of OWNER/NAME/FOLDER only those in there; words_only: without weights. With
    HF_HUB_OFFLINE set, or without a connection, what an earlier download left is taken.

    DataError where the hub has no such repository, folder or revision; EnvironmentFault where it is gated, or the hub
    cannot be asked and the cache does not hold it whole.
    """
    from huggingface_hub import snapshot_download

    repository, inside = parted(name)
    try:
        files = _files_in(name, revision)
        if words_only:
            files = [file for file in files if file.endswith(_WORDS)]
        wanted = [glob.escape(inside + file) for file in files]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted)) / inside
    except DataError:
        raise
    except Exception as fault:  # offline, unknown, gated, away: each has a class of its own, and of two libraries
        said = fault
    top = glob.escape(inside)
    safe = [f"{top}*{ending}" for ending in (_WORDS if words_only else _SAFE)]
    for patterns, weights in ((safe, "*.safetensors"), ([*safe, f"{top}*.bin"], "*.bin"), (safe, "*.pt")):
        try:  # whole as far as its top goes: what of its folders was never wanted is not known here
            told: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": [f"{top}*/*", f"{top}consolidated*"]}
            found = Path(snapshot_download(repository, revision=revision, local_files_only=True, **told)) / inside
        except Exception:  # not there, or not whole
            continue
        if (words_only and found.is_dir()) or any(found.rglob(weights)):
            return found
    raise hub_fault(said, name, revision) from said


def _files_in(name: str, revision: str | None) -> list[str]:
    """Files of `to_fetch` in an id's folder, without its name. One question, asked once. DataError where there is no
    such folder; else whatever the hub's library raises."""
    from huggingface_hub import HfApi

    repository, inside = parted(name)
    told = [file.rfilename for file in HfApi().model_info(repository, revision=revision).siblings or []]
    files = to_fetch([file.removeprefix(inside) for file in told if file.startswith(inside)])
    if {"config.json", "adapter_config.json"} & {*files}:
        return files
    holding = {path.removesuffix("/config.json") for path in told if path.endswith("/config.json")}
    folders = sorted(
        path.removeprefix(inside) for path in holding
        if path.startswith(inside) and path.removeprefix(inside) not in _FOLDERS
        and not any(str(parent) in holding for parent in PurePosixPath(path).parents)  # onnx/ of another, say
    )  # fmt: skip
    if folders:
        more = f" (or another of {len(folders)}: {', '.join(folders[1:9])})" if len(folders) > 1 else ""
        raise DataError(f"{name} holds no model itself, but in folders: give {name}/{folders[0]}{more}")
    if inside and not files:
        raise DataError(f"{name}: the hub has {repository}, but no folder {inside[:-1]!r} with a model in it")
    return files


def remote_outline(name: str, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of an id's weights on the meta device: only the heads of its safetensors are downloaded.

    RecipeError where it has none; DataError and EnvironmentFault as for `fetch`.
    """
    from huggingface_hub import HfApi

    (repository, inside), hub = parted(name), HfApi()
    try:
        files = _files_in(name, revision)
        whole = [file for file in files if file == "model.safetensors"]
        shards = whole or [file for file in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", file)]
        told = [hub.parse_safetensors_file_metadata(repository, inside + file, revision=revision) for file in shards]
    except DataError:
        raise
    except Exception as fault:  # as in `fetch`
        raise hub_fault(fault, name, revision) from fault
    if not told:
        raise RecipeError(
            f"{name}: its weights are pickles, or adapters, and what they hold is not told before they are downloaded: "
            f"`hf download {repository} --local-dir DIR`, then give DIR"
        )
    return {tensor: told_tensor(about.dtype, about.shape) for file in told for tensor, about in file.tensors.items()}


def _beside(name: str) -> str:
    """What lies where a name points on this disk, if anywhere: whoever mistyped a path did not mean the hub."""
    above = Path(name).parent
    if above == Path() or not above.is_dir():
        return ""
    try:
        there = sorted(item.name for item in above.iterdir() if item.is_dir() and item.name[0] != ".")
    except OSError:  # no right to look: then it is not told
        return ""
    near = closest(Path(name).name, there) or there[:5]
    return f" ({above} holds {', '.join(near)}{', ...' if len(there) > len(near) else ''})" if near else ""


def hub_fault(fault: Exception, name: str, revision: str | None = None) -> DataError | EnvironmentFault:
    """One line on why the hub did not give or take a repository, and how to mend it."""
    from huggingface_hub import errors

    what = f"{name}@{revision}" if revision else name
    reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    beside = _beside(name)
    if isinstance(fault, errors.GatedRepoError):
        return EnvironmentFault(
            f"{what}: the hub gives this model only to those who accepted its terms; accept them on its page there, "
            "then `hf auth login`"
        )
    if isinstance(fault, errors.RevisionNotFoundError):
        return DataError(f"{what}: the hub has the model {name}, but no revision {revision!r} of it")
    if isinstance(fault, errors.RepositoryNotFoundError):
        return DataError(
            f"{what}: there is no such folder here{beside}, and the hub has no model of this name (or it is private: "
            "`hf auth login`)"
        )
    if isinstance(fault, errors.OfflineModeIsEnabled) and beside:
        return DataError(
            f"{what}: there is no such folder here{beside}, and the hub's cache holds no model of this name"
        )
    if isinstance(fault, errors.OfflineModeIsEnabled):
        return EnvironmentFault(
            f"{what}: there is no such folder here, the hub's cache does not hold it whole, and HF_HUB_OFFLINE is set; "
            "unset it to download"
        )
    if isinstance(fault, errors.HfHubHTTPError):
        return EnvironmentFault(f"{what}: the hub refused: {reason}")
    if isinstance(fault, OSError) and fault.errno is not None and fault.filename:
        return EnvironmentFault(f"{what}: could not be kept on this machine: {fault.strerror}: {fault.filename}")
    return EnvironmentFault(
        f"{what}: there is no such folder here, and the hub could not be asked ({type(fault).__name__}: {reason})"
    )
