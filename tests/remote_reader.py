"""Runs where leveret is not: loads published folders as a stranger would, and writes what they give.

python remote_reader.py JOB.json OUT.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

TRUST = {"trust_remote_code": True}


def greedy(model: Any, inputs: Any, tokens: int = 8) -> np.ndarray:
    made = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return made[:, inputs["input_ids"].shape[1] :].numpy()


def read(folder: str, job: dict[str, Any], again: Path) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(folder, **TRUST)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **TRUST)
    assert not any(report.values()), report
    out: dict[str, Any] = {}
    told = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = []
    for number, question in enumerate(job["questions"]):
        parts = [{"type": "image", "path": job["image"]}, {"type": "text", "text": question}]
        asked.append([{"role": "user", "content": parts}])
        one = processor.apply_chat_template(asked[-1], **told)
        out[f"ids{number}"] = one["input_ids"][0].numpy()
        with torch.no_grad():
            out[f"logits{number}"] = model(**one).logits[0].numpy()
        out[f"greedy{number}"] = greedy(model, one)[0]
        if not number:
            out["pixels"] = one["pixel_values"].numpy()
    plain = processor.apply_chat_template([{"role": "user", "content": job["questions"][0]}], **told)
    out["ids_text"] = plain["input_ids"][0].numpy()

    both = processor.apply_chat_template(asked, processor_kwargs={"padding": True}, **told)
    lengths = [len(out[f"ids{number}"]) for number in range(len(asked))]
    assert both["attention_mask"].sum(1).tolist() == lengths and both["attention_mask"][:, -1].all()
    with torch.no_grad():
        logits = model(**both).logits
    for number, length in enumerate(lengths):
        out[f"padded_logits{number}"] = logits[number, -length:].numpy()
    out["padded_greedy"] = greedy(model, both)

    labels = one["input_ids"].masked_fill(one["input_ids"] == processor.image_token_id, -100)
    loss = model(**one, labels=labels).loss
    shifted = model(**one).logits[0, :-1]
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(shifted, labels[0, 1:])), loss

    rules(folder, processor, model, one, job["image"])

    model.save_pretrained(again)
    processor.save_pretrained(again)
    processor = AutoProcessor.from_pretrained(again, **TRUST)
    model = AutoModelForImageTextToText.from_pretrained(again, **TRUST)
    one = processor.apply_chat_template(asked[0], **told)
    out["again_ids"], out["again_pixels"] = one["input_ids"][0].numpy(), one["pixel_values"].numpy()
    with torch.no_grad():
        out["again_logits"] = model(**one).logits[0].numpy()
    return out


def rules(folder: str, processor: Any, model: Any, one: Any, image: str) -> None:
    """What vLLM's transformers backend asks of a model and its processor; vLLM itself is not run."""
    size = Image.open(image).size[::-1]
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(480, 640), (3, 5), size])
    assert tokens["num_image_patches"] == [1, 1, 1]
    tiles = "image_sizes" in one
    assert (len(set(tokens["num_image_tokens"])) > 1) == tiles == ("image_sizes" in processor.model_input_names)
    count = tokens["num_image_tokens"][2]
    text = f"{processor.image_token} what is it?"
    found = processor(text=text, images=[Image.open(image)], return_mm_token_type_ids=True, return_tensors="pt")
    kinds = found["mm_token_type_ids"]
    assert kinds.shape == found["input_ids"].shape and int(kinds.sum()) == count
    at = torch.nonzero(kinds[0])[:, 0]
    assert at.tolist() == list(range(int(at[0]), int(at[-1]) + 1))  # in one piece, as a placeholder must be
    embedded = found["input_ids"][kinds.bool()] == processor.image_token_id
    assert embedded.all() or tiles
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert AutoTokenizer.from_pretrained(folder, **TRUST).convert_tokens_to_ids("<image>") == processor.image_token_id

    assert type(model)._supports_attention_backend and model.config.get_text_config() is not model.config
    given = {key: found[key] for key in ("pixel_values", "image_sizes") if key in found}
    seen = model.get_image_features(**given).pooler_output
    assert len(seen) == 1 and isinstance(seen, tuple) == tiles
    assert tuple(seen[0].shape) == (int(embedded.sum()), model.config.get_text_config().hidden_size)
    if tiles:  # an engine that puts requests together gives a row of its own for every image
        apart = model.get_image_features(list(given["pixel_values"][None]), given["image_sizes"]).pooler_output
        assert torch.equal(apart[0], seen[0])
    assert model.model.language_model.get_input_embeddings() is model.get_input_embeddings()
    with torch.device("meta"):
        bare = AutoModel.from_config(AutoConfig.from_pretrained(folder, **TRUST), **TRUST)
    assert {f"model.{name}" for name in bare.state_dict()} == {
        name for name in model.state_dict() if not name.startswith("lm_head.")
    }
    embedded = model.get_input_embeddings()(found["input_ids"].clamp(max=1))
    hidden = model.model(None, inputs_embeds=embedded, use_cache=False, return_dict=False)[0]
    assert hidden.shape == embedded.shape
    try:
        model(input_ids=one["input_ids"])
    except ValueError as fault:
        assert "images and marks disagree" in str(fault)
    else:
        raise AssertionError("image marks without images were taken")
    try:
        processor(text=text)
    except ValueError as fault:
        assert "one per image" in str(fault)
    else:
        raise AssertionError("a mark without an image was taken")


def pixels(folder: str, views: list[dict[str, Any]], images: list[str]) -> dict[str, np.ndarray]:
    made = type(AutoProcessor.from_pretrained(folder, **TRUST).image_processor)
    return {
        f"{number}:{image}": made(towers=[view])(image)["pixel_values"][0]
        for number, view in enumerate(views)
        for image in images
    }


def main() -> None:
    try:
        import leveret  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("leveret can be imported here: this shows nothing")
    job = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {}
    for name, folder in job["models"].items():
        for key, value in read(folder, job, Path(sys.argv[2]).parent / f"again-{name}").items():
            found[f"{name}/{key}"] = value
    if job["views"]:
        found |= pixels(next(iter(job["models"].values())), job["views"], job["images"])
    assert not any(name.partition(".")[0] == "leveret" for name in sys.modules)
    np.savez(sys.argv[2], **found)


main()
