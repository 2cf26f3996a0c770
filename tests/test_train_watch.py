"""Watching a run: held-out samples, the best model, dashboards, and going on although something changed."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import train_fakes
from leveret import cli
from leveret.model import checkpoint
from leveret.model.vlm import VLM
from leveret.runs import DataError, EnvironmentFault, Interrupted, RecipeError, read_jsonl
from leveret.train import TrainRecipe, best, state, train
from leveret.train.held_out import Some
from leveret.train.track import scalars

LEARN = {"connector": {"lr": 5e-3}, "language": {"lr": 5e-3}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_fakes.toy_set(tmp_path_factory.mktemp("toy"), 20)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_fakes.toy_set(tmp_path_factory.mktemp("held"), 9)


def recipe(data: Path, **stage: Any) -> TrainRecipe:
    return train_fakes.recipe(data, **{"learn": LEARN, "steps": 6, "batch": 6, "validate_every": 2, **stage})


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    found = read_jsonl(run / "tune" / name)
    return [{key: value for key, value in row.items() if key not in state.MEASURED} for row in found]


# --- held-out samples ---------------------------------------------------------------------------------------------


def test_held_out_samples_are_validated_and_answered_and_move_no_bit(data: Path, held: Path, tmp_path: Path) -> None:
    how = {"data": str(held), "count": 6, "answers": 2, "max_answer": 5}
    train(recipe(data), tmp_path / "without")
    train(recipe(data, held_out=how), tmp_path / "with")
    weights = [(tmp_path / run / "model/model.safetensors").read_bytes() for run in ("without", "with")]
    assert weights[0] == weights[1] and rows(tmp_path / "without") == rows(tmp_path / "with")
    found = rows(tmp_path / "with", "validation.jsonl")
    assert [row["step"] for row in found] == [2, 4, 6] and found[-1]["loss"] < found[0]["loss"]
    texts = rows(tmp_path / "with", "samples.jsonl")
    assert [(row["step"], row["id"]) for row in texts[:3]] == [(2, "toy-0"), (2, "toy-1"), (4, "toy-0")]
    assert texts[0]["question"] == "what colour is it ?" and texts[0]["expected"] == "the colour is red"
    assert (tmp_path / "with" / "tune" / texts[0]["picture"]).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "with/tune/held-out/cache").exists()


def test_the_held_out_loss_is_the_model_s_own(data: Path, held: Path, tmp_path: Path) -> None:
    """Taken again from the finished model, all samples in one batch."""
    from leveret.pool import open_source
    from leveret.train.data import prepare

    model = train(recipe(data, held_out={"data": str(held), "count": 9, "answers": 0}, micro_batch=4), tmp_path / "run")
    vlm = checkpoint.load(model)
    prepared = prepare(
        open_source(held), vlm, tmp_path / "cache", chat=vlm.chat, max_tokens=128, bad_share=0, see=None, facts={}
    )
    out = vlm(prepared.batch(range(9), vlm.spec)[0])
    expected = out.loss_sum.item() / out.supervised
    assert rows(tmp_path / "run", "validation.jsonl")[-1]["loss"] == pytest.approx(expected, rel=1e-5)
    assert not (tmp_path / "run/tune/samples.jsonl").exists()


def test_an_answer_is_what_the_model_says_when_it_is_asked(data: Path, held: Path, tmp_path: Path) -> None:
    """Taught until it knows its four colours, it says them; what it says is cut where the answer ends."""
    how = {"data": str(held), "count": 4, "answers": 4, "max_answer": 12}
    learn = {"vision": {"lr": 3e-3}, "connector": {"lr": 1e-2}, "language": {"lr": 1e-2}}
    train(train_fakes.recipe(data, learn=learn, steps=150, batch=8, held_out=how), tmp_path)
    said = rows(tmp_path, "samples.jsonl")
    assert sum(row["answer"].split()[-1:] == row["expected"].split()[-1:] for row in said) >= 3, said


def test_an_answer_ends_where_the_stage_s_own_format_ends(data: Path, held: Path, tmp_path: Path) -> None:
    """`plain` ends a caption with a newline, which is a text like others."""
    how = {"data": str(held), "count": 4, "answers": 4, "max_answer": 12}
    learn = {"connector": {"lr": 1e-2}, "language": {"lr": 1e-2}}
    train(train_fakes.recipe(data, learn=learn, steps=60, chat="plain", held_out=how), tmp_path)
    said = [row["answer"] for row in rows(tmp_path, "samples.jsonl")]
    assert len(said) == 4 and not any("\n" in answer for answer in said), said
    assert any(answer.split()[-1:][0] in train_fakes.COLOURS for answer in said if answer), said


def test_samples_of_one_name_are_told_apart_and_new_held_out_data_bring_their_pictures(
    data: Path, tmp_path: Path
) -> None:
    held = train_fakes.toy_set(tmp_path / "held", 4)
    records = [record | {"id": "same"} for record in json.loads(held.read_text())]
    records[0]["conversations"][1]["value"] = ""  # is refused
    held.write_text(json.dumps(records))
    how = {"data": str(held), "count": 4, "answers": 3}
    common: dict[str, Any] = {"save_every": 1, "validate_every": 1, "bad_share": 0.5}

    def stop(vlm: VLM, step: int) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(recipe(data, **common, held_out=how, steps=2), tmp_path / "run", validators=[stop])
    said = rows(tmp_path / "run", "samples.jsonl")
    assert [row["expected"] for row in said] == ["green", "blue", "the colour is yellow"]
    other = train_fakes.toy_set(tmp_path / "other", 3)
    train(recipe(data, **common, held_out=how | {"data": str(other)}, steps=2), tmp_path / "run")
    for row in rows(tmp_path / "run", "samples.jsonl")[-3:]:
        with Image.open(tmp_path / "run" / "tune" / row["picture"]) as picture:
            assert picture.convert("RGB").getpixel((5, 5)) == Image.open(
                tmp_path / "other" / f"{row['id'].removeprefix('toy-')}.png"
            ).getpixel((5, 5))


def test_validations_of_nothing_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(train_fakes.recipe(data, steps=1, validate_every=1), tmp_path)
    assert "no `held_out` data: nothing validates" in capsys.readouterr().err


def test_held_out_samples_are_spread_and_those_that_cannot_be_used_are_named(tmp_path: Path, data: Path) -> None:
    from leveret.pool import open_source

    held = train_fakes.toy_set(tmp_path / "held", 9)
    assert Some(open_source(held), 3).places == [0, 3, 6] and len(Some(open_source(held), 50)) == 9
    (tmp_path / "held" / "0.png").unlink()
    train(recipe(data, held_out={"data": str(held), "answers": 1}), tmp_path / "run")
    refused = read_jsonl(tmp_path / "run/tune/held-out/quarantine.jsonl")
    assert [(row["id"], row["reason"]) for row in refused] == [("toy-0", "image missing")]
    assert rows(tmp_path / "run", "samples.jsonl")[0]["id"] == "toy-1"


def test_what_cannot_be_held_out_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.tune\.held_out\.data: .* is what the stage learns from"):
        train(recipe(data, held_out={"data": str(data)}), tmp_path)
    with pytest.raises(DataError, match=r"stages\.tune\.held_out\.data"):
        train(recipe(data, held_out={"data": str(tmp_path / "none.json")}), tmp_path)
    with pytest.raises(RecipeError, match=r"stages\.tune\.keep_best: nothing validates"):
        train(recipe(data, keep_best={"metric": "loss"}), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was computed"


# --- the best model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "wanted"), [("max", 4), ("min", 2)])
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "adapters"])
def test_the_model_of_the_best_validation_is_kept(
    data: Path, tmp_path: Path, mode: str, wanted: int, lora: dict[str, Any] | None
) -> None:
    """It is the model that a stage of so many steps at a constant rate would have ended with."""
    values = {2: 0.1, 4: 0.9, 6: 0.5}
    learn = {**LEARN, "language": {"lr": 5e-3, "lora": lora}}

    def judge(vlm: VLM, step: int) -> dict[str, Any]:
        return {"exam": {"score": values.get(step, float("nan"))}}

    common: dict[str, Any] = {"learn": learn, "batch": 6, "schedule": "constant", "warmup": 0.0, "validate_every": 2}
    keep = {"metric": "exam.score", "mode": mode}
    train(train_fakes.recipe(data, **common, steps=6, keep_best=keep), tmp_path / "run", validators=[judge])
    train(train_fakes.recipe(data, **common, steps=wanted), tmp_path / "short")
    told = json.loads((tmp_path / "run/tune/done").read_text())["best"]
    value = values[wanted]
    assert told == {"metric": "exam.score", "mode": mode, "value": value, "step": wanted, "model": "best/model"}
    assert sorted(path.name for path in (tmp_path / "run/tune/best").iterdir()) == ["model"]
    weights = [
        (tmp_path / place / "model.safetensors").read_bytes() for place in ("run/tune/best/model", "short/model")
    ]
    assert weights[0] == weights[1]
    checkpoint.load(tmp_path / "run/tune/best")


def test_the_best_is_as_it_stood_at_the_state_a_run_goes_on_from() -> None:
    how = train_fakes.recipe(Path("x"), keep_best={"metric": "a"}).stages["tune"].keep_best
    assert how is not None
    found = [{"step": 2, "a": 3.0}, {"step": 4, "a": None}, {"step": 6, "a": 1.0}, {"step": 8, "a": 1.0}]
    assert [best.of(found, how, step) for step in (1, 2, 5, 9)] == [None, (2, 3.0), (2, 3.0), (6, 1.0)]


def test_a_metric_that_no_validation_gives_is_refused_with_what_there_is(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"keep_best\.metric: 'acuracy' given, .* give accuracy"):
        train(
            recipe(data, keep_best={"metric": "acuracy"}), tmp_path, validators=[lambda vlm, step: {"accuracy": 1.0}]
        )  # fmt: skip


# --- dashboards ---------------------------------------------------------------------------------------------------


class Fakes:
    """Stand-ins for the two dashboards; what each was given, over all sessions."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.inits: list[dict[str, Any]] = []
        self.resumed, self.next, self.fail = False, 0, False
        fakes = self

        class SummaryWriter:
            def __init__(self, folder: str) -> None:
                Path(folder).mkdir(parents=True)
                (Path(folder) / f"events.{len(fakes.inits)}").write_text("")
                fakes.scalars.clear()  # the old files are gone: what counts is what is written now

            def add_scalar(self, name: str, value: float, step: int) -> None:
                fakes.scalars.append((name, value, step))

            def add_text(self, name: str, text: str, step: int) -> None:
                fakes.scalars.append((name, 0.0, step))

            def flush(self) -> None: ...
            def close(self) -> None: ...

        class Run:
            resumed, step = False, 0

            def __init__(self) -> None:
                self.resumed, self.step = fakes.resumed, fakes.next

            def log(self, values: dict[str, Any], step: int) -> None:
                if fakes.fail:
                    raise ConnectionError("the server is gone")
                fakes.logged.append((step, values))

            def finish(self) -> None: ...

        def init(**options: Any) -> Run:
            fakes.inits.append(options)
            return Run()

        board = types.ModuleType("torch.utils.tensorboard")
        board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        wandb = types.ModuleType("wandb")
        wandb.init = init  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "torch.utils.tensorboard", board)
        patch.setitem(sys.modules, "wandb", wandb)


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def stop_at(wanted: int) -> Any:
    def stop(vlm: VLM, step: int) -> dict[str, Any]:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"score": step / 10}

    return stop


def test_dashboards_get_every_step_once_also_after_a_stop(data: Path, tmp_path: Path, boards: Fakes) -> None:
    both = recipe(data).model_copy(update={"track": ("tensorboard", "wandb")})
    with pytest.raises(Interrupted):
        train(both, tmp_path / "run", validators=[stop_at(2)])
    train(both, tmp_path / "run", validators=[stop_at(0)])
    losses = [(step, value) for name, value, step in boards.scalars if name == "loss"]
    assert losses == [(row["step"], row["loss"]) for row in rows(tmp_path / "run")]
    assert [(step, value) for name, value, step in boards.scalars if name == "validation/score"] == [
        (2, 0.2), (4, 0.4), (6, 0.6)
    ]  # fmt: skip
    assert [step for step, values in boards.logged if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert {"lr/connector", "grad_norm", "memory", "waiting"} <= set(boards.logged[0][1])
    first, second = boards.inits
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["name"] == "run/tune"


def test_steps_a_killed_run_sent_are_not_sent_again_and_lost_ones_are(
    data: Path, tmp_path: Path, boards: Fakes
) -> None:
    """The server has steps up to 4; the run goes on from its state of step 2."""
    watched = recipe(data, save_every=2).model_copy(update={"track": ("wandb",)})
    with pytest.raises(Interrupted):
        train(watched, tmp_path / "run", validators=[stop_at(2)])
    for name in ("resumed", "next"):
        setattr(boards, name, {"resumed": True, "next": 2}[name])  # the server lost step 2 and all after it
    boards.logged.clear()
    train(watched, tmp_path / "run", validators=[stop_at(0)])
    assert [step for step, values in boards.logged if "loss" in values] == [2, 3, 4, 5, 6]
    told = json.loads((tmp_path / "run/tune/wandb.json").read_text())
    assert told["step"] == 6 and told["id"] == boards.inits[0]["id"]


def test_offline_the_steps_that_were_sent_are_known_from_this_side(data: Path, tmp_path: Path, boards: Fakes) -> None:
    from leveret.train.track import WandB

    first = WandB(tmp_path, "run/tune", {})
    for step in range(1, 4):
        first.log(step, {"loss": 1.0}, {})
    assert WandB(tmp_path, "run/tune", {}).first == 4


def test_a_dashboard_that_fails_is_named_once_and_the_run_goes_on(
    data: Path, tmp_path: Path, boards: Fakes, capfd: pytest.CaptureFixture[str]
) -> None:
    boards.fail = True
    train(recipe(data).model_copy(update={"track": ("wandb",)}), tmp_path / "run")
    assert capfd.readouterr().err.count("wandb failed and is left alone from here on: the server is gone") == 1
    assert len(rows(tmp_path / "run")) == 6


def test_a_dashboard_that_is_not_installed_is_a_fault_of_the_environment(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    both = recipe(data).model_copy(update={"track": ("tensorboard", "wandb")})
    with pytest.raises(EnvironmentFault, match=r"tensorboard and wandb .*leveret\[track\]"):
        train(both, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_for_dashboards_are_named_by_their_place() -> None:
    row = {"step": 3, "loss": None, "lr": {"vision": 0.1}, "skipped": ["a"], "good": True, "exam": {"a": {"b": 2}}}
    assert scalars(row) == {"lr/vision": 0.1, "exam/a/b": 2}


# --- changes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> Path:
    with pytest.raises(Interrupted):
        train(recipe(data), tmp_path / "run", validators=[stop_at(2)])
    return tmp_path / "run"


def test_a_changed_recipe_goes_on_when_told_to_and_every_change_is_noted(
    data: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = recipe(data, clip=0.5, steps=8)
    with pytest.raises(RecipeError, match=r"stages\.tune\.clip"):
        train(other, stopped)
    train(other, stopped, allow_change=True)
    said = capfd.readouterr().err
    assert "goes on as it was told" in said and "stages.tune.clip: 1.0 there, 0.5 now" in said
    noted = read_jsonl(stopped / "changes.jsonl")
    assert noted[0]["stage"] is None and "stages.tune.steps: 6 there, 8 now" in noted[0]["changes"]
    assert (noted[1]["stage"], noted[1]["step"], noted[1]["what"]) == ("tune", 3, "the recipe changed")
    assert [row["step"] for row in rows(stopped)] == list(range(1, 9))
    train(other, stopped)  # it is the folder's recipe by now


def test_changed_data_go_on_when_told_to(stopped: Path, tmp_path: Path, data: Path) -> None:
    records = json.loads(data.read_text())[:-4]
    copy = data.with_name("toy-copy.json")
    original = data.read_text()
    try:
        data.write_text(json.dumps(records))
        with pytest.raises(DataError, match=r"the data changed.*--allow-change"):
            train(recipe(data), stopped)
        train(recipe(data), stopped, allow_change=True)
        with pytest.raises(DataError, match="the data changed"):  # what is done was done with both
            data.write_text(original)
            train(recipe(data), stopped)
        train(recipe(data), stopped, allow_change=True)
    finally:
        data.write_text(original)
        copy.unlink(missing_ok=True)
    noted = read_jsonl(stopped / "changes.jsonl")
    assert [row["what"] for row in noted] == [
        "the data changed",
        "the data changed, and the stage stays as it was done",
    ]
    assert len(rows(stopped)) == 6


def test_what_no_saved_weight_fits_is_refused_even_so(data: Path, stopped: Path) -> None:
    adapters = recipe(data, learn={**LEARN, "language": {"lr": 5e-3, "lora": {"rank": 2}}})
    with pytest.raises(DataError, match="does not fit this stage"):
        train(adapters, stopped, allow_change=True)


def test_the_command_line_goes_on_after_a_change_and_resumes_from_the_folder_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = recipe(Path(os.path.relpath(data, tmp_path))).model_dump(mode="json", exclude_none=True)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(short))
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "toy.yaml", "-o", "run", "stages.tune.save_every=2"]) == 0
    assert cli.run(["train", "toy.yaml", "-o", "run", "stages.tune.clip=0.3"]) == 2
    said = capsys.readouterr().err
    assert "stages.tune.clip" in said and "--allow-change" in said
    assert cli.run(["train", "toy.yaml", "-o", "run", "stages.tune.clip=0.3", "--allow-change"]) == 0
    capsys.readouterr()
    (tmp_path / "run/tune/done").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the recipe's data are found from where the command was given
    assert cli.run(["run", "resume", "../run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "run/model")
    assert Path.cwd() == tmp_path / "elsewhere"
    assert cli.run(["run", "resume", str(tmp_path)]) == 3
    assert "holds no training run" in capsys.readouterr().err


def test_track_on_the_command_line_is_checked_before_anything_is_done(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe(data).model_dump(mode="json", exclude_none=True)))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.run(["train", str(tmp_path / "toy.yaml"), "-o", str(tmp_path / "run"), "--track", "wandb"]) == 5
    assert "leveret[track]" in capsys.readouterr().err
    assert cli.run(["train", str(tmp_path / "toy.yaml"), "-o", str(tmp_path / "run"), "--track", "comet"]) == 2
    assert "track" in capsys.readouterr().err


def test_metrics_tell_speed_padding_waiting_and_memory(data: Path, tmp_path: Path) -> None:
    train(recipe(data, micro_batch=4), tmp_path)
    for row in read_jsonl(tmp_path / "tune/metrics.jsonl"):
        assert row["positions"] % 16 == 0 and row["positions"] >= row["tokens"] > 0
        assert 0 <= row["waiting"] <= row["seconds"] and row["memory"] > 2**20
        assert "sources" not in row, "there is one source"
