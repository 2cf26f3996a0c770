"""Encoders that turn pictures, and the words beside them, into unit vectors: what condensation measures with.

    images(list of PIL) -> [N, width] float32        texts(list of str) -> [N, width] float32, or None

Three kinds stand in one table. `pixels` has no weights and finds plain copies (re-encoded, resized, slightly cropped);
it has no text side. `world/scorer` is the drawn world's own. Anything else is a folder or hub id of a CLIP or SigLIP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leveret.inputs.resize import fit
from leveret.inputs.views import RESAMPLE, view_of_processor
from leveret.model.tower_facts import TOWER_FAMILIES
from leveret.records import TowerView
from leveret.runs import DataError, EnvironmentFault, RecipeError, closest

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Matrix = NDArray[np.float32]


class Encoder(Protocol):
    """What `load_encoder` returns. Every row of a result has length 1 (to float32 rounding)."""

    id: str
    width: int
    view: TowerView
    has_texts: bool
    fingerprint: str
    """Hex digest of everything that decides the vectors: weights and configuration."""

    def images(self, images: Sequence[Image]) -> Matrix:
        """RGB images of any size to [N, width]."""
        ...

    def texts(self, texts: Sequence[str]) -> Matrix | None:
        """Captions to [N, width] in the images' space; None where there is no text side."""
        ...


def _unit(rows: Matrix) -> Matrix:
    """Rows divided by their length, which is taken in float64: the same bits whatever stands in the other rows."""
    norms = np.sqrt(np.square(rows.astype(np.float64)).sum(1, keepdims=True))
    return (rows / np.maximum(norms, 1e-30)).astype(np.float32)


def _stack(images: Sequence[Image], view: TowerView) -> Tensor:
    """[N, 3, S, S] in channels-last memory, equal to `inputs.resize.prepare` on each image to the last bit.

    The whole batch is normalised at once: a Python call per image would cost more than a small network does.
    """
    import torch

    size = view.size
    data = bytearray().join(fit(image, view).tobytes() for image in images)
    if not images:
        return torch.zeros(0, 3, size, size)
    found = torch.frombuffer(data, dtype=torch.uint8).view(-1, size, size, 3).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (view.mean, view.std))
    return found.div_(torch.tensor(255.0)).sub_(mean).div_(std)


# --- pixels: no weights --------------------------------------------------------------------------------------------

_SIDE = 48  # the picture is squashed to this square first
_BANDS = 9  # cosine waves with a radial frequency up to this many half periods
_PEAK = 5.5  # where the weighting of frequencies ends (Gaussian), in half periods
_POWER = 0.45  # signed power of each coefficient: no single band may decide
_CHROMA = 1.6  # weight of each colour channel beside brightness
_EDGE = 0.4  # weight of the picture's border; 1 in the middle
_FLAT = 0.02  # length of the part that speaks only when a picture is flat


class PixelEncoder:
    """A weightless descriptor of the whole picture, for finding copies of one file.

    The picture is squashed to 48 x 48; brightness and two colour differences lose their mean, are weighted down
    towards the border (where cropping moves things most), and become the lowest 2-D cosine waves. Natural pictures
    have most power in the lowest waves, which would make strangers alike: each wave is therefore weighted by its
    frequency (times a Gaussian that ends where a shift of 5 % would turn a wave over), and its sign times its size to
    the power 0.45 is taken, so that many waves must agree. Four last numbers (a constant and the mean colour) matter
    only for flat pictures, which have no waves. The constants were fitted on 100 photographs with one seed of copies
    and judged on others: docs/condense.md has the figures.
    """

    id = "pixels"
    has_texts = False
    view = TowerView("pixels", _SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self) -> None:
        place = (np.arange(_SIDE) + 0.5) / _SIDE
        waves = np.cos(np.pi * np.arange(_BANDS)[:, None] * place[None])
        self._waves = waves / np.linalg.norm(waves, axis=1, keepdims=True)
        ramp = _EDGE + (1 - _EDGE) * np.sin(np.pi * place)
        self._window = np.outer(ramp, ramp)
        order = np.arange(_BANDS)
        radius = np.sqrt(order[:, None] ** 2.0 + order[None] ** 2.0)
        self._keep = (radius > 0) & (radius <= _BANDS)
        self._weight = (radius * np.exp(-((radius / _PEAK) ** 2)))[self._keep]
        self.width = 3 * int(self._keep.sum()) + 4
        constants = (_SIDE, _BANDS, _PEAK, _POWER, _CHROMA, _EDGE, _FLAT)
        self.fingerprint = hashlib.sha256(f"pixels 1 {constants}".encode()).hexdigest()

    def images(self, images: Sequence[Image]) -> Matrix:
        return np.stack([self._one(image) for image in images]) if images else np.zeros((0, self.width), np.float32)

    def texts(self, texts: Sequence[str]) -> Matrix | None:
        return None

    def _one(self, image: Image) -> Matrix:
        # One picture at a time, so that a vector never depends on its neighbours in the batch.
        red, green, blue = np.moveaxis(np.asarray(fit(image, self.view), np.float64) / 255, 2, 0)
        light = 0.299 * red + 0.587 * green + 0.114 * blue
        planes = np.stack([light, 0.564 * (blue - light), 0.713 * (red - light)])
        means = (planes * self._window).sum((1, 2)) / self._window.sum()
        planes = (planes - means[:, None, None]) * self._window
        # 8-bit rounding leaves waves of 1e-15 in a flat picture, which the power would make large: they are nothing.
        found = (self._waves @ planes @ self._waves.T)[:, self._keep] * self._weight
        found[np.abs(found) < 1e-6] = 0
        strength = np.sign(found) * np.abs(found) ** _POWER
        strength[1:] *= _CHROMA
        flat = _FLAT * np.concatenate([[0.25], means - [0.5, 0, 0]])
        return _unit(np.concatenate([strength.ravel(), flat])[None].astype(np.float32))[0]


# --- networks ------------------------------------------------------------------------------------------------------


def _digest(module: Any, extra: str) -> str:
    """Hex digest of a module's tensors by name."""
    import torch

    digest = hashlib.blake2b(extra.encode(), digest_size=32)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class TinyEncoder:
    """The drawn world's dual encoder (`leveret.model.tiny.TinyDualEncoder`)."""

    has_texts = True
    micro_batch = 64
    """Images in one pass: their activations then stay in a core's cache."""

    def __init__(self, id: str, module: Any, device: str = "cpu") -> None:
        self.id, self.device = id, device
        self.module = module.to(device).eval()
        self.view: TowerView = module.view
        self.width = int(module.width)
        self.fingerprint = _digest(module, str(sorted(module.config.items())))

    def images(self, images: Sequence[Image]) -> Matrix:
        import torch

        with torch.inference_mode():
            parts = [
                self.module.embed_images(_stack(images[at : at + self.micro_batch], self.view).to(self.device))
                for at in range(0, len(images), self.micro_batch)
            ]
            found = torch.cat(parts) if parts else torch.zeros(0, self.width)
            return _unit(found.float().cpu().numpy())

    def texts(self, texts: Sequence[str]) -> Matrix | None:
        import torch

        with torch.inference_mode():
            return _unit(self.module.embed_texts(list(texts)).float().cpu().numpy())


class HFEncoder:
    """A CLIP or SigLIP of transformers: projected image features, and text features where a tokenizer lies with it.

    precision  fp32, or bf16 (autocast): about twice as fast where it is native, and a cosine of .9999 with fp32.
    """

    micro_batch = 16
    """Images in one forward pass on a CPU: activations of large towers are what fills the memory."""

    def __init__(self, id: str, device: str = "cpu", precision: str = "fp32") -> None:
        import torch

        self.id, self.device, self.precision = id, device, precision
        model, self._tokenizer = _open_hf(id)
        self.module = model.to(device, torch.float32).eval()
        vision = model.config.vision_config
        self._siglip = model.config.model_type.startswith("siglip")
        self._length = int(getattr(model.config.text_config, "max_position_embeddings", 64))
        self.view = _hf_view(id, int(vision.image_size), self._siglip)
        projection = getattr(model.config, "projection_dim", None)
        self.width = int(vision.hidden_size if self._siglip or projection is None else projection)
        self.has_texts = self._tokenizer is not None
        self.fingerprint = _digest(self.module, f"{model.config.model_type} {self.view}")

    def _run(self, call: Callable[..., Any], **inputs: Any) -> Matrix:
        import torch

        kind, halves = torch.device(self.device).type, self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=halves):
            found = call(**{name: value.to(self.device) for name, value in inputs.items()})
            # transformers 5 returns the projected vector inside an output object; earlier ones the tensor itself.
            found = found if isinstance(found, torch.Tensor) else found.pooler_output
            return _unit(found.float().cpu().numpy())

    def images(self, images: Sequence[Image]) -> Matrix:
        size = self.micro_batch if self.device == "cpu" else max(len(images), 1)
        parts = [
            self._run(
                self.module.get_image_features,
                pixel_values=_stack(images[start : start + size], self.view),
            )
            for start in range(0, len(images), size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32)

    def texts(self, texts: Sequence[str]) -> Matrix | None:
        if self._tokenizer is None:
            return None
        if not texts:
            return np.zeros((0, self.width), np.float32)
        # SigLIP was trained on texts padded to its full length, lower case or not as its tokenizer says.
        padding = "max_length" if self._siglip else True
        found = self._tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self._length, return_tensors="pt"
        )
        names = ("input_ids",) if self._siglip else ("input_ids", "attention_mask")
        return self._run(self.module.get_text_features, **{name: found[name] for name in names})


def _open_hf(id: str) -> tuple[Any, Any | None]:
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError as fault:
        raise EnvironmentFault(f"encoder {id!r} needs transformers, which is not installed ({fault})") from None
    try:
        config = AutoConfig.from_pretrained(id)
    except (OSError, ValueError) as fault:
        if not Path(id).is_dir():
            raise EnvironmentFault(
                f"encoder {id!r} is not on this machine, and the model hub did not give it "
                f"({str(fault).splitlines()[0]}). With a connection: `hf download {id} --local-dir FOLDER`, then give "
                f"that folder. {', '.join(ENCODERS)} need no download (`pixels` finds copies: recipe photos)."
            ) from None
        raise RecipeError(f"encoder {id!r}: the folder cannot be read: {str(fault).splitlines()[0]}") from None
    if config.model_type == "siglip2":
        raise RecipeError(
            f"encoder {id!r} is a SigLIP2 for images of any shape (NaFlex), and here all are squares; give a SigLIP2 "
            "of a fixed size"
        )
    if config.model_type not in ("clip", "siglip"):
        raise RecipeError(
            f"encoder {id!r} is a {config.model_type!r}; allowed are clip and siglip (two towers in one space), "
            f"or one of {', '.join(ENCODERS)}"
        )
    import torch

    # by itself transformers reads in the type that config.json says, and would round float32 files to float16
    model = AutoModel.from_pretrained(id, dtype=torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(id)
    except (OSError, ValueError, ImportError):
        tokenizer = None  # a folder without tokenizer files still embeds images
    return model, tokenizer


def _hf_view(id: str, size: int, siglip: bool) -> TowerView:
    """How the model's own processor prepares an image: its file is believed (size, crop, filter, mean and std), and
    what it leaves out is the family's; without a file all is.

    RecipeError where it says what a view cannot do, or gives another size than the `size` that the model takes.
    """
    family = TOWER_FAMILIES["siglip_vision_model" if siglip else "clip_vision_model"]
    plain = TowerView(id, size, family.mean, family.std, family.resize, family.resample)
    where = f"encoder {id!r}: preprocessor_config.json"
    try:
        from transformers.image_processing_base import ImageProcessingMixin

        facts, _ = ImageProcessingMixin.get_image_processor_dict(id)
    except (OSError, ValueError, ImportError) as fault:
        if (Path(id) / "preprocessor_config.json").is_file():
            raise RecipeError(f"{where} cannot be read ({str(fault).splitlines()[0]})") from None
        return plain
    said = {key: value for key, value in facts.items() if value is not None}
    if siglip and not said.get("do_center_crop"):
        said.pop("crop_size", None)  # said by some, and without meaning for SigLIP's processor
    if "size" not in said:
        said |= {"size": size} if siglip else {"size": {"shortest_edge": size}, "crop_size": size}
    numbers = {word: number for number, word in RESAMPLE.items()}
    said = {"image_mean": plain.mean, "image_std": plain.std, "resample": numbers[plain.resample], **said}
    try:
        view = view_of_processor(said, name=id)
    except RecipeError as fault:
        raise RecipeError(f"encoder {id!r}: {fault}") from None
    except (KeyError, TypeError, ValueError) as fault:
        raise RecipeError(f"{where} cannot be read ({fault!r})") from None
    if view.size != size:
        raise RecipeError(f"{where} makes {view.size} pixels, but the model takes {size} and no other size")
    return view


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderRow:
    """One encoder.

    load   device -> the encoder.
    light  a small network: cheaper to run one copy per core than to run its operations on many.
    """

    load: Callable[[str], Encoder]
    light: bool
    about: str


def _scorer(device: str) -> Encoder:
    from leveret.model.tiny import TinyDualEncoder

    path = resources.files("leveret") / "world" / "weights" / "scorer.safetensors"
    if not path.is_file():
        raise DataError(f"encoder 'world/scorer': its weights are missing from the package ({path}). Install it again.")
    return TinyEncoder("world/scorer", TinyDualEncoder.load(Path(str(path))), device)


ENCODERS: dict[str, EncoderRow] = {
    "pixels": EncoderRow(lambda device: PixelEncoder(), True, "no weights, no texts; finds copies of one file"),
    "world/scorer": EncoderRow(_scorer, True, "the drawn world's small dual encoder"),
}
"""Encoders with a name of ours. Any folder or hub id of a CLIP or SigLIP is an encoder too."""


def is_light(id: str) -> bool:
    """Whether one copy per core is the way to run it."""
    return id in ENCODERS and ENCODERS[id].light


def precision_of(id: str, device: str, precision: str) -> str:
    """ "fp32" or "bf16": what the encoder called `id` computes in. A small network gains nothing from bf16.

    precision  auto (bf16 where the device multiplies it natively), fp32 or bf16. RecipeError where it is another, or
               bf16 of a row of `ENCODERS`.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise RecipeError(f"precision {precision!r}: allowed are auto, fp32 and bf16")
    if id in ENCODERS:
        if precision == "bf16":
            raise RecipeError(f"precision bf16: the encoder {id!r} computes in fp32; give auto or fp32")
        return "fp32"
    from leveret.model.precision import resolve_precision

    return resolve_precision(precision, device)


@lru_cache(maxsize=2)
def load_encoder(id: str, device: str = "cpu", precision: str = "fp32") -> Encoder:
    """The encoder called `id`: a row of `ENCODERS`, or a folder or hub id of a CLIP or SigLIP.

    precision  as `precision_of` gives it. The fingerprint is that of the weights, whatever they are computed in.

    Raises:
        RecipeError: no such encoder; the text names the closest ids.
        DataError: weights that should lie in the package do not.
    """
    if id in ENCODERS:
        return ENCODERS[id].load(device)
    # A name without a slash that is no folder cannot be a hub id of anyone's: say so without asking a network.
    if not Path(id).is_dir() and ("/" not in id or id.startswith((".", "/"))):
        near = closest(id, ENCODERS)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise RecipeError(
            f"encoder {id!r} is not known. Allowed: {', '.join(ENCODERS)}, or a folder or hub id "
            f"(name/name) of a CLIP or SigLIP.{hint}"
        )
    return HFEncoder(id, device, precision)
