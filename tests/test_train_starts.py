"""Starts: a run begins with weights of any model, whole or in parts; what does not fit is refused and listed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fakes
import train_fakes
from leveret.cli import run
from leveret.model import build as builder
from leveret.model import checkpoint, peers
from leveret.model.merge import add_adapters
from leveret.runs import DataError, RecipeError
from leveret.train import train
from leveret.train.loop import begin
from leveret.train.plan import plan
from leveret.train.stages import Start, TrainRecipe
from leveret.train.starts import read

PARITY = Path(os.environ.get("LEVERET_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_fakes.toy_set(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def earlier(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every part has learned."""
    learn = {part: {"lr": 1e-2} for part in ("vision", "connector", "language")}
    out = tmp_path_factory.mktemp("earlier") / "run"
    train(train_fakes.recipe(data, learn=learn, steps=2), out)
    return out


def starting(data: Path, start: dict[str, Any] | None, **stage: Any) -> TrainRecipe:
    told = train_fakes.recipe(data, **stage).model_dump(mode="json")
    return TrainRecipe.model_validate({**told, "start": start})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> bool:
    own = [name for name in one if name.startswith(part)]
    assert own
    return all(torch.equal(one[name], other[name]) for name in own)


def test_a_run_starts_from_a_whole_model_and_fetches_no_backbone(
    data: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("a backbone was fetched")

    monkeypatch.setattr(builder.towers, "load_tower", refuse)
    monkeypatch.setattr(builder.languages, "load_language", refuse)
    vlm = begin(starting(data, {"from": str(earlier)}), None, "cpu")
    there = checkpoint.load(earlier)
    assert vlm.tokenizer.get_vocab() == there.tokenizer.get_vocab() and vlm.dtype == torch.float32
    own, due = dict(checkpoint.stored(vlm)), dict(checkpoint.stored(there))
    assert own.keys() == due.keys() and all(torch.equal(own[name], due[name]) for name in own)


@pytest.mark.parametrize("parts", [["connector"], ["vision"], ["language", "connector"]])
def test_only_the_parts_that_are_named_come(data: Path, earlier: Path, parts: list[str]) -> None:
    plain = dict(checkpoint.stored(begin(starting(data, None), None, "cpu")))
    found = dict(checkpoint.stored(begin(starting(data, {"from": str(earlier), "parts": parts}), None, "cpu")))
    there = weights(earlier / "model")
    for part, prefix in {"vision": "towers.", "connector": "connector.", "language": "language."}.items():
        assert same(found, there if part in parts else plain, prefix), part
        assert not same(found, plain if part in parts else there, prefix), part


def test_a_stage_begins_with_the_one_before_and_what_is_laid_over_it(data: Path, earlier: Path, tmp_path: Path) -> None:
    """Prismatic's rule, for one: a second stage reads the projector of the first alone."""
    learn = {"language": {"lr": 1e-2, "lora": {"rank": 2}}}
    stages: dict[str, Any] = {
        "one": {"learn": {"connector": {"lr": 1e-2}}, "steps": 2},
        "two": {"learn": learn, "steps": 2, "start": {"from": str(earlier), "parts": ["connector"]}},
    }
    recipe = train_fakes.recipe(data, stages)
    assert TrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    made = weights(train(recipe, tmp_path / "run"))
    assert same(made, weights(earlier / "model"), "connector.")
    assert same(made, weights(tmp_path / "run" / "one" / "model"), "towers.")
    add_adapters(tmp_path / "run" / "two" / "adapter", tmp_path / "sum")
    summed = weights(tmp_path / "sum")
    assert made.keys() == summed.keys() and all(torch.allclose(made[name], summed[name]) for name in made)


def test_a_start_that_changed_binds_the_run(data: Path, earlier: Path, tmp_path: Path) -> None:
    place = tmp_path / "start"
    shutil.copytree(earlier / "model", place)
    recipe = starting(data, {"from": str(place), "parts": ["connector"]}, steps=2)
    train(recipe, tmp_path / "run")
    assert train(recipe, tmp_path / "run") == tmp_path / "run" / "model"
    state = weights(place)
    state["connector.0.bias"] += 1
    save_file(state, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="the model this stage starts from changed"):
        train(recipe, tmp_path / "run")


def projector(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.mm_projector.{name.removeprefix('connector.')}": x for name, x in state.items()}


@pytest.mark.parametrize("form", ["mm_projector.bin", "theirs.safetensors", "ours.safetensors"])
def test_a_connector_comes_from_a_file(form: str, data: Path, earlier: Path, tmp_path: Path) -> None:
    own = {name: x for name, x in weights(earlier / "model").items() if name.startswith("connector.")}
    file = tmp_path / form
    if form.endswith(".bin"):
        torch.save(projector(own), file)
    else:
        save_file(own if form.startswith("ours") else projector(own), file)
    vlm = begin(starting(data, {"from": str(file), "parts": ["connector"]}), None, "cpu")
    assert same(dict(checkpoint.stored(vlm)), own, "connector.")
    with pytest.raises(RecipeError, match=r"is a file, which can hold a connector alone"):
        begin(starting(data, {"from": str(file)}), None, "cpu")


def test_what_does_not_fit_is_listed(data: Path, earlier: Path, tmp_path: Path) -> None:
    told = starting(data, {"from": str(earlier), "parts": ["connector"]}).model_dump(mode="json")
    told["model"]["connector"] = {"kind": "mlp3x_gelu"}
    with pytest.raises(
        DataError, match=r"start: .* does not fit .* connector: 2 missing: connector\.4\.bias"
    ) as caught:
        begin(TrainRecipe.model_validate(told), None, "cpu")
    assert "\n" not in str(caught.value)
    state = projector({"connector.0.weight": torch.zeros(3, 3), "connector.0.bias": torch.zeros(32)})
    torch.save({**state, "model.mm_projector.7.bias": torch.zeros(2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(DataError) as caught:
        begin(starting(data, {"from": str(tmp_path / "mm_projector.bin"), "parts": ["connector"]}), None, "cpu")
    for words in (
        "2 missing: connector.2.bias",
        "1 unexpected: connector.7.bias",
        "connector.0.weight (3, 3) for (32, 16)",
    ):
        assert words in str(caught.value)
    torch.save({"something": torch.zeros(2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(DataError, match="it holds nothing of it"):
        begin(starting(data, {"from": str(tmp_path / "mm_projector.bin"), "parts": ["connector"]}), None, "cpu")


def test_backbones_of_other_settings_are_refused_though_their_shapes_fit(
    data: Path, earlier: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "language"
    shutil.copytree(fakes.tiny_language_folder(0), folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "hidden_act": "relu"}))
    raw = starting(data, {"from": str(earlier), "parts": ["language"]}).model_dump(mode="json")
    raw["model"]["language"]["name"] = str(folder)
    with pytest.raises(DataError, match="of other settings: language hidden_act 'silu' for 'relu'"):
        begin(TrainRecipe.model_validate(raw), None, "cpu")


def test_a_start_that_is_not_there_is_told_before_anything_is_computed(data: Path, tmp_path: Path) -> None:
    stages: dict[str, Any] = {
        "one": {"start": {"from": "./nowhere/at/all"}},
        "two": {"start": {"from": "./nor/there/either", "parts": ["vision"]}},
    }
    with pytest.raises(DataError, match=r"(?s)stages\.one\.start\.from: .*nowhere.*stages\.two\.start\.from: .*nor/th"):
        train(train_fakes.recipe(data, stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "words.txt").write_text("no weights")
    with pytest.raises(RecipeError, match=r"start\.from: .*words\.txt is no file of weights"):
        train(starting(data, {"from": str(tmp_path / "words.txt"), "parts": ["connector"]}), tmp_path / "run")


def test_a_start_of_a_later_stage_that_does_not_fit_is_told_before_the_first_begins(
    data: Path, earlier: Path, tmp_path: Path
) -> None:
    stages: dict[str, Any] = {"one": {}, "two": {"start": {"from": str(earlier)}}}
    told = train_fakes.recipe(data, stages).model_dump(mode="json")
    told["model"]["connector"] = {"kind": "mlp3x_gelu"}
    recipe = TrainRecipe.model_validate(told)
    for attempt in (lambda: train(recipe, tmp_path / "run"), lambda: plan(recipe, ["one", "two"])):
        with pytest.raises(DataError, match=r"stages\.two\.start: .* 2 missing: connector\.4\.bias"):
            attempt()
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_it_would_start_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(starting(data, {"from": "a/b", "parts": ["connector"]}), tmp_path / "run", dry_run=True)
    assert "connector from a/b (not on this machine" in capsys.readouterr().out


def test_the_command_takes_it_as_an_override(data: Path, earlier: Path, tmp_path: Path) -> None:
    import yaml

    told = train_fakes.recipe(data, steps=2).model_dump(mode="json")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(told))
    own = ["train", str(tmp_path / "mine.yaml"), f"start.from={earlier}", "start.parts=[connector]", "-o"]
    assert run([*own, str(tmp_path / "run")]) == 0
    assert "from:" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_the_page_about_stages_holds() -> None:
    """Every example is a recipe's, and every field of what learns and of a start is told."""
    import yaml

    from leveret.train.stages import Learn, Lora

    page = (Path(__file__).parents[1] / "docs" / "train.md").read_text("utf-8")
    blocks = [yaml.safe_load(block.partition("```")[0]) for block in page.split("```yaml\n")[1:]]
    assert len(blocks) == 4
    plain = train_fakes.recipe(Path("none.json")).model_dump(mode="json")
    for block in blocks:
        told = (
            {**plain, **block} if "start" in block else {**plain, "stages": {"one": {"data": "a", "steps": 1, **block}}}
        )
        TrainRecipe.model_validate(told)
    for name in [*Learn.model_fields, *Lora.model_fields, "decays", "start", "from", "parts", "average"]:
        assert f"`{name}`" in page or f"{name}:" in page, name


THERE = sorted(path.parent.name for path in PARITY.glob("*/cases.json") if list(path.parent.glob("checkpoint*")))


@pytest.mark.parity
@pytest.mark.skipif(not THERE, reason=f"no parity data in {PARITY}; LEVERET_PARITY names another place")
@pytest.mark.parametrize("name", THERE)
def test_a_connector_comes_out_of_every_tools_model_without_the_rest(name: str) -> None:
    """Bunny's and LLaVA's folders and projectors, the Factory's, Prismatic's."""
    folder = PARITY / name
    meta = json.loads((folder / "cases.json").read_text("utf-8"))["meta"]
    place = folder / (meta.get("checkpoint") or "checkpoint")
    due = peers.read(place, hub=folder / "hub", size=meta.get("default_image_size")).connector
    found = read(Start.model_validate({"from": str(place), "parts": ["connector"]})).state
    assert found.keys() == {f"connector.{key}" for key in due}
    assert all(torch.equal(found[f"connector.{key}"], tensor) for key, tensor in due.items())
    if (folder / "pretrain").is_dir():
        alone = read(Start.model_validate({"from": str(folder / "pretrain"), "parts": ["connector"]})).state
        assert {key: x.shape for key, x in alone.items()} == {key: x.shape for key, x in found.items()}


def test_a_language_model_whose_head_is_its_token_table(tmp_path: Path) -> None:
    """The drawn world's is so: one tensor under two names, in what comes and in where it goes."""
    from leveret.train.run import read as recipe_of

    fresh = begin(recipe_of("world"), None, "cpu")
    table = fresh.language.get_input_embeddings().weight
    assert fresh.language.get_output_embeddings().weight is table
    with torch.no_grad():
        table.add_(1)
    checkpoint.save(fresh, tmp_path / "model")
    from_there = Start.model_validate({"from": str(tmp_path / "model")})
    started = begin(recipe_of("world").model_copy(update={"start": from_there}), None, "cpu")
    assert torch.equal(started.language.get_output_embeddings().weight, table)
    # Two tensors do not fit where there is one.
    with torch.no_grad():
        fresh.language.lm_head.weight = torch.nn.Parameter(table + 1)
    fresh.language.config.tie_word_embeddings = False
    checkpoint.save(fresh, tmp_path / "apart")
    apart = Start.model_validate({"from": str(tmp_path / "apart")})
    with pytest.raises(DataError, match=r"1 unexpected: language\.lm_head\.weight"):
        begin(recipe_of("world").model_copy(update={"start": apart}), None, "cpu")
