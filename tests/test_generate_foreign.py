"""Image-text models of transformers, asked as the engine is: the answers of their own `generate`, in batches."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import LLAMA, SIGLIP, loud, tiny_tokenizer
from judged_fakes import mm_vet
from leveret.cli import run
from leveret.evaluate import evaluate
from leveret.generate import Request
from leveret.generate.foreign import Foreign, is_known
from leveret.generate.others import open_other
from leveret.inputs.chat import literal
from leveret.records import ImageRef, Prediction, Turn
from leveret.runs import DataError, Interrupted, RecipeError, graceful_stop, read_jsonl

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with random weights and a processor with a chat template, as transformers saves them."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|user|>", "<|assistant|>"]})
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP), text_config=LlamaConfig(**LLAMA),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="full",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llava")
    model = loud(LlavaForConditionalGeneration(config))
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True  # not how we ask
    model.save_pretrained(path)
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer=tokenizer, patch_size=16,
        vision_feature_select_strategy="full", chat_template=TEMPLATE, num_additional_image_tokens=0,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Foreign:
    return Foreign(folder, device="cpu", batch=3)


def pictures(root: Path, count: int = 3) -> list[ImageRef]:
    from PIL import Image

    refs = []
    for n in range(count):
        Image.new("RGB", (20 + 9 * n, 30), (80 * n, 200 - 60 * n, 40)).save(root / f"{n}.png")
        refs.append(ImageRef(str(root / f"{n}.png")))
    return refs


def questions(root: Path) -> list[Request]:
    refs = pictures(root)
    words = ["red?", "how many things are there ? two . what colour is the square ?", "left or right", "A B C D 0 1 2"]
    asked = [
        Request(f"{n}/{k}", (ref,), (Turn("user", f"<image>\n{literal(text)}"),), max_new_tokens=6 + k % 2)
        for n, ref in enumerate(refs)
        for k, text in enumerate(words)
    ]
    turns = (Turn("user", "<image>\nwhat colour ?"), Turn("assistant", "red"), Turn("user", "<image> and this ?"))
    return [
        *asked,
        Request("text", (), (Turn("user", "is there <image> a thing ?"),)),
        Request("two", tuple(refs[:2]), turns),
    ]


def test_answers_in_batches_are_those_of_one_by_one(model: Foreign, tmp_path: Path) -> None:
    requests = [r for r in questions(tmp_path) if r.question_id != "text"]
    came: list[Prediction] = []
    together = model.answer(requests, came.append)
    assert [p.question_id for p in together] == [r.question_id for r in requests]
    assert sorted(p.question_id for p in came) == sorted(r.question_id for r in requests)
    for request, prediction in zip(requests, together, strict=True):
        (alone,) = Foreign.answer(model, [request])
        assert alone == prediction
        assert prediction.meta["tokens"] <= (request.max_new_tokens or 64)
        assert prediction.meta["finish"] in ("stop", "length")
    assert len({p.text for p in together}) > 3  # pictures and questions matter


def test_an_answer_is_what_transformers_makes_of_the_prompt(model: Foreign, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from leveret.images import load

    (ref,) = pictures(tmp_path, 1)
    request = Request("q", (ref,), (Turn("user", "<image>\nwhat colour ?"),), max_new_tokens=8)
    prompt = "<|user|><image>what colour ?<|end|><|assistant|>"
    inputs = model.processor(text=prompt, images=load(ref), return_tensors="pt")
    plain = AutoModelForImageTextToText.from_pretrained(model.folder).eval()
    made = plain.generate(**inputs, max_new_tokens=8, do_sample=False, temperature=None)[
        0, inputs["input_ids"].shape[1] :
    ]
    wanted = model.processor.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert model.answer([request])[0].text == wanted and wanted


def test_a_model_keeps_the_precision_it_was_saved_in(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    Foreign(folder).model.to(torch.bfloat16).save_pretrained(half)
    found = Foreign(half, device="cpu")
    assert found.model.dtype == torch.bfloat16
    (answer,) = found.answer([questions(tmp_path)[0]])
    assert answer.meta["tokens"] > 0


def test_questions_without_a_picture(model: Foreign, tmp_path: Path) -> None:
    text = next(r for r in questions(tmp_path) if r.question_id == "text")
    # `<image>` that a person typed, with no image: the processor would want one for it.
    plain = Request("plain", (), (Turn("user", "is there a thing ?"),), max_new_tokens=4)
    assert model.answer([plain])[0].question_id == "plain"
    with pytest.raises(DataError, match="question 'text'"):
        model.answer([text])


def test_requests_that_cannot_be_put(model: Foreign, tmp_path: Path) -> None:
    (ref,) = pictures(tmp_path, 1)
    with pytest.raises(RecipeError, match="probabilities"):
        model.answer([Request("q", (), (Turn("user", "?"),), choices=("a", "b"))])
    with pytest.raises(DataError, match=r"question 'q': .*none\.png"):
        model.answer([Request("q", (ImageRef(str(tmp_path / "none.png")),), (Turn("user", "<image>?"),))])
    with pytest.raises(DataError, match="question 'q': 2 <image> in the user turns for 1 images"):
        model.answer([Request("q", (ref,), (Turn("user", "<image><image>?"),))])


def test_a_stop_keeps_the_batches_so_far(model: Foreign, tmp_path: Path) -> None:
    requests = [r for r in questions(tmp_path) if "/" in r.question_id]
    came: list[Prediction] = []

    def take(prediction: Prediction) -> None:
        came.append(prediction)
        if len(came) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted), graceful_stop():
        model.answer(requests, take)
    assert 0 < len(came) <= 3


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        Foreign(bare)
    (bare / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="reads no image-text model"):
        Foreign(bare)
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    gone = next(name for name in held if "projector" in name)
    save_file(
        {name: tensor for name, tensor in held.items() if name != gone}, bare / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(DataError, match="lacks 1 weights"):
        Foreign(bare)
    with pytest.raises(DataError, match="reads no image-text model"):
        Foreign(tmp_path)
    assert is_known(folder) and not is_known(tmp_path)


def test_a_folder_that_only_transformers_knows_is_taken_by_itself(folder: Path, tmp_path: Path) -> None:
    assert open_other(str(folder)) is None  # LLaVA's form is one of those that we read ourselves
    found = open_other(f"hf:{folder}", parallel=2)
    assert isinstance(found, Foreign) and found.batch == 2
    renamed = tmp_path / "unknown"
    shutil.copytree(folder, renamed)
    config = json.loads((renamed / "config.json").read_text("utf-8"))
    # A kind of model that transformers has and we do not read; the weights are LLaVA's all the same.
    (renamed / "config.json").write_text(json.dumps(config | {"model_type": "vipllava"}), encoding="utf-8")
    assert is_known(renamed)
    from leveret.generate import others

    with pytest.MonkeyPatch.context() as patch:
        made: list[Any] = []
        patch.setattr("leveret.generate.foreign.Foreign", lambda path, **told: made.append((path, told)) or "model")
        assert others.open_other(str(renamed)) == "model" and made == [(renamed, {"batch": 8})]


def test_an_examination_of_a_foreign_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, _ = mm_vet(tmp_path / "data")
    waiting = evaluate(f"hf:{folder}", root, "mm_vet", out=tmp_path / "out")
    answers = read_jsonl(Path(waiting["unjudged"]["mm_vet"]["answers"]))
    assert len(answers) == 4 and {a["model_id"] for a in answers} == {Foreign(folder).fingerprint}
    code = run(["eval", f"hf:{folder}", str(root), "--suite", "mm_vet", "-o", str(tmp_path / "out"), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out)["unjudged"]["mm_vet"]["n"] == 4
