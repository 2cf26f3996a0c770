"""Any image-text model that transformers knows, asked as the engine is: its own processor, its own `generate`.

For models that we do not build ourselves. A plain loop over batches: no shared prefixes, no slots; see `engine` for
those. No code from a model's folder is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.generate.remote import pieces, refuse_choices, shared_out
from leveret.images import load as load_image
from leveret.model.hub import quiet, read_config
from leveret.model.precision import pick_device
from leveret.records import Prediction
from leveret.runs import DataError, EnvironmentFault, Interrupted, sha256_of, stop_requested

if TYPE_CHECKING:
    from leveret.generate.engine import Request


def is_known(folder: Path) -> bool:
    """Whether transformers has an image-text model of the kind that a folder's config.json names."""
    if not (folder / "config.json").is_file():
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return read_config(folder).get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class Foreign:
    """A model folder of transformers that answers requests, greedily, `batch` at a time.

    device  "auto" is a CUDA device when there is one, else Apple's MPS, else the CPU; or any that torch knows.

    Raises DataError where there is no such model, or its processor has no chat template; EnvironmentFault where its
    processor needs a package that is not here.
    """

    def __init__(self, folder: str | Path, *, device: str = "auto", batch: int = 8, max_new_tokens: int = 64) -> None:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder, self.batch, self.max_new_tokens = Path(folder), batch, max_new_tokens
        told: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with quiet():
            try:
                self.processor = AutoProcessor.from_pretrained(self.folder, **told)
                self.model, report = AutoModelForImageTextToText.from_pretrained(
                    self.folder, dtype="auto", output_loading_info=True, **told
                )
            except ImportError as fault:
                reason = next((line.strip() for line in str(fault).splitlines() if line.strip()), "a package")
                raise EnvironmentFault(f"{folder}: transformers wants more to read it: {reason}") from fault
            except (
                SafetensorError,
                OSError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RuntimeError,
            ) as fault:
                reason = next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
                raise DataError(f"{folder}: transformers reads no image-text model there ({reason})") from fault
        # transformers itself would draw what is missing at random.
        if lacking := sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", ()))):
            raise DataError(
                f"{folder}: lacks {len(lacking)} weights of the model that its config.json asks for: "
                f"{', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''}"
            )
        if not getattr(self.processor, "chat_template", None):
            raise DataError(
                f"{folder}: its processor has no chat template (chat_template.jinja), so how to ask is open."
            )
        self.model = self.model.to(pick_device(device)).eval()
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @cached_property
    def fingerprint(self) -> str:
        """Of the bytes of the folder, as of our own models."""
        return sha256_of(self.folder)[:16]

    def answer(
        self, requests: Sequence[Request], on_prediction: Callable[[Prediction], None] | None = None
    ) -> list[Prediction]:
        """The likeliest answers, in the order of `requests`; `on_prediction` gets each when its batch is done.

        Batches hold requests with as many images and the same limit, the long questions with the long. Prediction.meta:
        `tokens` and `finish` ("stop", or "length" where it was cut at its limit).

        Raises:
            RecipeError: a request asks for the probabilities of choices.
            DataError: a request cannot be put to this model; names the question.
            Interrupted: a stop was asked for; the batches so far have been given.
        """
        refuse_choices(requests, "a model of transformers' own")

        def alike(number: int) -> tuple[int, int]:
            asked = requests[number]
            return len(asked.images), asked.max_new_tokens or self.max_new_tokens

        # The words' length stands for the tokens': a processor counts those of a whole batch only.
        order = sorted(range(len(requests)), key=lambda n: (alike(n), sum(len(t.text) for t in requests[n].turns)))
        predictions: dict[int, Prediction] = {}
        while order:
            if stop_requested():
                raise Interrupted("Stopped; the answers so far are kept. The same command continues.")
            some = [number for number in order[: self.batch] if alike(number) == alike(order[0])]
            order = order[len(some) :]
            for number, prediction in zip(
                some, self._batch([requests[n] for n in some], alike(some[0])[1]), strict=True
            ):
                predictions[number] = prediction
                if on_prediction is not None:
                    on_prediction(prediction)
        return [predictions[number] for number in range(len(requests))]

    def _batch(self, requests: Sequence[Request], limit: int) -> list[Prediction]:
        import torch

        inputs = self._inputs(requests)
        with torch.inference_mode():
            made = self.model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )  # fmt: skip
        ends = self._ends()
        answers = []
        for request, row in zip(requests, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((place for place, token in enumerate(row) if token in ends), None)
            tokens = row if length is None else row[:length]
            text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            meta = {"tokens": len(tokens), "finish": "length" if length is None else "stop"}
            answers.append(Prediction(request.question_id, text, None, meta))
        return answers

    def _inputs(self, requests: Sequence[Request]) -> Any:
        """A left-padded batch, on the model's device, its pixels in the model's precision."""
        talks = [_talk(request) for request in requests]
        try:
            inputs = self.processor.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
        except (ValueError, TypeError, KeyError, IndexError) as fault:
            reason = next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
            raise DataError(
                f"question {requests[0].question_id!r} (or one of the {len(requests)} asked with it): the processor of "
                f"{self.folder} refuses it: {reason}"
            ) from fault
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _ends(self) -> set[int]:
        told = self.model.generation_config.eos_token_id
        ends = {told} if isinstance(told, int) else set(told or ())
        return ends | ({self.processor.tokenizer.eos_token_id} - {None})


def _talk(request: Request) -> list[dict[str, Any]]:
    """The turns as transformers' chat templates take them; DataError names the question whose image is refused."""
    turns = []
    try:
        for turn, images in shared_out(request):
            left = iter(images)
            content = [
                {"type": "image", "image": load_image(next(left))} if words is None else {"type": "text", "text": words}
                for words in pieces(turn)
            ]
            turns.append({"role": turn.role, "content": content})
    except DataError as fault:
        raise DataError(f"question {request.question_id!r}: {fault}") from fault
    return turns
