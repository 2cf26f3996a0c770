"""Pictures and text for a model of ours in transformers' classes: the pixels of resize.py, the ids of chat.py.

    conversation -> chat template (Jinja) -> text with <image> -> one <image> per token -> chunks between them -> ids
    image -> RGB, upright -> `prepare` for every tower -> pixel_values

peers/remote.py writes the two classes, and what they need of others, as the code of a published model; what stands
below them stays here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from leveret.images import as_rgb
from leveret.inputs.reader import check_unicode, reader_of
from leveret.inputs.resize import prepare
from leveret.records import IMAGE_MARK, ImageSpec, NaFlex, TowerView
from leveret.runs import RecipeError


class LeveretImageProcessor(BaseImageProcessor):
    """Images as the towers want to see them.

    towers  fields of a TowerView each, in fusion order.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' own declaration)

    def __init__(self, towers: Sequence[dict[str, Any]] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.towers = [dict(tower) for tower in towers]

    def __call__(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, return_tensors)

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """`pixel_values` float32 [N, 3, S, S]; of several towers [N, towers, 3, S, S], S the largest's side, and a
        smaller one's pixels in the upper left corner.

        images  PIL images (any mode), uint8 arrays [H, W, 3], paths or addresses; one, a list, or lists of lists.
        """
        views = [
            TowerView(**{**tower, "mean": tuple(tower["mean"]), "std": tuple(tower["std"])}) for tower in self.towers
        ]
        seen = [self._see(image, views) for image in make_flat_list_of_images(self.fetch_images(images))]
        return BatchFeature({"pixel_values": np.stack(seen)}, tensor_type=return_tensors)

    def _see(self, image: Any, views: list[TowerView]) -> Any:
        from PIL import Image as pil

        if not isinstance(image, pil.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise ValueError(
                    f"an image is a PIL image or a uint8 array [H, W, 3]; got {array.dtype} {list(array.shape)}"
                )
            image = pil.fromarray(array)
        image = as_rgb(image)
        if len(views) == 1:
            return prepare(image, views[0])
        side = max(view.size for view in views)
        canvas = np.zeros((len(views), 3, side, side), dtype=np.float32)
        for place, view in zip(canvas, views, strict=True):
            place[:, : view.size, : view.size] = prepare(image, view)
        return canvas

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Files are opened here, so that transparency is laid over white; addresses are fetched by transformers."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str | os.PathLike):
            if os.path.isfile(image_url_or_urls):
                from PIL import Image as pil

                with pil.open(image_url_or_urls) as image:
                    return as_rgb(image)
            return load_image(str(image_url_or_urls))
        return image_url_or_urls


class LeveretProcessor(ProcessorMixin):
    """Text and images as the model reads them.

    num_image_tokens  positions an image fills.
    image_token       stands in a text once per image; a token of the tokenizer.

    Text is cut at the image tokens and every chunk is tokenised by itself, with the start token (where the tokenizer
    has the habit of one) once at the very beginning: as the model was taught.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 0,
        image_token: str = IMAGE_MARK,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images: Any = None, text: Any = None, *_: Any, **kwargs: Any) -> BatchFeature:
        """`input_ids`, `attention_mask` and `pixel_values` of texts that hold `image_token` once per image.

        Understood beside these: padding, padding_side, max_length, pad_to_multiple_of, truncation, add_special_tokens,
        return_tensors, return_mm_token_type_ids, return_offsets_mapping, return_text_replacement_offsets; also inside
        text_kwargs and common_kwargs. ValueError when marks and images disagree, or an image would be cut.
        """
        asked = {**(kwargs.pop("common_kwargs", None) or {}), **(kwargs.pop("text_kwargs", None) or {}), **kwargs}
        if asked.get("sanitize_control_tokens"):
            raise ValueError("sanitize_control_tokens is not known to this processor")
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        data: dict[str, Any] = {}
        count = 0
        if images is not None:
            images = make_flat_list_of_images(self.image_processor.fetch_images(images))
            count = len(images)
            data |= self.image_processor(images)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            marks = sum(each.count(self.image_token) for each in texts)
            if marks != count:
                raise ValueError(f"{marks} {self.image_token} in the text, but {count} image(s): one per image")
            spans = [self.replace_image_token(data, place) for place in range(count)]
            texts, replaced = self.get_text_with_replacements(texts, spans)
            data = self._ids(texts, asked) | data
            if asked.get("return_text_replacement_offsets"):
                data["text_replacement_offsets"] = replaced
        kept = ["text_replacement_offsets"]
        return BatchFeature(data, tensor_type=asked.get("return_tensors"), skip_tensor_conversion=kept)

    def _ids(self, texts: list[str], asked: dict[str, Any]) -> dict[str, Any]:
        rows = [self._read(text, asked.get("add_special_tokens", True)) for text in texts]
        limit = asked.get("max_length")
        if asked.get("truncation") and limit:
            if any(self.image_token_id in ids[limit:] for ids, _ in rows):
                raise ValueError(f"max_length={limit} would cut an image; allow more, or shorten the text before it")
            rows = [(ids[:limit], offsets[:limit]) for ids, offsets in rows]
        data: dict[str, Any] = dict(
            self.tokenizer.pad(
                {"input_ids": [ids for ids, _ in rows]},
                padding=asked.get("padding") or False,
                max_length=limit,
                pad_to_multiple_of=asked.get("pad_to_multiple_of"),
                padding_side=asked.get("padding_side"),
                return_attention_mask=True,
            )
        )
        if asked.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in data["input_ids"]]
        if asked.get("return_offsets_mapping"):
            left = (asked.get("padding_side") or self.tokenizer.padding_side) == "left"
            data["offset_mapping"] = []
            for (_, offsets), row in zip(rows, data["input_ids"], strict=True):
                more = [(0, 0)] * (len(row) - len(offsets))
                data["offset_mapping"].append([*more, *offsets] if left else [*offsets, *more])
        return data

    def _read(self, text: str, start: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of one text whose images are opened to their tokens."""
        check_unicode(text)
        reader, begin = reader_of(self.tokenizer), self.tokenizer.bos_token
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        if reader.start and text.startswith(begin):  # written by the chat template
            text, place, start = text[len(begin) :], len(begin), True
        if start:
            ids += reader.start
            offsets += [(0, place)] * len(reader.start)
        for number, chunk in enumerate(text.split(self.image_token)):
            if number:
                ids.append(self.image_token_id)
                offsets.append((place, place + len(self.image_token)))
                place += len(self.image_token)
            if chunk:
                read = reader.backend.encode(chunk, add_special_tokens=False)
                ids += read.ids
                offsets += [(place + begun, place + ended) for begun, ended in read.offsets]
                place += len(chunk)
        return ids, offsets

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """What stands in the text for an image: one token per position."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """For engines: positions and rows of `pixel_values` of images of (height, width) each."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


# --- what does not travel ---------------------------------------------------------------------------------------------

_TIDY = """\
{%- set told = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set said = namespace(images=0, text='') -%}
    {%- if message['content'] is string -%}
        {%- if message['role'] == 'user' -%}
            {%- set said.images = message['content'].count('<image>') -%}
        {%- endif -%}
        {%- set said.text = message['content'].replace('<image>', '') if said.images else message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set said.images = said.images + 1 -%}
            {%- elif part['type'] == 'text' -%}
                {%- set said.text = said.text + ('\\n' if said.text else '') + part['text'] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if said.images -%}
        {%- set said.text = ('<image>\\n' * said.images + said.text.strip()).strip() -%}
    {%- endif -%}
    {%- set told.messages = told.messages + [{'role': message['role'], 'content': said.text}] -%}
{%- endfor -%}
{%- set messages = told.messages -%}
"""
"""Contents in parts become text, a user turn's image marks in front, each followed by a newline (`chat._content`)."""


def processor_for(spec: ImageSpec, chat: str, tokenizer: Any) -> LeveretProcessor:
    """The processor of a model. Its tokenizer is a copy that knows `<image>`, pads on the left (answers grow on the
    right) and has the chat format's template in the form that transformers and engines fill. RecipeError where images
    keep their own shape."""
    from leveret.inputs.chat import find_chat

    if isinstance(spec.tiling, NaFlex):
        raise RecipeError(
            "transformers' AutoProcessor is given squares here, and this model sees each image at its own shape "
            "(NaFlex); load it with leveret.load"
        )
    tokenizer = with_image(tokenizer)
    start = "{{ bos_token }}" if reader_of(tokenizer).start else ""
    template = _TIDY + start + find_chat(chat).template
    tokenizer.padding_side, tokenizer.chat_template = "left", template
    tokenizer.init_kwargs["padding_side"] = "left"  # what is saved
    views = LeveretImageProcessor(towers=spec.to_dict()["towers"])
    return LeveretProcessor(views, tokenizer, chat_template=template, num_image_tokens=spec.tokens)


def with_image(tokenizer: Any) -> Any:
    """A copy of the tokenizer in which `<image>` is one token; where it is none yet it comes behind all others."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tokenizer)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    return tokenizer


class FolderProcessor(LeveretProcessor):
    """What `AutoProcessor` makes of a folder of ours, which has no files for it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        from leveret.model.checkpoint import find
        from leveret.model.hf import LeveretConfig
        from leveret.model.language import load_tokenizer

        folder = find(pretrained_model_name_or_path)
        config = LeveretConfig.from_pretrained(folder)
        tokenizer = load_tokenizer(str(folder), where=str(folder), as_saved=True)
        return processor_for(ImageSpec.from_dict(config.spec), config.recipe["chat"], tokenizer)
