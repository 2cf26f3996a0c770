"""`leveret show`: one sample at every seam, from the record to the answer. The first tool for every bug.

    record -> pictures -> prompt -> token ids and labels -> what the towers see -> shapes and loss -> answer

Without a model the seams up to the pictures are shown. With one, all of them, each by the very code that training and
evaluation use.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.records import IGNORE, IMAGE_MARK, NaFlex, Sample
from leveret.runs import DataError, atomic_write, closest

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.text import Text

    from leveret.inputs import Encoded
    from leveret.model.vlm import VLM
    from leveret.pool import Source

LEARNED, SEEN, QUIET = "bold green", "bold cyan", "dim"
"""Styles of supervised tokens, of image positions, and of the rest."""

WITHOUT_MODEL = (
    "Without --model nothing is known of a chat format, a tokenizer or a tower. --model FOLDER adds: the prompt, token "
    "ids with labels, the picture as each tower sees it, shapes and loss in the model, and its answer."
)


@dataclass(slots=True)
class Trace:
    """One sample at every seam. `facts` is what --json prints; pictures are kept beside it.

    pictures  (title, picture), in reading order: as decoded, or as each tower sees them.
    """

    facts: dict[str, Any]
    pictures: list[tuple[str, Image]] = field(default_factory=list)


def show(
    source: str | Path,
    *,
    index: int = 0,
    id: str | None = None,
    images: str | Path | None = None,
    model: str | Path | None = None,
    out: str | Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Print one sample of `source` at every seam, and return what was printed as plain data.

    source  anything `pool.open_source` reads; `images` is its image root.
    index   which sample; or `id`, the first sample of that id.
    model   a model or run folder: adds prompt, tokens, pixels, shapes and answer.
    out     a .png file or a folder: the pictures are saved there (with a model, as its towers see them).
    json    print one JSON object instead.

    Raises DataError when there is no such sample, its record is malformed or a picture cannot be read; what comes
    before the fault is printed first.
    """
    from rich.console import Console

    from leveret.pool import open_source

    opened = open_source(source, images)
    place = _find(opened, index, id)
    trace, fault = Trace({"source": str(source), "index": place, "of": len(opened)}), None
    try:
        _follow(trace, opened.sample(place), model)
    except DataError as error:
        trace.facts["fault"], fault = str(error), error
    if out is not None:
        trace.facts["files"] = [str(path) for path in _save(trace, Path(out))]
    if json:
        print(dumps(trace.facts, indent=2, default=str))
    else:
        _print(trace, Console(highlight=False))
    if fault is not None:
        raise fault
    return trace.facts


def _find(source: Source, index: int, id: str | None) -> int:
    """Place of the sample. A DataError names what there is."""
    if id is None:
        if not 0 <= index < len(source):
            raise DataError(f"{source.name} has no sample {index}: it holds samples 0 to {len(source) - 1}")
        return index
    known = []
    for place in range(len(source)):
        try:
            known.append(source.sample(place).id)
        except DataError as fault:
            known.append(str(getattr(fault, "id", "")))  # a malformed record is worth showing, too
        if known[-1] == id:
            return place
    near = closest(id, known)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    raise DataError(f"{source.name} has no sample with id {id!r} among its {len(known)}{hint}")


# --- following one sample -------------------------------------------------------------------------------------------


def _follow(trace: Trace, sample: Sample, model: str | Path | None) -> None:
    """Fill `trace` seam by seam, so that what lies before a fault is kept."""
    from leveret.images import load

    facts = trace.facts
    facts["record"] = {
        "id": sample.id,
        "source": sample.source,
        "images": [str(ref) for ref in sample.images],
        "turns": [{"role": turn.role, "text": turn.text} for turn in sample.turns],
        "meta": dict(sample.meta),
    }
    facts["images"], decoded = [], []
    for ref in sample.images:
        decoded.append(load(ref))
        facts["images"].append({"file": str(ref), "width": decoded[-1].width, "height": decoded[-1].height})
        trace.pictures.append((f"{ref} as decoded", decoded[-1]))
    if model is None:
        facts["without"] = WITHOUT_MODEL
        return

    from leveret.inputs import encode, find_chat
    from leveret.model.source import locate, open_given

    given = locate(model)
    folder, (vlm, _, _) = given.folder, open_given(given)
    if vlm.tokenizer is None:
        raise DataError(f"{folder} holds no tokenizer, so nothing can be written for it or read from it")
    encoded = encode(sample.turns, vlm.chat, vlm.tokenizer, vlm.spec, [(im.height, im.width) for im in decoded])
    facts["model"] = str(folder)
    facts["prompt"] = {"chat": vlm.chat, "stop": list(find_chat(vlm.chat).stop), "text": encoded.text}
    facts["tokens"] = {
        "positions": len(encoded.input_ids),
        "images": sum(encoded.image_mask),
        "supervised": sum(label != IGNORE for label in encoded.labels),
        "runs": list(_runs(encoded, vlm.tokenizer)),
    }
    _through(trace, sample, encoded, decoded, vlm)
    facts["answer"] = _answer(sample, vlm)


def _runs(encoded: Encoded, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Neighbouring positions of one kind (image, supervised, other), each as one entry."""
    kinds = [
        "image" if seen else "supervised" if label != IGNORE else "other"
        for seen, label in zip(encoded.image_mask, encoded.labels, strict=True)
    ]
    start = 0
    for place in range(1, len(kinds) + 1):
        if place < len(kinds) and kinds[place] == kinds[start]:
            continue
        ids = encoded.input_ids[start:place]
        run: dict[str, Any] = {"kind": kinds[start], "first": start, "length": place - start}
        if kinds[start] != "image":
            run |= {"ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
        yield run
        start = place


def _through(trace: Trace, sample: Sample, encoded: Encoded, decoded: Sequence[Image], vlm: VLM) -> None:
    """Pixels, shapes and loss: the batch of this one sample, as training would make it."""
    import torch

    from leveret.inputs import Item, collate, prepare_all

    if vlm.device.type == "cpu":
        vlm.cast(torch.float32)  # as answering does: half of what a layer needs is not there in halves
    pixels = [prepare_all(image, vlm.spec) for image in decoded]
    trace.pictures = [
        (f"{ref} as {name}", picture)
        for ref, image in zip(sample.images, decoded, strict=True)
        for name, picture in _views(image, vlm)
    ]
    trace.facts["pixels"] = [
        {"tower": name, "shape": list(array.shape), "min": float(array.min()), "max": float(array.max())}
        for image in pixels
        for name, array in image.items()
    ]
    sizes = [(image.height, image.width) for image in decoded]
    batch = collate([Item(encoded, sample.id, pixels, sizes=sizes)], vlm.tokenizer.pad_token_id or 0)
    batch = batch.to(vlm.device)
    with torch.no_grad():
        shapes = {"input_ids": batch.input_ids} | {f"pixels[{name}]": p for name, p in batch.pixels.items()}
        if batch.pixels:
            shapes["tower features"] = vlm.see(batch.pixels, batch.image_sizes)
            shapes["image tokens (after the connector)"] = vlm.connector(shapes["tower features"].to(vlm.dtype))
        if batch.pixels and vlm.tiles is not None:
            tokens = shapes["image tokens (after the connector)"]
            name = "of their own shape" if isinstance(vlm.spec.tiling, NaFlex) else "tiles put together"
            shapes[f"image tokens ({name})"] = vlm.tiles(tokens, batch.tile_image, batch.image_sizes)
        shapes["embeddings"] = vlm.embed(batch)
        output = vlm(batch)
        shapes["logits where the next token is supervised"] = output.logits
    trace.facts["shapes"] = {name: list(tensor.shape) for name, tensor in shapes.items()}
    loss = float(output.loss_sum) / output.supervised if output.supervised else None
    trace.facts["loss"] = {"supervised": output.supervised, "mean": loss}


def _views(image: Image, vlm: VLM) -> Iterator[tuple[str, Image]]:
    """What the towers are shown of an image, in words and as pictures, before mean and std."""
    from leveret.inputs import fit
    from leveret.inputs.resize import filter_of
    from leveret.inputs.tiles import cut

    tiling = vlm.spec.tiling
    for view in vlm.spec.towers:
        if tiling is None:
            yield f"{view.name} sees it ({view.resize}, {view.size} x {view.size})", fit(image, view)
            continue
        if isinstance(tiling, NaFlex):
            height, width = tiling.best(image.height, image.width)
            words = f"{view.name} sees it ({width} x {height}, {tiling.said(image.height, image.width)})"
            yield words, image.resize((width, height), filter_of(view.resample))
            continue
        rows, columns = (side // tiling.size for side in tiling.best(image.height, image.width))
        tiles = cut(image, tiling, view.resample)
        if len(tiles) > rows * columns:
            whole, *tiles = tiles
            yield f"{view.name} sees it ({view.size} x {view.size}, before its {rows} x {columns} tiles)", whole
        for place, tile in enumerate(tiles):
            yield f"{view.name} sees its tile in row {place // columns + 1}, column {place % columns + 1}", tile


def _answer(sample: Sample, vlm: VLM) -> dict[str, Any]:
    """What the model says (greedily) where the sample's last assistant turn stands, and whether it is the same."""
    from leveret.generate.engine import Engine, Request

    last = max(place for place, turn in enumerate(sample.turns) if turn.role == "assistant")
    before, reference = sample.turns[:last], sample.turns[last].text
    marks = sum(turn.text.count(IMAGE_MARK) for turn in before if turn.role == "user")
    request = Request(question_id=sample.id, images=sample.images[:marks], turns=before)
    said = Engine(vlm).answer([request])[0]
    return {
        "model": said.text,
        "reference": reference,
        "equal": said.text.strip() == reference.strip(),
        "finish": said.meta.get("finish", ""),
    }


def _save(trace: Trace, out: Path) -> list[Path]:
    """The pictures as PNG: at `out` if that is a .png (the second one at `..-2.png`), else in the folder `out`."""
    first = out if out.suffix.lower() == ".png" else out / f"sample-{trace.facts['index']}.png"
    paths = []
    for number, (_, picture) in enumerate(trace.pictures, start=1):
        paths.append(first if number == 1 else first.with_stem(f"{first.stem}-{number}"))
        data = io.BytesIO()
        picture.save(data, format="PNG")
        atomic_write(paths[-1], data.getvalue())
    return paths


# --- printing -------------------------------------------------------------------------------------------------------


def preview(picture: Image, columns: int = 48, rows: int = 24) -> Text:
    """The picture in half blocks: two pixels a character cell, at most `columns` x `rows` cells."""
    import numpy as np
    from rich.text import Text

    scale = min(columns / picture.width, 2 * rows / picture.height, 1)
    width, height = max(1, round(picture.width * scale)), max(2, 2 * round(picture.height * scale / 2))
    cells = np.asarray(picture.resize((width, height))).tolist()  # [height][width][3]
    text = Text()
    for top in range(0, height, 2):
        for above, below in zip(cells[top], cells[top + 1], strict=True):
            text.append(
                "\u2580", style=f"rgb({above[0]},{above[1]},{above[2]}) on rgb({below[0]},{below[1]},{below[2]})"
            )
        text.append("\n")
    return text


def _hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def plain(text: str) -> str:
    """`text` without control characters: data must not steer the terminal it is shown on. Newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _print(trace: Trace, console: Console) -> None:
    from rich.text import Text

    facts = trace.facts

    def head(title: str) -> None:
        console.print()
        console.rule(Text(title, style="bold"), align="left")

    def say(*parts: str | tuple[str, str]) -> None:
        shown = [plain(part) if isinstance(part, str) else (plain(part[0]), part[1]) for part in parts]
        console.print(Text.assemble(*shown), soft_wrap=True)

    head(f"Record: sample {facts['index']} of {facts['of']} in {plain(facts['source'])}")
    if record := facts.get("record"):
        say(("id      ", QUIET), record["id"])
        say(("source  ", QUIET), record["source"])
        for key, value in record["meta"].items():
            say((f"{key}  ", QUIET), str(value))
        for turn in record["turns"]:
            say((f"{turn['role']:<10}", QUIET), turn["text"])
    for image in facts.get("images", []):
        say(("image   ", QUIET), f"{image['file']}  {image['width']} x {image['height']} pixels (width x height)")
    if "prompt" in facts:
        head(f"Prompt: chat format {facts['prompt']['chat']}")
        say(facts["prompt"]["text"])
        _print_tokens(facts["tokens"], head, say)
    if console.color_system is not None:  # half blocks without colour are a blank wall
        for title, picture in trace.pictures:
            head(f"Picture: {plain(title)}")
            console.print(preview(picture), end="")
    if "shapes" in facts:
        head("Shapes in the model")
        for pixels in facts["pixels"]:
            say((f"{pixels['tower']}: ", QUIET), f"values from {pixels['min']:.3f} to {pixels['max']:.3f}")
        for name, shape in facts["shapes"].items():
            say((f"{name:<44}", QUIET), " x ".join(map(str, shape)))
        loss = facts["loss"]
        if loss["mean"] is not None:
            say((f"{'loss':<44}", QUIET), f"{loss['mean']:.4f} nats a token, over {loss['supervised']} tokens")
    if "answer" in facts:
        answer = facts["answer"]
        head("Answer")
        say(("model      ", QUIET), answer["model"])
        say(("reference  ", QUIET), answer["reference"])
        say(("equal", LEARNED) if answer["equal"] else ("different", "bold red"))
    if "files" in facts:
        head("Saved")
        for file in facts["files"]:
            say(file)
    if "without" in facts:
        say("")
        say((facts["without"], QUIET))
    if "fault" in facts:
        head("Fault")
        say((facts["fault"], "bold red"))


def _print_tokens(tokens: dict[str, Any], head: Any, say: Any) -> None:
    head(f"Tokens: {tokens['positions']} positions, {tokens['images']} of images, {tokens['supervised']} supervised")
    say(("id:token", QUIET), "   ", ("+id:token is supervised", LEARNED), "   ", (f"{IMAGE_MARK} x n: images", SEEN))
    parts: list[tuple[str, str]] = []
    for run in tokens["runs"]:
        if run["kind"] == "image":
            parts.append((f"{IMAGE_MARK} x {run['length']}", SEEN))
            continue
        # The plus is for terminals and files without colour.
        sign, style = ("+", LEARNED) if run["kind"] == "supervised" else ("", QUIET)
        named = zip(run["ids"], run["tokens"], strict=True)
        parts += [(f"{sign}{token}:{name}".replace("\n", "\\n"), style) for token, name in named]
    say(*[piece for part in parts for piece in (part, " ")])
