"""The loop teaches what it is told to, weighs tokens alike however a batch is cut, and survives bad data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fakes
import train_fakes
from leveret.model import checkpoint
from leveret.model.vlm import VLM
from leveret.runs import DataError, RecipeError, read_jsonl
from leveret.train import TrainRecipe, train
from leveret.train.data import Prepared
from leveret.train.loop import Job, Teacher, arrange, begin
from leveret.train.ranks import Ranks
from leveret.train.run import _data, open_sources


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_fakes.toy_set(tmp_path_factory.mktemp("toy"))


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load(folder).state_dict()


def losses(run: Path, stage: str = "tune") -> list[float]:
    return [row["loss"] for row in read_jsonl(run / stage / "metrics.jsonl")]


class Share(Ranks):
    """One of several ranks, alone in this process: its buffer stays its own share."""

    def all_reduce(self, buffer: Any) -> None:
        raise AssertionError("a test of shares never steps")


def teacher(recipe: TrainRecipe, folder: Path, rank: int, world: int, stage: str = "tune") -> Teacher:
    how = recipe.stages[stage]
    vlm = begin(recipe, None, "cpu")
    trainables = arrange(vlm, how, 0, stage, "cpu", "fp32")
    facts = {"data": 0, "tokenizer": 0, "start": 0, "precision": 0}
    prepared: Prepared = _data(vlm, how, folder, open_sources(recipe, [stage])[stage], "cpu", "fp32", facts)
    job = Job(recipe.model_dump(mode="json"), stage, str(folder), None, 6, None, "fp32", "cpu", 1)
    return Teacher(job, how, vlm, trainables, prepared, Share(rank, world))


def share_of_gradient(one: Teacher) -> Tensor:
    supervised = int(one.data.supervised[one.order.rows(0)].sum())
    one._gradients(one._batches(0), 1.0 / supervised)
    return one.optimiser.buffer.clone()


def test_the_loss_falls_and_what_is_not_named_stays(data: Path, tmp_path: Path) -> None:
    recipe = train_fakes.recipe(data, steps=30)
    model = train(recipe, tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert len(seen) == 30 and seen[-1] < 0.3 * seen[0]
    before, after = begin(recipe, None, "cpu").state_dict(), weights(model)
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"connector", "language"}
    assert model == tmp_path / "run" / "model" and not (tmp_path / "run" / "tune" / "state").exists()


def written(model: Path) -> tuple[int, int]:
    """Which file the weights are and when it was written (not when it was read: that changes by looking)."""
    facts = (model / "model.safetensors").stat()
    return facts.st_ino, facts.st_mtime_ns


def test_a_stage_starts_from_the_one_before_and_finished_stages_are_not_done_again(data: Path, tmp_path: Path) -> None:
    learn = {"learn": {"connector": {"lr": 1e-2}}, "steps": 3}
    recipe = train_fakes.recipe(data, stages={"align": learn, "tune": {"steps": 2, "resize": "pad"}})
    with pytest.raises(RecipeError, match="starts from 'align'"):
        train(recipe, tmp_path, stages=["tune"])
    assert train(recipe, tmp_path, stages=["align"]) == tmp_path / "align" / "model"
    align = written(tmp_path / "align" / "model")
    model = train(recipe, tmp_path)
    assert written(tmp_path / "align" / "model") == align
    assert checkpoint.load(model).spec.towers[0].resize == "pad"
    backbones, aligned = begin(recipe, None, "cpu").state_dict(), weights(tmp_path / "align")
    assert not any(
        torch.equal(backbones[n], aligned[n]) for n in aligned if n.startswith("connector") and "weight" in n
    )
    assert all(torch.equal(backbones[name], aligned[name]) for name in aligned if not name.startswith("connector"))
    again = written(model)
    assert train(recipe, tmp_path) == model and written(model) == again


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, None), (4, 1)])
def test_gradients_do_not_depend_on_ranks_or_micro_batches(
    data: Path, tmp_path: Path, world: int, micro: int | None, cache: bool
) -> None:
    whole = share_of_gradient(teacher(train_fakes.recipe(data), tmp_path, 0, 1))
    cut = train_fakes.recipe(data, micro_batch=micro, cache_features=cache)
    summed = sum(share_of_gradient(teacher(cut, tmp_path / "cut", rank, world)) for rank in range(world))
    assert isinstance(summed, Tensor)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"pack": True}, {"pack": True, "micro_batch": 3}, {"pack": True, "recompute": True}, {"recompute": True},
        {"pack": True, "cache_features": False}, {"cache_features": False, "workers": 3}, {"fused": False},
    ],
)  # fmt: skip
@pytest.mark.parametrize("adapted", [False, True])
def test_how_a_step_is_computed_changes_no_gradient(
    data: Path, tmp_path: Path, how: dict[str, Any], adapted: bool
) -> None:
    lora = {"lora": {"rank": 4, "alpha": 8}} if adapted else {}
    learn = {"connector": {"lr": 5e-3}, "language": {"lr": 5e-3, **lora}}
    whole = share_of_gradient(teacher(train_fakes.recipe(data, learn=learn), tmp_path, 0, 1))
    other = share_of_gradient(teacher(train_fakes.recipe(data, learn=learn, **how), tmp_path / "other", 0, 1))
    torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_language_model_has_the_same_gradient(data: Path, tmp_path: Path) -> None:
    whole = share_of_gradient(teacher(train_fakes.recipe(data), tmp_path, 0, 1))
    for packed in (False, True):
        made = train_fakes.recipe(data, compile=True, pack=packed)
        compiled = share_of_gradient(teacher(made, tmp_path / f"compiled-{packed}", 0, 1))
        torch.testing.assert_close(compiled, whole, rtol=1e-4, atol=1e-6)


def mixed(data: Path, folder: Path) -> Path:
    """The toy set, every third of its records without its image."""
    records = json.loads(data.read_text("utf-8"))
    for record in records[::3]:
        record.pop("image")
        record["conversations"][0]["value"] = "what colour is it ?"
    (folder / "mixed.json").write_text(json.dumps(records), "utf-8")
    return folder / "mixed.json"


@pytest.mark.parametrize("order", ["modality", "random", "llava", "tinyllava", "prismatic"])
def test_every_order_teaches_every_sample(data: Path, tmp_path: Path, order: str) -> None:
    recipe = train_fakes.recipe(mixed(data, tmp_path), order=order, steps=None, epochs=1.0, images=str(data.parent))
    train(recipe, tmp_path / "run")
    one = teacher(recipe, tmp_path / "again", 0, 1)
    steps = [one.order.rows(step) for step in range(one.order.per_epoch)]
    assert len(losses(tmp_path / "run")) == len(steps)
    assert {row for rows in steps for row in rows} == set(range(24))
    assert one.order.seen(len(steps)) == sum(map(len, steps))
    shown = [[bool(one.data.image_offsets[row + 1] - one.data.image_offsets[row]) for row in rows] for rows in steps]
    pure = sum(len(set(kinds)) == 1 for kinds in shown)
    # The originals let a kind's last batch, whole or not, join the other kind's.
    assert pure >= {"random": 0, "llava": len(steps) - 2, "tinyllava": len(steps) - 2}.get(order, len(steps))


def test_an_order_that_needs_two_kinds_says_so(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"order: 'tinyllava' cannot be used here: .* all 24 are of one kind"):
        train(train_fakes.recipe(data, order="tinyllava"), tmp_path / "run")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(data: Path, tmp_path: Path) -> None:
    recipe = train_fakes.recipe(data)
    train(recipe, tmp_path / "one")
    train(recipe.model_copy(update={"ranks": 2}), tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_adapters_are_merged_and_saved_as_peft_reads_them(data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    learn = {"connector": {"lr": 1e-3}, "language": {"lr": 1e-2, "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}}
    recipe = train_fakes.recipe(data, learn=learn, steps=8)
    seen: dict[str, Tensor] = {}
    probe = torch.arange(5, 25)[None]

    def look(vlm: VLM, step: int) -> dict[str, float]:
        with torch.no_grad():
            seen["logits"] = vlm.language(input_ids=probe).logits
        return {"probe": float(seen["logits"].mean())}

    model = checkpoint.load(train(recipe, tmp_path, validators=[look]))
    base = begin(recipe, None, "cpu")
    with torch.no_grad():
        merged, plain = model.language(input_ids=probe).logits, base.language(input_ids=probe).logits
        adapted = PeftModel.from_pretrained(base.language, tmp_path / "tune" / "adapter").eval()
        read = adapted(input_ids=probe).logits
    assert (merged - plain).abs().max() > 0.05
    torch.testing.assert_close(merged, seen["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read, seen["logits"], rtol=1e-4, atol=1e-4)
    (told,) = read_jsonl(tmp_path / "tune" / "validation.jsonl")
    assert told["step"] == 8
    described = json.loads((tmp_path / "tune" / "adapter" / "adapter_config.json").read_text())
    assert not any("lm_head" in name or "tower" in name for name in described["target_modules"])


def test_a_tower_learns_from_a_layer_on(data: Path, tmp_path: Path) -> None:
    recipe = train_fakes.recipe(data, learn={"vision": {"lr": 1e-2, "from_layer": 1}}, steps=3)
    before, after = begin(recipe, None, "cpu").state_dict(), weights(train(recipe, tmp_path))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all(".layers.1." in name for name in moved)


def poison(vlm: VLM, steps: Sequence[int]) -> None:
    """Let the loss of these passes (from 0) be NaN."""
    forward, count = vlm.forward, iter(range(1000))

    def bad(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        return type(out)(out.loss_sum * float("nan"), out.supervised, out.logits) if next(count) in steps else out

    vlm.forward = bad  # type: ignore[method-assign]


def test_a_step_without_a_finite_loss_is_skipped_named_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leveret.train import loop

    def poisoned(*args: Any) -> Any:
        poison(vlm := begin(*args), [1, 3])
        return vlm

    monkeypatch.setattr(loop, "begin", poisoned)
    model = train(train_fakes.recipe(data), tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "tune" / "metrics.jsonl")
    assert [row["step"] for row in rows if "skipped" in row] == [2, 4]
    assert rows[1]["loss"] is None and len(rows[1]["skipped"]) == 8 and rows[1]["skipped"][0].startswith("toy-")
    assert all(torch.isfinite(value).all() for value in weights(model).values())
    with pytest.raises(DataError, match=r"not finite in 2 steps.*toy-"):
        train(train_fakes.recipe(data, bad_steps=1), tmp_path / "strict")


def spoil(data: Path, folder: Path) -> Path:
    """The toy set with a broken image, an image that is not there, and an empty answer."""
    fresh = train_fakes.toy_set(folder)
    (folder / "3.png").write_bytes(b"no image")
    (folder / "4.png").unlink()
    records = json.loads(fresh.read_text())
    records[5]["conversations"][1]["value"] = ""
    fresh.write_text(json.dumps(records))
    return fresh


def test_bad_samples_are_quarantined_with_reasons(data: Path, tmp_path: Path) -> None:
    bad = spoil(data, tmp_path / "bad")
    train(train_fakes.recipe(bad), tmp_path / "run")
    refused = read_jsonl(tmp_path / "run" / "tune" / "quarantine.jsonl")
    assert [row["id"] for row in refused] == ["toy-3", "toy-4", "toy-5"]
    assert all(row["reason"] for row in refused)
    with pytest.raises(DataError, match=r"3 of 24 samples of toy.json cannot be used, more than bad_share 0\.1"):
        train(train_fakes.recipe(bad, bad_share=0.1), tmp_path / "strict")
    assert list((tmp_path / "strict").glob("*/quarantine.jsonl")), "what was wrong stays to be read"
    # Nothing was taught, so another recipe does not find the folder taken.
    train(train_fakes.recipe(bad, steps=1, bad_share=0.4), tmp_path / "strict")
    with pytest.raises(RecipeError, match="made with another recipe"):
        train(train_fakes.recipe(bad, steps=2, bad_share=0.4), tmp_path / "strict")


def test_an_image_that_fails_while_training_costs_its_sample_only(data: Path, tmp_path: Path) -> None:
    bad = spoil(data, tmp_path / "bad")
    train(train_fakes.recipe(bad, cache_features=False, bad_share=0.4), tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "tune" / "quarantine.jsonl")
    assert {row["id"] for row in rows} == {"toy-3", "toy-4", "toy-5"}
    assert all(loss is not None for loss in losses(tmp_path / "run"))


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_what_fails_in_a_step_leaves_the_weight_of_the_others_as_it_is(tmp_path: Path, micro_batch: int | None) -> None:
    """The step is that of the samples that could be read: loss, gradient and the tokens that were taught."""
    bad = train_fakes.toy_set(tmp_path / "bad")
    for number in range(12):
        (bad.parent / f"{number}.png").write_bytes(b"no image")
    how: dict[str, Any] = {"batch": 24, "steps": 1, "bad_share": 0.9, "micro_batch": micro_batch}
    found = []
    for cached in (False, True):  # what is seen beforehand is left out beforehand
        train(train_fakes.recipe(bad, **how, cache_features=cached), tmp_path / f"run-{cached}")
        found += read_jsonl(tmp_path / f"run-{cached}" / "tune" / "metrics.jsonl")
    late, early = found
    assert late["samples"] == 24 and early["samples"] == 12
    assert late["supervised"] == early["supervised"] and late["loss"] == pytest.approx(early["loss"], rel=1e-5)
    assert late["grad_norm"] == pytest.approx(early["grad_norm"], rel=1e-4)


def test_steps_that_begin_with_a_bad_image_go_on(data: Path, tmp_path: Path) -> None:
    """No part is blamed for a picture that nobody could read, and a step of such pictures alone moves nothing."""
    every, one = (train_fakes.toy_set(tmp_path / name) for name in ("every", "one"))
    for number in range(24):
        (every.parent / f"{number}.png").write_bytes(b"no image")
    how: dict[str, Any] = {"batch": 1, "steps": 3, "order": "random", "cache_features": False}
    train(train_fakes.recipe(every, **how, bad_share=0.9), tmp_path / "nothing")
    before, after = weights(tmp_path / "nothing" / "model"), fakes.tiny_vlm().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "nothing was taught"
    names = [row["id"] for row in read_jsonl(tmp_path / "nothing" / "tune" / "quarantine.jsonl")]
    (one.parent / f"{names[0].removeprefix('toy-')}.png").write_bytes(b"no image")
    train(train_fakes.recipe(one, **how), tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "tune" / "metrics.jsonl")
    assert rows[0]["loss"] is None and rows[0]["supervised"] == 0 and "grad_norm" not in rows[0]
    assert all(row["loss"] is not None for row in rows[1:])


def test_a_wrong_folder_of_images_is_told_before_the_first_step_and_the_mended_command_goes_on(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    how: dict[str, Any] = {"learn": {"vision": {"lr": 1e-3}}, "steps": 1}
    with pytest.raises(DataError, match=r"24 image missing.*Image paths start from"):
        train(train_fakes.recipe(data, **how, images=str(tmp_path / "empty")), tmp_path / "run")
    train(train_fakes.recipe(data, **how), tmp_path / "run")


def test_what_max_tokens_cuts_is_counted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(train_fakes.recipe(data, steps=1, max_tokens=19), tmp_path / "run")
    assert "24 of these are longer than max_tokens 19 and lose their end" in capsys.readouterr().err
    assert "cut" in json.loads((tmp_path / "run" / "tune" / "stage.json").read_text())["notes"]
    train(train_fakes.recipe(data, steps=1), tmp_path / "whole")
    assert "max_tokens" not in capsys.readouterr().err


def test_a_later_stage_s_faults_are_told_before_the_first_is_taught(data: Path, tmp_path: Path) -> None:
    for chat, why in (("tinny", "is not a chat format"), ("vicuna_v1", "which this tokenizer does not have")):
        both: dict[str, Any] = {"first": {"steps": 1}, "then": {"steps": 1, "chat": chat}}
        with pytest.raises(RecipeError, match=rf"stages\.then\.chat.*{why}"):
            train(train_fakes.recipe(data, both), tmp_path / "run")
        assert not (tmp_path / "run").exists(), "nothing was taught"
    with pytest.raises(RecipeError, match="is not a chat format"):
        train(train_fakes.recipe(data, {"one": {"chat": "tinny"}}), tmp_path / "run", dry_run=True)


def test_fewer_steps_than_are_done_are_refused(data: Path, tmp_path: Path) -> None:
    def stop(vlm: Any, step: int) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return {}

    how: dict[str, Any] = {"save_every": 1, "validate_every": 1}
    with pytest.raises(KeyboardInterrupt):
        train(train_fakes.recipe(data, **how, steps=6), tmp_path / "run", validators=[stop])
    with pytest.raises(RecipeError, match=r"2 steps are asked for, and step 3 is done"):
        train(train_fakes.recipe(data, **how, steps=2), tmp_path / "run", allow_change=True)
    train(train_fakes.recipe(data, **how, steps=3), tmp_path / "run", allow_change=True)


@pytest.mark.parametrize("name", ["ids", "labels", "visual", "offsets", "supervised"])
def test_a_cache_that_is_not_whole_is_made_anew(data: Path, tmp_path: Path, name: str) -> None:
    from leveret.pool import open_source
    from leveret.train.data import prepare

    vlm = fakes.tiny_vlm()
    how: dict[str, Any] = {"chat": vlm.chat, "max_tokens": 64, "bad_share": 0, "see": None, "facts": {"a": 1}}
    kept = np.array(prepare(open_source(data), vlm, tmp_path / "cache", **how).labels)
    file = tmp_path / "cache" / f"{name}.npy"
    for size in (0, 20, file.stat().st_size - 3):
        file.write_bytes(file.read_bytes()[:size])
        again = prepare(open_source(data), vlm, tmp_path / "cache", **how)
        assert np.array_equal(again.labels, kept)


def test_text_alone_teaches_the_language_but_no_connector(data: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "which letter ?"}, {"from": "gpt", "value": "A"}]
    path = tmp_path / "text.json"
    path.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(9)]))
    train(train_fakes.recipe(path, learn={"language": {"lr": 1e-3}}), tmp_path / "run")
    with pytest.raises(RecipeError, match="connector would get no gradient"):
        train(train_fakes.recipe(path), tmp_path / "refused")
    train(train_fakes.recipe(path, learn={"language": {"lr": 1e-3}}), tmp_path / "refused")
