"""A model to talk to: `leveret.load(path).ask("photo.jpg", "What is this?")`."""

from __future__ import annotations

import base64
from collections.abc import Generator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leveret.generate.engine import Engine, Request
from leveret.images import ImageFault
from leveret.model import fewbits
from leveret.model.precision import Precision, pick_device, resolve_precision
from leveret.model.source import load as load_vlm
from leveret.model.vlm import VLM
from leveret.own import allow
from leveret.records import IMAGE_MARK, ImageRef, Turn
from leveret.runs import EnvironmentFault, RecipeError

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = str | Path | bytes | Image | ImageRef | None


class Model:
    """A vision-language model and the engine that answers with it.

    vlm     the network, its tokenizer and its chat format.
    engine  for many questions at once; the other arguments are its own.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        precision: Precision = "auto",
        slots: int = 64,
        max_new_tokens: int = 64,
        memory: int | None = None,
    ) -> None:
        self.vlm = vlm
        self.engine = Engine(vlm, slots=slots, max_new_tokens=max_new_tokens, precision=precision, memory=memory)

    def ask(self, image: Picture, question: str, max_new_tokens: int = 64) -> str:
        """The likeliest answer to one question, about an image or (None) about none.

        image  a path, a PIL image, an image file's bytes, or an ImageRef.

        Raises ImageFault or another DataError when the image or the question is refused, RecipeError when there is no
        question.
        """
        refs, turns = opening(image, question)
        return self.engine.answer([Request("", refs, turns, max_new_tokens=max_new_tokens)])[0].text

    def chat(
        self,
        turns: Sequence[Turn],
        images: Sequence[Picture] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """The answer to a conversation that ends with a user turn, in pieces as it is made.

        images  one per image mark in the user turns, in reading order.
        """
        refs = tuple(ref for image in images if (ref := reference(image)) is not None)
        request = Request("", refs, tuple(turns), max_new_tokens=max_new_tokens)
        return self.engine.stream(request, temperature, top_p, seed)


def check_bits(load_in: str | None, device: str = "auto") -> int | None:
    """The bits that `load_in` says; RecipeError where it says none that can be, EnvironmentFault where they cannot be
    had on the device."""
    bits = fewbits.bits_of(load_in)
    if bits is not None:
        fewbits.refuse(f"--load-in {load_in}", pick_device(device), "leave it out")
    return bits


def load(
    path: str | Path,
    device: str = "auto",
    *,
    precision: Precision = "auto",
    load_in: str | None = None,
    own: str | Path | Sequence[str | Path] = (),
    slots: int = 64,
    max_new_tokens: int = 64,
    memory: int | None = None,
) -> Model:
    """The model in a model folder, in the folder of a finished run, or of the hub.

    path    a folder (also one that Bunny, LLaVA, TinyLLaVA or Prismatic wrote), or `OWNER/NAME[/FOLDER][@REVISION]`.
    device  "auto" is a CUDA device when there is one, else Apple's MPS, else the CPU; or any that torch knows.
    load_in "8bit" or "4bit": the language model's layers in so few bits, on a GPU, through bitsandbytes
            (`model.fewbits`); None keeps weights as they were saved.
    own     Python files that parts of the model are built by: they may run.
    slots, max_new_tokens, memory: of the engine (`generate.engine.Engine`).

    Raises DataError when there is no readable model, or a part of it is built by a file that was not named;
    EnvironmentFault when the device is not there, few bits cannot be had or the hub cannot be asked; RecipeError for
    another `load_in` or `precision`, before anything is loaded.
    """
    allow(own, "own")
    device = pick_device(device)
    bits = check_bits(load_in, device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise EnvironmentFault(f"device {device!r} cannot be used ({reason}); try auto or cpu") from fault
    resolve_precision(precision, device)
    vlm = load_vlm(path, device) if bits is None else fewbits.put(load_vlm(path, "cpu"), bits, device)
    if vlm.device.type == "cpu" and vlm.dtype == torch.float16:
        vlm.cast(torch.float32)  # on a CPU bf16 autocast takes no halves, and without it they are emulated
    if vlm.device.type == "mps" and vlm.dtype == torch.bfloat16:
        vlm.cast(torch.float16)  # which every version of macOS computes in
    return Model(vlm, precision=precision, slots=slots, max_new_tokens=max_new_tokens, memory=memory)


def opening(image: Picture, question: str) -> tuple[tuple[ImageRef, ...], tuple[Turn, ...]]:
    """The images and the one turn that ask `question`; its own `<image>` marks, if it has any, are kept."""
    from leveret.inputs.chat import literal

    if not isinstance(question, str):
        raise RecipeError(f"the question is a {type(question).__name__}: ask(image, question), in this order")
    if not question.strip():
        raise RecipeError("the question is empty: give it some words")
    ref = reference(image)
    if ref is None:
        return (), (Turn("user", question),)
    marked = question if question.count(IMAGE_MARK) == 1 else f"{IMAGE_MARK}\n{literal(question)}"
    return (ref,), (Turn("user", marked),)


def _png(image: Image) -> bytes:
    """An open picture as PNG, turned as its EXIF block says: PNG would keep the pixels as they lie."""
    from PIL.ImageOps import exif_transpose

    held = BytesIO()
    try:
        upright = exif_transpose(image)
        kept = upright.mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I", "I;16")
        (upright if kept else upright.convert("RGB")).save(held, "PNG")
    except OSError:  # Pillow reads the file only now
        raise ImageFault("damaged", where=str(getattr(image, "filename", "") or "given")) from None
    return held.getvalue()


def reference(image: Any) -> ImageRef | None:
    """Where the bytes of a picture are; those in memory become a data URI (PIL images as PNG, which loses nothing)."""
    from PIL.Image import Image

    if image is None or isinstance(image, ImageRef):
        return image
    if isinstance(image, Image):
        image = _png(image)
    if isinstance(image, bytes | bytearray):
        return ImageRef(f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}", kind="data")
    return ImageRef(str(Path(image).expanduser()))
