"""A stage's data, prepared once and read many times: texts as flat arrays, features of a frozen tower beside them.

    STAGE/cache/
      meta.json                         sample ids, image references, and the facts the cache was made from
      ids.npy labels.npy visual.npy     [all positions] int32, int32, bool; sample i is offsets[i]:offsets[i+1]
      offsets.npy                       [samples + 1] int64
      words.npy                         [samples] int64: words of its turns, image marks left out
      supervised.npy                    [samples] int64: tokens that it teaches
      images.npy image_offsets.npy      which distinct images sample i shows, in order
      sizes.npy                         [distinct images, 2] int64: (height, width), where they are seen in tiles or in
                                        their own shape
      features.npy                      [distinct images, tokens, width] float32, or bfloat16 as int16; in tiles
                                        [all their tiles, tokens, width], one image's after another's

Every rank maps the same files. A batch is then a few copies: nothing is tokenised or decoded twice.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from leveret import images
from leveret.images import ImageFault
from leveret.inputs.chat import encode
from leveret.inputs.tiles import prepare_all
from leveret.model.threads import torch_threads
from leveret.pool.base import SampleFault, first_of
from leveret.records import IGNORE, IMAGE_MARK, Batch, Cutting, ImageRef, ImageSpec
from leveret.runs import (
    DataError,
    EnvironmentFault,
    Interrupted,
    Progress,
    append_jsonl,
    cores,
    in_words,
    stop_requested,
    sync_folder,
    write_json,
)
from leveret.train.state import flush

if TYPE_CHECKING:
    from leveret.model.vlm import VLM
    from leveret.pool.base import Source

CHUNK = 64
"""Images in one pass of the tower while the cache is filled; fixed, so that a refilled cache has the same bits."""
MULTIPLE = 16
"""Batches are padded to a multiple of so many positions. oneDNN compiles a product in bf16 for its shapes when it first
meets them, keeps a thousand, and forgets: few shapes cost less than the padding does."""

Pixels = dict[str, np.ndarray]


class Fault(NamedTuple):
    """A sample that failed while a batch was made, and how many tokens it would have taught."""

    id: str
    reason: str
    supervised: int


Failed = list[Fault]


def pixels_of(ref: ImageRef, spec: ImageSpec, size: Sequence[int]) -> Pixels:
    """The image as every tower sees it: float32 [pictures, 3, H, W] (`ImageSpec.shape`) by tower name, one picture
    unless it is seen in tiles.

    size  (height, width) that it had when its positions were laid out. Raises ImageFault, also where it has another
          now and would fill other positions.
    """
    image = images.load(ref)
    if spec.tiling is not None and (image.height, image.width) != tuple(size):
        raise ImageFault("damaged", "it is no longer as large as it was when the data was prepared")
    seen = prepare_all(image, spec)
    return {name: array.reshape(-1, *array.shape[-3:]) for name, array in seen.items()}


def pictures_of(tiling: Cutting | None, sizes: np.ndarray) -> np.ndarray:
    """How many pictures the towers see of images of these (height, width): int64 [images]."""
    if tiling is None:
        return np.ones(len(sizes), np.int64)
    return np.asarray([tiling.tiles(*size) for size in sizes.tolist()], np.int64)


@dataclass(frozen=True, slots=True)
class _Text:
    """One encoded sample before it lies in the arrays."""

    index: int
    id: str
    refs: tuple[ImageRef, ...]
    sizes: Sequence[tuple[int, int]]
    ids: np.ndarray
    labels: np.ndarray
    visual: np.ndarray
    words: int
    source: str = ""
    cut: bool = False


def encode_sample(source: Source, index: int, chat: str, tokenizer: Any, spec: ImageSpec, max_tokens: int) -> _Text:
    """Encode one sample. SampleFault with the reason when there would be nothing to learn from it."""
    sample = source.sample(index)
    if spec.tiling is None:
        # A square of the tower's size stands for the image: what it fills does not depend on its own size here, and its
        # file need not be opened twice.
        sizes = [(spec.towers[0].size,) * 2] * len(sample.images)
    else:
        sizes = [_size_of(ref, source, index, sample.id) for ref in sample.images]
    try:
        encoded = encode(sample.turns, chat, tokenizer, spec, sizes, max_tokens=max_tokens)
    except DataError as error:
        reason, _, detail = str(error).partition(": ")
        raise SampleFault(index, sample.id, "", reason, detail, source.name) from None
    ids = np.asarray(encoded.input_ids, dtype=np.int32)
    labels = np.asarray(encoded.labels, dtype=np.int32)
    visual = np.asarray(encoded.image_mask, dtype=bool)
    if not (labels[1:] != IGNORE).any():
        raise SampleFault(
            index, sample.id, "", "no answer within max_tokens", f"{max_tokens}; nothing to learn", source.name
        )
    words = sum(len(turn.text.replace(IMAGE_MARK, "").split()) for turn in sample.turns)
    # A record of a mixture may say where it is from.
    told = sample.meta.get("source")
    name = told if isinstance(told, str) and 0 < len(told) <= 80 else sample.source
    return _Text(index, sample.id, sample.images, sizes, ids, labels, visual, words, name, encoded.cut > 0)


def _size_of(ref: ImageRef, source: Source, index: int, id: str) -> tuple[int, int]:
    """(height, width) of an image, upright. SampleFault with the image's own reason where it is refused."""
    try:
        width, height = images.upright_size(images.read_bytes(ref))
    except ImageFault as fault:
        name = str(ref) if ref.kind == "data" else source.root.name(ref)
        raise SampleFault(index, id, name, f"image {fault.reason}", fault.detail, source.name) from None
    return height, width


def _stop_here() -> None:
    if stop_requested():
        raise Interrupted(
            "stopped while preparing the data, before the first step; run the same command again to go on"
        )


def reason_of(error: DataError) -> str:
    """Fixed words where the error has them (the same as `pool check` uses), else its text up to the details."""
    if isinstance(error, ImageFault):
        return f"image {error.reason}"
    return str(getattr(error, "reason", None) or str(error).partition(": ")[0])


def _refusal(index: int, id: str, image: str, error: DataError) -> dict[str, Any]:
    line = {"index": index, "id": id, "image": image, "reason": reason_of(error)}
    detail = getattr(error, "detail", "")
    return {**line, "detail": detail} if detail else line


def _encode_all(source: Source, chat: str, vlm: VLM, max_tokens: int) -> tuple[list[_Text], list[dict[str, Any]]]:
    texts, refused = [], []
    with Progress(len(source), "tokenising", "samples") as progress:
        for index in range(len(source)):
            try:
                texts.append(encode_sample(source, index, chat, vlm.tokenizer, vlm.spec, max_tokens))
            except DataError as error:
                image = str(getattr(error, "image", ""))
                refused.append(_refusal(index, str(getattr(error, "id", "") or index), image, error))
            progress.advance(1, refused=len(refused))
            _stop_here()
    return texts, refused


def _features(
    vlm: VLM, refs: Mapping[ImageRef, tuple[int, int]], folder: Path, see: Callable[[Pixels, np.ndarray], torch.Tensor]
) -> tuple[dict[ImageRef, int], dict[ImageRef, ImageFault]]:
    """Fill features.npy; returns the number of every good image and the fault of every bad one. refs: with sizes."""
    most = int(pictures_of(vlm.spec.tiling, np.asarray(list(refs.values())).reshape(-1, 2)).sum())

    def decode(ref: ImageRef) -> Pixels | ImageFault:
        try:
            return pixels_of(ref, vlm.spec, refs[ref])
        except ImageFault as fault:
            return fault

    def work(chunk: Sequence[ImageRef]) -> tuple[list[Pixels | ImageFault], np.ndarray | None]:
        decoded = [decode(ref) for ref in chunk]
        good = [item for item in decoded if not isinstance(item, ImageFault)]
        if not good:
            return decoded, None
        shown = [ref for ref, item in zip(chunk, decoded, strict=True) if not isinstance(item, ImageFault)]
        sizes = np.asarray([refs[ref] for ref in shown])
        seen = see({name: np.concatenate([item[name] for item in good]) for name in good[0]}, sizes).cpu()
        return decoded, seen.view(torch.int16).numpy() if seen.dtype == torch.bfloat16 else seen.numpy()

    rows: dict[ImageRef, int] = {}
    bad: dict[ImageRef, ImageFault] = {}
    store: np.ndarray | None = None
    # Chunks of fixed places in the list, one a worker with one torch thread: the same bits for any number of workers,
    # and no OpenMP team whose members spin on a core that others want.
    workers = cores()
    listed = list(refs)
    size = CHUNK if vlm.spec.tiling is None else max(1, CHUNK * len(refs) // max(1, most))
    chunks = [listed[at : at + size] for at in range(0, len(listed), size)]
    filled = 0
    with (
        torch_threads(1),
        ThreadPoolExecutor(workers) as pool,
        Progress(len(refs), "seeing each image once", "images") as progress,
    ):
        ahead = deque(pool.submit(work, chunk) for chunk in chunks[: 2 * workers])
        for number, chunk in enumerate(chunks):
            decoded, values = ahead.popleft().result()
            if number + 2 * workers < len(chunks):
                ahead.append(pool.submit(work, chunks[number + 2 * workers]))
            good = [ref for ref, item in zip(chunk, decoded, strict=True) if not isinstance(item, ImageFault)]
            bad.update((ref, item) for ref, item in zip(chunk, decoded, strict=True) if isinstance(item, ImageFault))
            if values is not None:
                if store is None:
                    shape = (most, *values.shape[1:])
                    _room(folder, int(np.prod(shape)) * values.itemsize)
                    store = np.lib.format.open_memmap(folder / "features.npy", "w+", values.dtype, shape)
                store[filled : filled + len(values)] = values
                filled += len(values)
                rows.update((ref, place) for place, ref in enumerate(good, len(rows)))
            progress.advance(len(chunk), bad=len(bad))
            _stop_here()
    if store is not None:
        store.flush()  # type: ignore[attr-defined]
    return rows, bad


def _room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise EnvironmentFault(
            f"the feature cache needs {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} GiB free; "
            f"set cache_features=false, or put the run on a larger disk"
        )


def prepare(
    source: Source,
    vlm: VLM,
    folder: Path,
    *,
    chat: str,
    max_tokens: int,
    bad_share: float,
    see: Callable[[Pixels, np.ndarray], torch.Tensor] | None,
    facts: Mapping[str, Any],
) -> Prepared:
    """Make the cache, or open it when it was made from the same `facts`.

    see  gives features [N, tokens, width] of pixels by tower name and (height, width) of the images; None leaves images
         to be decoded when needed.
    Refused samples are written to `quarantine.jsonl` beside the cache. Raises DataError when their share passes
    `bad_share`, or nothing is left.
    """
    facts = json.loads(json.dumps(dict(facts)))
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError):  # not there, or not whole
        found = Prepared(folder)
        if found.meta["facts"] == facts:
            return found
    writing = folder.with_name(f".{folder.name}-writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    texts, refused = _encode_all(source, chat, vlm, max_tokens)
    refs = {ref: size for text in texts for ref, size in zip(text.refs, text.sizes, strict=True)}
    if see is not None:
        rows, bad = _features(vlm, refs, writing, see)
    else:  # what cannot be read is found out when it is decoded; what is not there need not wait for that
        bad = {ref: ImageFault("missing") for ref in absent(refs)}
        rows = {ref: row for row, ref in enumerate(ref for ref in refs if ref not in bad)}
    for text in texts if bad else ():
        for ref in text.refs:
            if ref in bad:
                name = str(ref) if ref.kind == "data" else source.root.name(ref)
                refused.append(_refusal(text.index, text.id, name, bad[ref]))
                break
    texts = [text for text in texts if not any(ref in bad for ref in text.refs)]
    quarantine = folder.with_name("quarantine.jsonl")
    quarantine.unlink(missing_ok=True)
    for row in sorted(refused, key=lambda row: row["index"]):
        append_jsonl(quarantine, row)
    reasons = Counter(str(row["reason"]) for row in refused)
    _judge(source, reasons, bad_share, quarantine)
    more = {"facts": facts, "refused": len(refused), "reasons": dict(reasons.most_common()), "samples": len(source)}
    more["cut"] = sum(text.cut for text in texts)
    _write(writing, texts, rows, refs, more)
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
    sync_folder(folder.parent)
    return Prepared(folder)


def _judge(source: Source, reasons: Counter[str], share: float, quarantine: Path) -> None:
    bad, total = reasons.total(), len(source)
    if bad == total or bad > share * total:
        raise DataError(
            f"{bad:,} of {total:,} samples of {source.name} cannot be used, more than bad_share {share} allows: "
            f"{in_words(reasons)}.{first_of(quarantine)}{source.advice(reasons, total)} Each is named in {quarantine}. "
            "Mend the data, or raise bad_share of the stage."
        )


def absent(refs: Iterable[ImageRef]) -> set[ImageRef]:
    """Those whose file is not there; each is asked after once, and none is opened."""
    asked: dict[str, bool] = {}
    for ref in refs:
        if ref.kind != "data" and ref.path not in asked:
            asked[ref.path] = Path(ref.path).is_file()
    return {ref for ref in refs if ref.kind != "data" and not asked[ref.path]}


def _write(
    folder: Path,
    texts: Sequence[_Text],
    rows: Mapping[ImageRef, int],
    sizes: Mapping[ImageRef, tuple[int, int]],
    more: Mapping[str, Any],
) -> None:
    def ends(counts: Sequence[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    labels, offsets = np.concatenate([text.labels for text in texts]), ends([len(text.ids) for text in texts])
    # The first position of a sample is nobody's next one.
    counted = labels != IGNORE
    counted[offsets[:-1]] = False
    arrays = {
        "ids": np.concatenate([text.ids for text in texts]),
        "labels": labels,
        "visual": np.concatenate([text.visual for text in texts]),
        "offsets": offsets,
        "words": np.asarray([text.words for text in texts], np.int64),
        "supervised": np.add.reduceat(counted, offsets[:-1], dtype=np.int64),
        "images": np.asarray([rows[ref] for text in texts for ref in text.refs], dtype=np.int64),
        "image_offsets": ends([len(text.refs) for text in texts]),
        "sizes": np.asarray([sizes[ref] for ref in sorted(rows, key=rows.__getitem__)], np.int64).reshape(-1, 2),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        flush(folder / f"{name}.npy")
    refs = [asdict(ref) for ref in sorted(rows, key=rows.__getitem__)]
    names = sorted({text.source for text in texts})
    of = {name: number for number, name in enumerate(names)}
    told = {"sources": names, "source": [of[text.source] for text in texts] if len(names) > 1 else []}
    told |= {"places": [text.index for text in texts]} if more["refused"] else {}
    write_json(folder / "meta.json", {**more, **told, "ids": [text.id for text in texts], "refs": refs})


class Prepared:
    """The arrays of a prepared stage, mapped from disk, and batches made of them."""

    workers = 1
    """Threads that decode images, where features are not kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool: ThreadPoolExecutor | None = None
        self.meta = json.loads((folder / "meta.json").read_text("utf-8"))
        self.names: list[str] = self.meta["ids"]
        # An entry for every position: mapped, as there may be billions, and of several ranks each reads its own.
        self.ids, self.labels, self.visual = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "labels", "visual")
        )
        self.offsets, self.words, self.supervised, self.images, self.image_offsets, self.sizes = (
            np.load(folder / f"{name}.npy")
            for name in ("offsets", "words", "supervised", "images", "image_offsets", "sizes")
        )
        kept = folder / "features.npy"
        self.features: np.ndarray | None = np.load(kept, mmap_mode="r") if kept.exists() else None
        self._first: np.ndarray | None = None
        self.lengths = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.names)

    def place(self, row: int) -> int:
        """Which sample of the source lies in a row: those that were refused lie in none."""
        places = self.meta.get("places")
        return row if places is None else int(places[row])

    def shares(self, rows: Sequence[int]) -> dict[str, int]:
        """How many of the samples come from which source; nothing where all data have one."""
        numbers = self.meta.get("source") or ()
        names = self.meta.get("sources", ())
        return dict(sorted(Counter(names[numbers[row]] for row in rows).items())) if numbers else {}

    def batch(self, rows: Sequence[int], spec: ImageSpec, packed: bool = False) -> tuple[Batch, Failed]:
        """A batch of samples, one a row and padded on the right, or all in one row; features where they are cached,
        else pixels decoded now.

        A sample whose image fails now is not supervised, its pixels are zero, and it is named in the second result.
        """
        lengths = self.lengths[list(rows)]
        whole = -(-lengths // MULTIPLE) * MULTIPLE  # with the padding behind each
        shape = (1, int(whole.sum())) if packed else (len(rows), int(whole.max()))
        begins = np.concatenate([[0], np.cumsum(whole)]) if packed else np.arange(len(rows) + 1) * shape[1]
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        visual, segments, positions = np.zeros(shape, bool), np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        shown: list[int] = []
        for place, row in enumerate(rows):
            start, end = self.offsets[row], self.offsets[row + 1]
            laid = slice(begins[place], begins[place] + end - start)
            ids.flat[laid], labels.flat[laid] = self.ids[start:end], self.labels[start:end]
            visual.flat[laid], positions.flat[laid] = self.visual[start:end], np.arange(end - start)
            segments.flat[laid] = place if packed else 0
            shown += self.images[self.image_offsets[row] : self.image_offsets[row + 1]].tolist()
        features: torch.Tensor | None = None
        pixels: dict[str, torch.Tensor] = {}
        bad: dict[int, str] = {}
        tiles = pictures_of(spec.tiling, self.sizes[shown])
        if shown and self.features is not None:
            chosen = torch.from_numpy(self.features[self._tiles(shown, spec.tiling)])
            features = chosen.view(torch.bfloat16) if chosen.dtype == torch.int16 else chosen
        elif shown:
            pixels, bad = self._decode(rows, spec)
        for place in bad:
            labels.flat[begins[place] : begins[place] + lengths[place]] = IGNORE
        batch = Batch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            attention_mask=torch.from_numpy(segments >= 0),
            position_ids=torch.from_numpy(positions),
            segments=torch.from_numpy(segments),
            image_mask=torch.from_numpy(visual),
            pixels=pixels,
            tile_image=torch.from_numpy(np.repeat(np.arange(len(shown)), tiles)),
            features=features,
            ids=tuple(self.names[row] for row in rows),
            image_sizes=torch.from_numpy(self.sizes[shown]) if shown else None,
            bounds=tuple(begins.tolist()) if packed else (),
        )
        failed = [
            Fault(self.names[row], bad[at], int(self.supervised[row])) for at, row in enumerate(rows) if at in bad
        ]
        return batch, failed

    def _tiles(self, shown: Sequence[int], tiling: Cutting | None) -> np.ndarray:
        """Rows of `features` of images, in their order."""
        if tiling is None:
            return np.asarray(shown)
        if self._first is None:
            self._first = np.concatenate([[0], np.cumsum(pictures_of(tiling, self.sizes))])
        return np.concatenate([np.arange(self._first[image], self._first[image + 1]) for image in shown])

    def _decode(self, rows: Sequence[int], spec: ImageSpec) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
        """Pixels of all images of the rows, and for the places of rows that have a bad one, why."""
        shown = [
            (place, image)
            for place, row in enumerate(rows)
            for image in self.images[self.image_offsets[row] : self.image_offsets[row + 1]]
        ]

        def see(image: int) -> Pixels | ImageFault:
            try:
                return pixels_of(ImageRef(**self.meta["refs"][image]), spec, self.sizes[image].tolist())
            except ImageFault as fault:
                return fault

        bad: dict[int, str] = {}
        found: dict[str, list[np.ndarray]] = {view.name: [] for view in spec.towers}
        # In order, whoever is ready first: which worker saw an image changes nothing.
        for (place, image), pixels in zip(shown, self._map(see, [image for _, image in shown]), strict=True):
            if isinstance(pixels, ImageFault):
                bad.setdefault(place, reason_of(pixels))
                count = int(pictures_of(spec.tiling, self.sizes[[image]])[0])
                pixels = {view.name: np.zeros((count, *spec.shape(view)), np.float32) for view in spec.towers}
            for name, array in pixels.items():
                found[name].append(array)
        return {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in found.items()}, bad

    def _map(self, work: Callable[[int], Any], items: Sequence[int]) -> Iterator[Any]:
        """`work` of every item, in order, by as many threads as `workers` says: decoding lets others run meanwhile."""
        if self.workers == 1:
            return map(work, items)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers)
        return self._pool.map(work, items)
