"""Our models inside lmms-eval: `python -m lmms_eval --model leveret --model_args pretrained=FOLDER --tasks ...`.

lmms-eval finds `manifest` by the entry point group `lmms_eval.models` that pyproject.toml names (in the versions that
have lmms_eval/models/registry_v2.py: `ModelRegistryV2.load_entrypoint_manifests`), resolves the class path in it, and
wants a subclass of its own `lmms_eval.api.model.lmms`. This module imports without lmms-eval: the class is made when it
is asked for. One process answers; the engine in `generate/` keeps it busy, whatever `--batch_size` says.
"""

from __future__ import annotations

from functools import cache
from typing import Any

MODEL = "Leveret"


def manifest() -> Any:
    """What lmms-eval registers: the name `leveret`, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="leveret", simple_class_path=f"{__name__}.{MODEL}")


def __getattr__(name: str) -> Any:
    if name != MODEL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made()


@cache
def _made() -> type:
    from lmms_eval.api.model import lmms

    from leveret.runs import RecipeError

    class Leveret(lmms):  # type: ignore[misc]
        """A model of ours as lmms-eval asks models; `is_simple`: a request is (context, options, pictures of a
        document, its number, task, split).

        pretrained  whatever `leveret.load` takes: a model's folder, a run's, an id of the hub.
        device      auto, cpu, cuda, cuda:1. precision: auto, fp32, bf16.
        batch_size  taken for lmms-eval's sake; the engine makes its own batches.
        """

        is_simple = True

        def __init__(
            self,
            pretrained: str,
            device: str = "auto",
            precision: str = "auto",
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
            **unknown: Any,
        ) -> None:
            if unknown:
                raise RecipeError(
                    f"--model_args: {', '.join(sorted(unknown))} is not known; known are pretrained, device, precision."
                )
            super().__init__()
            from leveret.generate import load

            # lmms-eval passes its own --device, whose default is a GPU; without one it is ours to choose.
            self.pretrained = pretrained
            self._engine = load(pretrained, device or "auto", precision=precision).engine  # type: ignore[arg-type]

        @property
        def batch_size(self) -> int:
            return 1

        def generate_until(self, requests: list[Any]) -> list[str]:
            """The answers, in the order of the requests; all are given to the engine at once."""
            from leveret.generate import Request
            from leveret.generate.model import reference
            from leveret.inputs.chat import literal
            from leveret.records import IMAGE_MARK, Turn

            asked, stops = [], []
            for number, request in enumerate(requests):
                context, options, pictures_of, document, task, split = request.args
                if options.get("do_sample") or (options.get("temperature") or 0) > 0:
                    raise RecipeError(f"{task}: asks for sampled answers; leveret answers lmms-eval greedily.")
                pictures = pictures_of(self.task_dict[task][split][document]) or []
                refs = tuple(ref for ref in map(reference, pictures) if ref is not None)
                # Marks that the task wrote are kept where they fit the pictures, else the pictures come first.
                told = (
                    context
                    if context.count(IMAGE_MARK) == len(refs)
                    else IMAGE_MARK * len(refs) + "\n" * bool(refs) + literal(context)
                )
                asked.append(
                    Request(str(number), refs, (Turn("user", told),), max_new_tokens=options.get("max_new_tokens"))
                )
                until = options.get("until") or []
                stops.append([until] if isinstance(until, str) else list(until))
            answers = {answer.question_id: answer.text for answer in self._engine.answer(asked)}
            return [_cut(answers[str(number)], stop).strip() for number, stop in enumerate(stops)]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise RecipeError(
                "leveret gives lmms-eval answers, not likelihoods. Choose a task that generates (output_type: "
                "generate_until), or score by first-token probabilities with `leveret eval`."
            )

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise RecipeError("leveret does not answer lmms-eval's tasks of several rounds.")

    Leveret.__module__, Leveret.__qualname__ = __name__, MODEL
    return Leveret


def _cut(text: str, stops: list[str]) -> str:
    """The text up to the first of the stop strings; empty ones do not count."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
