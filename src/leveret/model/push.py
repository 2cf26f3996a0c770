"""A model of ours put on the hub, with a card that says what it is made of and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret import own
from leveret.model import checkpoint
from leveret.model.hub import as_id, hub_fault, outline_tensors, parted, to_fetch
from leveret.runs import DataError, EnvironmentFault, RecipeError

if TYPE_CHECKING:
    from leveret.model.vlm import VLM

CARD = "README.md"
_PATHS = ("tower", "source", "name")
"""Keys in config.json that may hold a path of this machine."""


def push(model: str | Path, name: str, *, private: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Uploads a model folder of ours, or a finished run's, as one commit to the repository `name`, which is made where
    there is none.

    Only files that a model is read from, and a card: the folder's own README.md where it has one, else one written from
    the composition. Of paths of this machine that config.json names, only the ends are uploaded.

    Returns {"repository", "files": {name: bytes}, "url", "card"}; `url` is None in a dry run, which asks nobody.

    Raises:
        RecipeError: `name` is no OWNER/NAME, or the model is another tool's (convert it first).
        DataError: there is no model (a run is not finished), or its weights are not those that config.json describes.
        EnvironmentFault: the hub cannot be asked, or does not let this account write there.
    """
    asked = as_id(name)
    if asked is None or asked[1] is not None or parted(asked[0])[1]:
        raise RecipeError(f"{name}: not a name of the hub; give OWNER/NAME, OWNER being your account or organisation")
    files = to_upload(Path(model).expanduser(), name)
    sizes = {path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in files.items()}
    card = files[CARD] if isinstance(files[CARD], bytes) else Path(files[CARD]).read_bytes()  # type: ignore[arg-type]
    url = None if dry_run else _upload(name, files, private)
    return {"repository": name, "files": sizes, "url": url, "card": bytes(card).decode("utf-8")}


def to_upload(model: str | Path, name: str) -> dict[str, Path | bytes]:
    """Name in the repository -> a file, or the bytes that take its place. DataError and RecipeError as for `push`."""
    folder = checkpoint.find(model)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "format" not in config:
        raise RecipeError(f"{model} is a model of another tool; make it one of ours first: leveret convert {model} OUT")
    if "auto_map" in config:
        raise RecipeError(f"{model} was published with its code, and none is uploaded; give the model it was made of")
    vlm = checkpoint.outline(folder)
    ours = {key: tuple(tensor.shape) for key, tensor in checkpoint.stored(vlm)}
    there = {key: tuple(tensor.shape) for key, tensor in outline_tensors(folder / "model.safetensors").items()}
    if wrong := sorted(key for key in ours.keys() | there.keys() if ours.get(key) != there.get(key)):
        raise DataError(
            f"{folder}: the weights are not those of the model in config.json: {wrong[0]} is "
            f"{there.get(wrong[0], 'missing')}, the model's is {ours.get(wrong[0], 'not there')}; nothing was uploaded"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise DataError(f"{folder} holds no tokenizer, so nobody could ask the model anything; nothing was uploaded")
    files: dict[str, Path | bytes] = {}
    for file in to_fetch([path.name for path in folder.iterdir() if path.is_file()]):
        files[file] = folder / file
    files |= {file: folder / file for file in checkpoint.own_files(config) if (folder / file).is_file()}
    files["config.json"] = (json.dumps(_shortened(config), indent=2, sort_keys=True) + "\n").encode()
    files[CARD] = folder / CARD if (folder / CARD).is_file() else card(vlm, _record(folder), name).encode()
    return files


def _shortened(value: Any, key: str = "") -> Any:
    """Without folders of this machine: of paths the ends."""
    if isinstance(value, Mapping):
        return {name: _shortened(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, str) and own.is_own(value):
        return _own_end(value)
    return _end(value) if key in _PATHS and isinstance(value, str) else value


def _own_end(reference: str) -> str:
    """A row in a file of a user's own, without the folders before the file: name and fingerprint tell which it is."""
    said = own.parse(reference, "model")
    return f"{Path(said.file).name}:{said.name}" + (f"@{said.fingerprint}" if said.fingerprint else "")


def _record(folder: Path) -> dict[str, Any]:
    from leveret.model.merge import RECORD

    return json.loads((folder / RECORD).read_text("utf-8")) if (folder / RECORD).is_file() else {}


def card(vlm: VLM, merged: Mapping[str, Any], name: str) -> str:
    """The README.md of a model: what it is made of and how it is loaded, in Markdown with the hub's front matter.

    vlm     may be on the meta device. merged: what `leveret merge` wrote down, or nothing. name: OWNER/NAME.
    """
    from leveret.model.parts import parts_table, tokens_of
    from leveret.records import NaFlex

    rows = [
        f"| {row.part} | {_shown(row.note)} | {row.parameters:,} |" for row in parts_table(vlm, {})
    ]  # fmt: skip
    recipe = vlm.recipe
    kind = _called(recipe.connector.kind)
    brought = sorted(checkpoint.own_files(checkpoint.config_of(vlm)))
    towers = [_called(_end(tower.tower)) for tower in recipe.vision.each()]
    bases = [
        base
        for base in (*(tower.tower for tower in recipe.vision.each()), recipe.language.name)
        if "/" in _end(base) and not own.is_own(base) and not base.startswith("world/")  # those come with leveret
    ]
    head = {
        "library_name": "leveret",
        "pipeline_tag": "image-text-to-text",
        "tags": ["leveret", "vision-language", *([] if own.is_own(recipe.connector.kind) else [kind])],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items())]
    lines += ["base_model:", *(f"  - {base}" for base in bases)] if bases and not merged else []
    views = "seen as " + ", ".join(f"{view.size} x {view.size} pixels ({view.resize})" for view in vlm.spec.towers)
    if isinstance(tiling := vlm.spec.tiling, NaFlex):
        views = f"seen at its own shape, in patches of {tiling.patch} x {tiling.patch} pixels,"
    elif tiling is not None:
        views = f"cut into tiles of {tiling.size} x {tiling.size} pixels"
    lines += [
        "---",
        "",
        "# A small vision-language model",
        "",
        f"{' and '.join(towers)}, a `{kind}` connector and {_called(_end(recipe.language.name))}, joined by "
        "[leveret](https://pypi.org/project/leveret/).",
        "",
        "| part | what | parameters |",
        "| --- | --- | ---: |",
        *rows,
        "",
        f"- An image is {views} and fills {tokens_of(vlm)}.",
        f"- Chat format: `{_called(vlm.chat)}`, in `chat_template.jinja`.",
    ]
    more = f", own={brought}" if brought else ""
    option = "".join(f" --own {file}" for file in brought)
    told = [
        f"A part of it is built by code of its maker's: {', '.join(f'`{file}`' for file in brought)}, beside "
        "the weights. Download it, read it, and name it as above if you trust it.",
        "",
    ] if brought else []  # fmt: skip
    if merged and "weights" in merged:
        parts = ", ".join(f"{share:g} of {one}" for share, one in zip(merged["weights"], merged["models"], strict=True))
        lines.append(f"- Weights averaged: {parts}.")
    lines += [
        "",
        "## Use it",
        "",
        "```python",
        "import leveret",
        "",
        f'model = leveret.load("{name}"{more})',
        'print(model.ask("photo.jpg", "What is this?"))',
        "```",
        "",
        f"or `leveret chat {name} photo.jpg{option}`. No code of this repository is run, and there is no pickle in it.",
        "",
        *told,
    ]
    return "\n".join(lines)


def _called(name: str) -> str:
    """A row's name; of one in a file of a user's own that alone."""
    return own.parse(name, "model").name if own.is_own(name) else name


def _end(name: str) -> str:
    """An id as it is, of a path the end."""
    return name if as_id(name) and not Path(name).exists() else name.rstrip("/").split("/")[-1]


def _shown(note: str) -> str:
    """A part's note without folders of this machine."""
    words = (word if word.count("/") < 2 else word.rstrip("/").split("/")[-1] for word in note.split(" "))
    return " ".join(words).replace("|", "\\|")


def _upload(name: str, files: Mapping[str, Path | bytes], private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi()
    operations = [CommitOperationAdd(path, file) for path, file in files.items()]
    try:
        api.create_repo(name, private=private, exist_ok=True)
        made = api.create_commit(name, operations, commit_message="A model, by leveret push")
    except Exception as fault:  # no token, no right, offline, away: each has a class of its own, and of two libraries
        status = getattr(getattr(fault, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(fault, errors.LocalTokenNotFoundError):
            raise EnvironmentFault(
                f"{name}: the hub does not let you write there (is {name.split('/')[0]} your account?). "
                "To log in: `hf auth login`, with a token that may write"
            ) from fault
        if isinstance(fault, errors.OfflineModeIsEnabled):
            raise EnvironmentFault(f"{name}: nothing was uploaded, because HF_HUB_OFFLINE is set; unset it") from fault
        if isinstance(fault, errors.HfHubHTTPError):
            raise hub_fault(fault, name) from fault
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise EnvironmentFault(f"{name}: the hub could not be reached ({type(fault).__name__}: {reason})") from fault
    return str(made.commit_url)
