"""A run that was stopped, killed or hurt goes on as if nothing had happened, or says by name why it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_fakes
from leveret.model.vlm import VLM
from leveret.runs import DataError, EnvironmentFault, Interrupted, RecipeError, read_jsonl
from leveret.train import TrainRecipe, state, train

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
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(run: Path, whole: Path) -> bool:
    """Weights equal byte for byte; metrics and validations without gaps, repeats or other numbers."""
    weights = "model/model.safetensors"
    return (
        (run / weights).read_bytes() == (whole / weights).read_bytes()
        and told(run) == told(whole)
        and read_jsonl(run / "tune" / "validation.jsonl") == read_jsonl(whole / "tune" / "validation.jsonl")
    )


def killed(work: Callable[[], Any]) -> int:
    """Run `work` in a child of this process; the signal it died of, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


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


def test_kill_9_at_any_moment_of_a_state_s_writing_leaves_one_to_go_on_from(
    recipe: TrainRecipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches the disk while the second state is written, in turn, is the last one of the process."""
    real = {name: getattr(state, name) for name in ("flush", "write_json", "sync_folder")}
    real |= {"rmtree": state.shutil.rmtree, "rename": Path.rename, "mkdir": Path.mkdir}
    moment = 0
    while True:
        moment += 1
        run = tmp_path / str(moment)

        def doomed(moment: int = moment, run: Path = run) -> None:
            saves, calls, save = [0], [0], state.save

            def counting(name: str) -> Callable[..., Any]:
                def call(*args: Any, **options: Any) -> Any:
                    if saves[0] == 2:
                        calls[0] += 1
                        if calls[0] == moment:
                            die()
                    return real[name](*args, **options)

                return call

            def saving(*args: Any) -> Any:
                saves[0] += 1
                done = save(*args)
                if saves[0] == 2:
                    die()
                return done

            for name in ("flush", "write_json", "sync_folder"):
                setattr(state, name, counting(name))
            state.shutil.rmtree = counting("rmtree")  # type: ignore[assignment]
            Path.rename = counting("rename")  # type: ignore[method-assign,assignment]
            Path.mkdir = counting("mkdir")  # type: ignore[method-assign,assignment]
            state.save = saving  # type: ignore[assignment]
            train(recipe, run, validators=[look])

        assert killed(doomed) == signal.SIGKILL
        left = state.latest(run / "tune" / "state")
        assert left is not None and state.load(left)[1]["step"] in (3, 6)
        if moment in (1, 3, 6):  # all are loadable; going on is shown for some
            train(recipe, run, validators=[look])
            assert same(run, whole)
        if left.name == "step-00000006" and not (run / "tune" / "state" / "step-00000003").exists():
            break  # the old state is gone: the write was over
    assert moment >= 6


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


def test_a_state_that_cannot_be_read_says_so(recipe: TrainRecipe, stopped: Path) -> None:
    saved = state.latest(stopped / "tune" / "state")
    assert saved is not None
    (saved / "state.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(DataError, match=r"cannot be read.*remove it"):
        train(recipe, stopped)


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
@pytest.mark.parametrize("seed", range(6))
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
    while True:
        command = [sys.executable, "-c", RUN, str(tmp_path / "recipe.json"), str(run)]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        for line in child.stderr:  # from the moment it teaches
            if re.match(r"stage \w+", line):
                break
        time.sleep(chance.uniform(0, 4))
        child.kill()
        child.stderr.close()
        if child.wait() == 0:
            break
    assert same(run, tmp_path / "whole")
