"""Models averaged, and adapters added to a model, one tensor at a time: no model of ours stands in memory whole.

Another tool's is converted first, beside the result, and is whole in memory meanwhile.

What is written has the first model's settings, tokenizer, names and types to the byte; only numbers change.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.model import checkpoint
from leveret.model.hub import as_id, fetch, read_head
from leveret.model.language import LanguageFacts
from leveret.model.source import Given, as_ours, locate, open_given, refuse_place
from leveret.model.tower_facts import TowerFacts
from leveret.records import ImageSpec
from leveret.runs import DataError, EnvironmentFault, RecipeError, differences, sha256_of, write_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, RECORD = "model.safetensors", "merged.json"
SUMS_TO = 1e-6
"""How far from 1 the weights may sum."""

_NAMES = ("tower", "source", "name")
"""Keys in config.json whose values are ids or paths."""
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def merge(
    given: Sequence[str],
    out: str | Path,
    weights: Sequence[str] = (),
    *,
    normalise: bool = False,
    base: str | None = None,
    hub: str | Path | None = None,
) -> dict[str, Any]:
    """What the command does: `average`, or `add_adapters` where one folder of adapters is given.

    given    models as a person wrote them; numbers among them that name nothing on this machine are weights, because
             `--weights 0.3 0.7` leaves all but the first there.
    weights  numbers, or several joined by commas.
    """
    models = [name for name in given if Path(name).expanduser().exists() or not _is_number(name)]
    said = [one for name in weights for one in name.split(",")] + [name for name in given if name not in models]
    if wrong := [one for one in said if not _is_number(one)]:
        raise RecipeError(f"--weights {wrong[0]}: not a number; write --weights 0.3 0.7, one for each model")
    if base is None and not (len(models) == 1 and is_adapters(_folder_of(models[0]))):
        return average(models, out, [float(one) for one in said] or None, normalise=normalise, hub=hub)
    if len(models) != 1 or said or normalise:
        raise RecipeError(
            "adapters are added to their base whole: give one folder of adapters, no weights, and --base MODEL; to "
            "average several models, leave --base out"
        )
    return add_adapters(models[0], out, base, hub=hub)


def in_words(found: Mapping[str, Any]) -> str:
    """One line on what `merge` did."""
    numbers = f"{found['tensors']:,} tensors, {found['parameters']:,} numbers"
    if "weights" in found:
        models = zip(found["weights"], found["models"], strict=True)
        return f"{' + '.join(f'{weight:g} x {name}' for weight, name in models)}: {numbers}"
    base = f"adapters added to {found['models'][0]}" if found["models"] else "adapters added to the model they name"
    changed = f", {found['changed']:,} of them changed" if found["changed"] is not None else ""
    return f"{base}: {numbers}{changed}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def average(
    models: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    normalise: bool = False,
    hub: str | Path | None = None,
) -> dict[str, Any]:
    """Writes sum_i w_i model_i to the folder `out`, in the types of the first.

    models   two or more, each as `source.locate` takes it, of one shape.
    weights  one each, none below 0; equal ones when left out. They must sum to 1 within SUMS_TO, or are divided by
             their sum (`normalise`).

    Numbers are averaged in float32 as x + sum_i w_i (x_i - x), x being of the heaviest model: what is equal stays
    equal to the bit, and a model of weight 1 comes out as it is. Running statistics are averaged like weights; counts
    (num_batches_tracked) are averaged and rounded; other whole numbers and truths must be equal.

    Returns {"out", "models", "weights", "tensors", "parameters"}. RecipeError for the weights, for `out`, and for
    models that differ in composition, chat format, tokenizer or shapes: it names the first difference.
    """
    shares = _shares(models, weights, normalise)
    out = Path(out)
    found = [locate(model, hub) for model in models]
    refuse_place(out, *(given.folder for given in found), *map(Path, models))
    with ExitStack() as stack:
        folders = [stack.enter_context(as_ours(given, out.parent, hub=hub)) for given in found]
        _alike(found, folders)
        files = [stack.enter_context(_opened(folder)) for folder in folders]
        heaviest = shares.index(max(shares))
        shapes = _shapes(files[0])

        def change(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return _whole_numbers(name, [file.get_tensor(name) for file in files], shares, found)
            return _mean((file.get_tensor(name) for file in files), shares, heaviest, files[heaviest].get_tensor(name))

        record = {
            "models": [_called(given) for given in found],
            "weights": shares,
            "sha256": [sha256_of(folder / WEIGHTS) for folder in folders],
        }
        _rewrite(folders[0], out, change, record)
    return {"out": str(out), "models": record["models"], "weights": shares, "tensors": len(shapes),
            "parameters": sum(map(math.prod, shapes.values()))}  # fmt: skip


def _shares(models: Sequence[Any], weights: Sequence[float] | None, normalise: bool) -> list[float]:
    """One weight a model, which sum to 1."""
    if len(models) < 2:
        raise RecipeError(f"{len(models)} model given; an average needs two or more")
    if weights is None:
        return [1 / len(models)] * len(models)
    said = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(models):
        raise RecipeError(f"--weights {said}: {len(weights)} for {len(models)} models; give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise RecipeError(f"--weights {said}: each must be a number from 0 on")
    total = math.fsum(weights)
    if total <= 0 or (not normalise and abs(total - 1) > SUMS_TO):
        more = "" if total <= 0 else ", or add --normalise to divide each by their sum"
        raise RecipeError(f"--weights {said}: they sum to {total:.10g}, and must sum to 1{more}")
    return [weight / total for weight in weights]


def _mean(tensors: Any, shares: Sequence[float], heaviest: int, around: Tensor) -> Tensor:
    """Around the heaviest, in float32; tensors of weight 0 do not count, be they what they may."""
    import torch

    middle = around.float()
    total = middle.clone()
    for place, tensor in enumerate(tensors):
        if place != heaviest and shares[place] > 0:
            other = tensor.float()
            total = torch.where(other == middle, total, total + shares[place] * (other - middle))
    return total


def _whole_numbers(name: str, tensors: Sequence[Tensor], shares: Sequence[float], found: Sequence[Given]) -> Tensor:
    import torch

    if name.endswith("num_batches_tracked"):
        mean = sum(share * tensor.double() for share, tensor in zip(shares, tensors, strict=True))
        return torch.as_tensor(mean).round().to(tensors[0].dtype)
    for given, tensor in zip(found, tensors, strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise RecipeError(
                f"{given.name} differs from {found[0].name} in {name}, which holds whole numbers; they have no average"
            )
    return tensors[0]


# --- adapters ---------------------------------------------------------------------------------------------------------

PREFIXES = ("base_model.model.", "base_model.model.language_model.", "base_model.model.language.")
"""What stands before a layer's name where PEFT wrapped a language model, or a model that holds one."""


REST = "rest.safetensors"
"""What learned beside adapters, under the names of a model of ours; `train` writes it."""


def is_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters in PEFT's format."""
    return (folder / "adapter_config.json").is_file()


def add_adapters(
    adapters: str | Path, out: str | Path, base: str | None = None, *, hub: str | Path | None = None
) -> dict[str, Any]:
    """Writes a whole model to `out`: `base` with the adapters in a folder of PEFT's format added to its language model,
    and with what else learned beside them where `train` has saved it (rest.safetensors).

    adapters  a folder, or an id of the hub.
    base      a model as `source.locate` takes it; by default the one that adapter_config.json names.

    Each sum is made in float32 and kept in the base's type. Returns as `average` does, with "changed", the number of
    tensors that are not the base's. RecipeError where there is no base, or it is no whole model; DataError where base
    and adapters do not fit, saying what is missing.
    """
    from leveret.model import parts, peers
    from leveret.model.peers.files import adapter_changes, read_adapters

    out, path = Path(out), _folder_of(adapters)
    folder = peers.Folder(path)
    if not is_adapters(path):
        raise DataError(f"{path}: there is no adapter_config.json, so it holds no adapters in PEFT's format")
    if (tool := peers.recognise(folder)) is not None:  # it says itself what the whole model is
        refuse_place(out, path)
        vlm, _, _ = open_given(Given(str(adapters), path, tool), hub=hub, base=base)
        checkpoint.save(vlm, out)
        return {"out": str(out), "models": [], "tensors": len(list(checkpoint.stored(vlm))), "changed": None,
                "parameters": parts.count(vlm)}  # fmt: skip
    settings = folder.settings("adapter_config.json")
    given = _base(path, settings, base, hub)
    refuse_place(out, path, given.folder)
    with as_ours(given, out.parent, hub=hub) as home, _opened(home) as file:
        shapes = _shapes(file)
        language = {name.removeprefix("language."): x for name, x in shapes.items() if name.startswith("language.")}
        tensors = read_adapters(folder)
        prefix = language_prefix(tensors, language)
        try:
            found = adapter_changes(language, tensors, settings, prefix)
        except DataError as fault:
            raise DataError(f"{path} does not fit {given.name}: {fault}") from None
        changes = {f"language.{name}": change for name, change in found}
        rest, resize = _rest(path)
        if strangers := [name for name, tensor in rest.items() if shapes.get(name) != tuple(tensor.shape)]:
            raise DataError(
                f"{path} does not fit {given.name}: {REST} holds {strangers[0]} {tuple(rest[strangers[0]].shape)}, and "
                f"the model has {shapes.get(strangers[0], 'no such tensor')}"
            )

        def change(name: str, tensor: Tensor) -> Tensor:
            if name in rest:
                return rest[name]
            return changes[name](tensor) if name in changes else tensor

        record = {
            "models": [_called(given)],
            "adapters": path.resolve().name,
            "sha256": [sha256_of(home / WEIGHTS)],
        }
        _rewrite(home, out, change, record, resize)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    changed = len(changes.keys() | rest.keys())
    return {"out": str(out), "models": record["models"], "tensors": len(shapes), "changed": changed,
            "parameters": parameters}  # fmt: skip


def _rest(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """What learned beside adapters, and how images were made square meanwhile, where that was another way."""
    from leveret.model.hub import read_tensors

    if not (path / REST).is_file():
        return {}, None
    tensors = read_tensors(path / REST)
    with _opened(path, REST) as file:
        return tensors, (file.metadata() or {}).get("resize")


def _folder_of(adapters: str | Path) -> Path:
    path = Path(adapters).expanduser()
    if not path.exists() and (name := as_id(str(adapters))) is not None:
        return fetch(*name)
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder of adapters")
    return path


def _base(path: Path, settings: Mapping[str, Any], base: str | None, hub: str | Path | None) -> Given:
    """The whole model that adapters are added to."""
    named = settings.get("base_model_name_or_path")
    if base is None and not named:
        raise RecipeError(f"{path}: adapter_config.json names no base model; say with --base which model they stand on")
    try:
        return locate(base or str(named), hub)
    except (DataError, EnvironmentFault) as fault:
        if base is not None:
            raise
        raise RecipeError(
            f"{path}: adapter_config.json says the adapters stand on {named!r}, which is no whole model here "
            f"({fault}). Say with --base which model they stand on: a folder with towers, connector and language model"
        ) from None


def language_prefix(tensors: Mapping[str, Any], language: Mapping[str, Any]) -> str:
    """What stands before the names of layers: under which of PREFIXES most of them are the language model's."""

    def fitting(prefix: str) -> int:
        layers = (name.removeprefix(prefix).split(".lora_")[0] for name in tensors if name.startswith(prefix))
        return sum(f"{layer}.weight" in language for layer in layers)

    return max(PREFIXES, key=fitting)


# --- two models of one shape ------------------------------------------------------------------------------------------


def _alike(found: Sequence[Given], folders: Sequence[Path]) -> None:
    """RecipeError naming the first thing in which a model differs from the first one."""
    for given, folder in zip(found[1:], folders[1:], strict=True):
        named = found[0].ours and given.ours
        if lines := differences(*(_composition(one, named) for one in (folders[0], folder))):
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise _differ(
                found[0], given, lines[0].replace(" there, ", " in the first, ").replace(" now", " in the other"), more
            )
        with _opened(folders[0]) as one, _opened(folder) as other:
            ours, theirs = _shapes(one), _shapes(other)
        for name in dict.fromkeys([*ours, *theirs]):
            if ours.get(name) != theirs.get(name):
                shapes = (f"{names.get(name, 'not there')}" for names in (ours, theirs))
                raise _differ(found[0], given, "{}: {} in the first, {} in the other".format(name, *shapes))
        if said := _other_tokens(folders[0], folder):
            raise _differ(found[0], given, f"the tokenizers: {said}")


def _differ(one: Given, other: Given, what: str, more: str = "") -> RecipeError:
    return RecipeError(
        f"{other.name} has not the shape of {one.name}, so there is no average of the two; the first difference is "
        f"{what}{more}"
    )


def _composition(folder: Path, named: bool) -> dict[str, Any]:
    """What config.json says of the model that an average must share. Of paths and ids the last part counts: a backbone
    may have been taken from a folder here and from the hub there.

    named  whether the language model's name counts too: other tools write down the folder that they last stood in.
    """
    config, recipe = checkpoint.read(folder)
    said: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        # through the classes: a field that an older leveret did not write has its default
        "spec": ImageSpec.from_dict(config["spec"]).to_dict(),
        "vision": [TowerFacts.from_dict(facts).to_dict() for facts in config["vision"]],
        "language": LanguageFacts(**config["language"]).to_dict(),
    }
    said["recipe"]["connector"].pop("dropout", None)
    if not named:
        del said["recipe"]["language"]["name"]
        said["language"] = {name: value for name, value in said["language"].items() if name != "source"}

    def plain(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item, name) for name, item in sorted(value.items()) if name not in _NOT_THE_MODEL}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if key in _NAMES and isinstance(value, str):
            return value.rstrip("/").split("/")[-1].lower()
        return value

    return {"chat": said["recipe"]["chat"], **plain(said)}


def _other_tokens(one: Path, other: Path) -> str | None:
    """The first difference of two tokenizers in words; None where they give the same ids."""
    both = [
        checkpoint.tokenizer(folder, int(checkpoint.read(folder)[0]["language"]["vocab"])) for folder in (one, other)
    ]
    if both[0] is None or both[1] is None:
        return None if both[0] is both[1] else "only one of the two has one"
    tables = [tokenizer.get_vocab() for tokenizer in both]
    if tables[0] != tables[1]:
        token = min(
            token for token in tables[0].keys() | tables[1].keys() if tables[0].get(token) != tables[1].get(token)
        )
        ids = [str(table.get(token, "no token")) for table in tables]
        return f"{token!r} is {ids[0]} in the first, {ids[1]} in the other"
    rules = [_rules(tokenizer) for tokenizer in both]
    if lines := differences(*rules):
        return lines[0].replace(" there, ", " in the first, ").replace(" now", " in the other")
    specials = [tokenizer.special_tokens_map for tokenizer in both]
    lines = differences(*({key: str(value) for key, value in special.items()} for special in specials))
    return lines[0].replace(" there, ", " in the first, ").replace(" now", " in the other") if lines else None


def _rules(tokenizer: Any) -> dict[str, Any]:
    """How text is split, besides the vocabulary. How rows are cut and padded is no property of a model."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    told = json.loads(backend.to_str())
    return {name: value for name, value in told.items() if name not in ("truncation", "padding")}


# --- files ------------------------------------------------------------------------------------------------------------


def _opened(folder: Path, name: str = WEIGHTS) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(folder / name, "pt")
    except Exception as fault:  # safetensors' own error class is not public
        raise DataError(f"{folder / name}: cannot be read ({fault})") from fault


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _rewrite(
    folder: Path,
    out: Path,
    change: Callable[[str, Tensor], Tensor],
    record: Mapping[str, Any],
    resize: str | None = None,
) -> None:
    """Writes the model in `folder` to `out` with every tensor changed; types and shapes stay, so that the file's head
    does. change: (name, the folder's tensor) -> the tensor that takes its place, in any type. resize: of all towers."""
    import torch

    with checkpoint.fresh_folder(out) as fresh, _opened(folder) as file:
        for beside in folder.iterdir():
            if beside.is_file() and beside.name not in (WEIGHTS, RECORD):
                shutil.copyfile(beside, fresh / beside.name)
        if resize is not None:
            (fresh / "config.json").write_text(_resized(folder, resize), "utf-8")
        head, told = read_head(folder / WEIGHTS)
        with open(fresh / WEIGHTS, "wb") as written:
            written.write(head)
            for name, about in told.items():
                old = file.get_tensor(name)
                new = change(name, old).to(old.dtype).contiguous()
                first, last = about["data_offsets"]
                if new.shape != old.shape or new.numel() * new.element_size() != last - first:
                    raise DataError(f"{name}: {tuple(new.shape)} is to take the place of {tuple(old.shape)}")
                written.write(new.reshape(-1).view(torch.uint8).numpy().tobytes())
        write_json(fresh / RECORD, record)


def _resized(folder: Path, resize: Any) -> str:
    config, recipe = checkpoint.read(folder)
    config["recipe"] = recipe.model_copy(update={"vision": recipe.vision.resized(resize)}).model_dump(mode="json")
    for view in (*config["spec"]["towers"], *config["vision"]):
        view["resize"] = resize
    return json.dumps(config | {"format": checkpoint.FORMAT}, indent=2, sort_keys=True) + "\n"


def _called(given: Given) -> str:
    """An id as it is, of a path the end: paths of this machine have no place in a model that is saved."""
    return given.name if not Path(given.name).exists() else Path(given.name).resolve().name
