"""A run that was stopped, killed or hurt goes on as if nothing had happened, or says by name why it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_fakes
from leveret.model.vlm import VLM
from leveret.runs import DataError, EnvironmentFault, Interrupted, RecipeError, read_jsonl
from leveret.train import TrainRecipe, state, train
from leveret.train.stages import StageRecipe
from train_faults import killed

pytestmark = pytest.mark.resume

LEARN = {
    "connector": {"lr": 5e-3},
    "language": {"lr": 5e-3, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_fakes.toy_set(tmp_path_factory.mktemp("toy"), 20)


@pytest.fixture(scope="module")
def recipe(data: Path) -> TrainRecipe:
    """Dropout on, a short last batch, an epoch's end in the middle, states at odd steps."""
    return train_fakes.recipe(data, learn=LEARN, steps=8, batch=6, micro_batch=4, save_every=3, validate_every=2)


@pytest.fixture(scope="module")
def whole(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole")
    train(recipe, run, validators=[look])
    return run


def look(vlm: VLM, step: int) -> dict[str, Any]:
    return {"checked": step}


def told(run: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(run / "tune" / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in state.MEASURED} for row in rows]


def same(run: Path, whole: Path) -> bool:
    """Weights equal byte for byte; metrics and validations without gaps, repeats or other numbers."""
    weights = "model/model.safetensors"
    return (
        (run / weights).read_bytes() == (whole / weights).read_bytes()
        and told(run) == told(whole)
        and read_jsonl(run / "tune" / "validation.jsonl") == read_jsonl(whole / "tune" / "validation.jsonl")
    )


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("at", [2, 4, 6, 8])
def test_kill_9_between_steps_changes_nothing(recipe: TrainRecipe, whole: Path, tmp_path: Path, at: int) -> None:
    def look_and_die(vlm: VLM, step: int) -> dict[str, Any]:
        if step == at:
            die()
        return look(vlm, step)

    assert killed(lambda: train(recipe, tmp_path, validators=[look_and_die])) == signal.SIGKILL
    train(recipe, tmp_path, validators=[look])
    assert same(tmp_path, whole)


def test_sigterm_saves_and_the_same_call_goes_on(recipe: TrainRecipe, whole: Path, tmp_path: Path) -> None:
    def stop(vlm: VLM, step: int) -> dict[str, Any]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(vlm, step)

    with pytest.raises(Interrupted, match="step 5 of 8"):
        train(recipe, tmp_path, validators=[stop])
    assert Interrupted.exit_code == 4
    assert state.latest(tmp_path / "tune" / "state") == tmp_path / "tune" / "state" / "step-00000005"
    train(recipe, tmp_path, validators=[look])
    assert same(tmp_path, whole)


@pytest.fixture
def stopped(recipe: TrainRecipe, tmp_path: Path) -> Path:
    """A run that was stopped after three steps."""

    def stop(vlm: VLM, step: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", validators=[stop])
    return tmp_path / "run"


def changed(recipe: TrainRecipe, **stage: Any) -> TrainRecipe:
    return recipe.model_copy(update={"stages": {"tune": recipe.stages["tune"].model_copy(update=stage)}})


def test_what_moves_no_bit_may_change(recipe: TrainRecipe, whole: Path, stopped: Path) -> None:
    train(changed(recipe, save_every=1, bad_share=0.5), stopped, validators=[look])
    assert (stopped / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_a_field_that_came_since_stops_no_run(
    recipe: TrainRecipe,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A version that knows one more option goes on with what was begun without, where the option changes nothing."""
    from leveret.train import run as runs

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(one) for key, one in value.items() if key not in ("embeddings", "rslora", "clip")}
        return [without(one) for one in value] if isinstance(value, list) else value

    def stop(vlm: VLM, step: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    def older(plain: dict[str, Any]) -> Any:
        return without(now(plain))

    now = runs.binding
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(runs, "binding", older)
        train(recipe, tmp_path / "run", validators=[stop])
    assert "embeddings" not in (tmp_path / "run" / "recipe.yaml").read_text()
    lora = recipe.stages["tune"].learn["language"].lora
    assert lora is not None
    other = LEARN | {"language": {"lr": 5e-3, "lora": {**lora.model_dump(), "embeddings": True}}}
    with pytest.raises(RecipeError, match=r"learn\.language\.lora\.embeddings"):
        train(recipe.model_copy(update={"stages": {"tune": StageRecipe.model_validate(
            {**recipe.stages["tune"].model_dump(), "learn": other})}}), tmp_path / "run")  # fmt: skip
    train(recipe, tmp_path / "run", validators=[look])
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert "embeddings: false" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert not (tmp_path / "run" / "changes.jsonl").exists()


def test_another_recipe_is_refused_by_the_name_of_the_field(recipe: TrainRecipe, stopped: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.tune\.clip"):
        train(changed(recipe, clip=0.5), stopped)


def test_other_data_is_refused_also_when_the_stage_is_done(recipe: TrainRecipe, stopped: Path, data: Path) -> None:
    original = data.read_text()
    records = json.loads(original)
    records[0]["conversations"][1]["value"] = "a new answer"
    try:
        data.write_text(json.dumps(records))
        with pytest.raises(DataError, match="the data changed"):
            train(recipe, stopped)
        data.write_text(original)
        train(recipe, stopped)
        data.write_text(json.dumps(records))
        with pytest.raises(DataError, match="the data changed"):
            train(recipe, stopped)
    finally:
        data.write_text(original)


def test_another_tokenizer_is_refused(recipe: TrainRecipe, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leveret.train import run

    monkeypatch.setattr(run, "tokenizer_hash", lambda tokenizer: "another")
    with pytest.raises(RecipeError, match="the tokenizer changed"):
        train(recipe, stopped)


def test_a_damaged_state_is_named_and_the_one_before_is_used(
    recipe: TrainRecipe, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def look_and_die(vlm: VLM, step: int) -> dict[str, Any]:
        if step == 8:
            die()
        return look(vlm, step)

    assert killed(lambda: train(recipe, tmp_path, validators=[look_and_die])) == signal.SIGKILL
    saved = tmp_path / "tune" / "state"
    assert state.steps(saved) == [3, 6]
    flip(saved / "step-00000006" / "state.safetensors", -1)
    train(recipe, tmp_path, validators=[look])
    said = capfd.readouterr().err
    assert "step-00000006 is damaged: state.safetensors is not as it was written" in said
    assert "going on from step-00000003, the one before" in said
    assert same(tmp_path, whole)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_where_all_states_are_damaged_a_clear_error_says_so(recipe: TrainRecipe, stopped: Path) -> None:
    flip(stopped / "tune/state/step-00000003/state.safetensors", 50)
    with pytest.raises(DataError, match=r"step-00000003 is damaged.*no other to go on from: remove .*state"):
        train(recipe, stopped)


@given(st.data())
def test_no_change_of_a_state_s_files_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Torn, truncated, flipped, longer, emptied, missing, one more: all of it is seen."""
    folder = tmp_path_factory.mktemp("state")
    saved = state.save(folder, 1, {"weight.a": torch.arange(5.0)}, {"facts": {"data": "x"}})
    assert state.fault(saved) == "" and state.latest(folder) == saved
    file = saved / data.draw(st.sampled_from(["state.safetensors", "state.json", state.SUMS]))
    how = data.draw(st.sampled_from(["flip", "cut", "longer", "missing", "another"]))
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif how == "longer":
        content += b"\0"
    file.write_bytes(content)
    if how == "missing":
        file.unlink()
    elif how == "another":
        (saved / "state-2.safetensors").write_bytes(b"")
    assert state.fault(saved)
    with pytest.raises(DataError, match="damaged"):
        state.latest(folder)


def test_a_state_of_an_older_leveret_has_no_hashes_and_is_read(tmp_path: Path) -> None:
    saved = state.save(tmp_path, 1, {"weight.a": torch.arange(5.0)}, {"facts": {}})
    facts = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({key: value for key, value in facts.items() if key != "format"}))
    (saved / state.SUMS).unlink()
    assert state.latest(tmp_path) == saved


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_states_are_kept(recipe: TrainRecipe, tmp_path: Path, keep: int) -> None:
    kept = []

    def count(vlm: VLM, step: int) -> dict[str, Any]:
        kept.append(state.steps(tmp_path / "tune" / "state"))
        return {}

    train(changed(recipe, save_every=1, keep_last=keep, validate_every=1), tmp_path, validators=[count])
    assert kept[1:] == [list(range(max(1, step - keep), step)) for step in range(2, 9)]


def test_metrics_are_cut_back_to_the_state(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = state.Metrics(path, 2)
    log.log(step=3, loss=1.0)
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'


def test_randomness_differs_between_steps_ranks_and_stages() -> None:
    seeds = {state.random_seed(0, stage, step, rank) for stage in "ab" for step in range(50) for rank in range(4)}
    assert len(seeds) == 400
    torch.manual_seed(max(seeds))


RUN = """
import os, signal, sys
import train_fakes
from leveret.train import TrainRecipe, train

def look(vlm, step):
    for sign, wanted in (pair.split("@") for pair in sys.argv[3:]):
        if step == int(wanted):
            os.kill(os.getpid(), int(sign))
    return {"checked": step}

train(TrainRecipe.model_validate_json(open(sys.argv[1]).read()), sys.argv[2], validators=[look])
"""


def workers(mark: str) -> set[int]:
    """Worker processes of the runs that were started with `mark` in their environment."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"leveret.train.ranks" in entry.read_bytes() and mark in (entry.parent / "environ").read_text():
                found.add(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.slow
def test_a_lost_worker_fails_the_leader_and_a_lost_leader_ends_its_workers(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, mark = recipe.model_copy(update={"ranks": 2}), f"LEVERET_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("=", 1))

    def kill_worker(vlm: VLM, step: int) -> dict[str, Any]:
        if step == 2:
            (worker,) = workers(mark)
            os.kill(worker, signal.SIGKILL)
        return look(vlm, step)

    with pytest.raises(EnvironmentFault, match="worker process 1 was killed by signal 9"):
        train(two, tmp_path / "run", validators=[kill_worker])
    (tmp_path / "recipe.json").write_text(two.model_dump_json())
    command = [sys.executable, "-c", RUN, str(tmp_path / "recipe.json"), str(tmp_path / "killed"), "9@4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    for _ in range(100):
        if not workers(mark):
            break
        time.sleep(0.1)
    assert not workers(mark)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_moments_of_two_ranks_and_two_stages(data: Path, tmp_path: Path, seed: int) -> None:
    import random

    stages: dict[str, dict[str, Any]] = {"align": {"learn": {"connector": {"lr": 1e-2}}}, "tune": {"learn": LEARN}}
    common: dict[str, Any] = {"steps": 30, "batch": 6, "save_every": 2}
    recipe = train_fakes.recipe(data, stages={name: own | common for name, own in stages.items()})
    two = recipe.model_copy(update={"ranks": 2})
    train(two, tmp_path / "whole", validators=[look])
    (tmp_path / "recipe.json").write_text(two.model_dump_json())
    run, chance = tmp_path / "killed", random.Random(seed)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def steps() -> int:
        return sum(path.read_bytes().count(b"\n") for path in run.glob("*/metrics.jsonl"))

    for life in range(7):  # the last one is left alone: where a start takes long, most may be spent on starting
        command = [sys.executable, "-c", RUN, str(tmp_path / "recipe.json"), str(run)]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        for line in child.stderr:  # from the moment it teaches
            if re.match(r"stage \w+", line):
                break
        if life < 6:
            until = steps() + chance.choice((0, 1, 3, 7, 12))
            while steps() < until and child.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.5))
            child.kill()
        else:
            child.stderr.read()
        child.stderr.close()
        if child.wait() == 0:
            break
    assert child.returncode == 0
    assert same(run, tmp_path / "whole")
