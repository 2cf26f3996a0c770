"""2N steps are N, kill -9, N, bit for bit; a disk that fails at any call leaves a run that goes on to the same bits."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fakes
import train_fakes
from leveret.model import checkpoint
from leveret.runs import EnvironmentFault, read_jsonl
from leveret.train import TrainRecipe, loop, lora, state, train
from leveret.train.learning import ready
from train_faults import BROKEN, FULL, Act, Disk, dies, killed, watched

pytestmark = pytest.mark.resume

LEARN = {
    "vision": {"lr": 1e-3},
    "connector": {"lr": 5e-3},
    "language": {"lr": 5e-3, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}},
}
"""All that draws random numbers or holds moments: a trained tower, adapters with dropout; the connector's own below."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    """An epoch's end and a short batch in the middle; states, validations and a best model at odd steps."""
    folder = tmp_path_factory.mktemp("toy")
    data, held = train_fakes.toy_set(folder / "learn", 20), train_fakes.toy_set(folder / "held", 5)
    made = train_fakes.recipe(
        data, learn=LEARN, steps=8, batch=6, micro_batch=4, save_every=3, validate_every=2,
        held_out={"data": str(held), "answers": 2, "max_answer": 4}, keep_best={"metric": "loss"}, pack=True,
    )  # fmt: skip
    connector = made.model.connector.model_copy(update={"dropout": 0.1})
    return made.model_copy(update={"model": made.model.model_copy(update={"connector": connector})})


@dataclass
class Whole:
    """The run that nothing disturbed, and every call by which it wrote."""

    run: Path
    calls: list[tuple[str, str]]


@pytest.fixture(scope="module")
def whole(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run = tmp_path_factory.mktemp("runs") / "whole"
    with watched(Disk(run)) as disk:
        taught(recipe, run)
    return Whole(run, disk.calls)


def taught(recipe: TrainRecipe, run: Path) -> None:
    """Train, and keep the hashes of all states (weights and moments) beside the run, which forgets them."""
    save = state.save

    def kept(folder: Path, step: int, tensors: Any, facts: Any) -> Path:
        made = save(folder, step, tensors, facts)
        with open(run.with_name(f"{run.name}.{step}"), "w") as file:
            file.write((made / state.SUMS).read_text().split()[0])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save", kept)
        train(recipe, run)


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in state.MEASURED}
        for row in read_jsonl(run / "tune" / name)
    ]


def assert_same(run: Path, whole: Path) -> None:
    for weights in ("model", "tune/model", "tune/best/model"):
        file = f"{weights}/model.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes(), weights
    for file in ("adapter_model.safetensors", "rest.safetensors", "adapter_config.json"):
        assert (run / "tune/adapter" / file).read_bytes() == (whole / "tune/adapter" / file).read_bytes()
    for name in ("metrics.jsonl", "validation.jsonl", "samples.jsonl"):
        assert rows(run, name) == rows(whole, name), name
    assert (run / "tune/done").read_text() == (whole / "tune/done").read_text()
    last = [Path(f"{one}.8").read_text() for one in (run, whole)]
    assert last[0] == last[1], "weights or moments of the last state differ"
    left = {path.relative_to(run) for path in run.rglob("*") if not path.name.endswith("lock")}
    there = {path.relative_to(whole) for path in whole.rglob("*") if not path.name.endswith("lock")}
    assert left == there, "an interrupted run leaves the same files"


def interrupted(recipe: TrainRecipe, run: Path, at: int) -> None:
    """Kill the run at its call number `at`."""

    def doomed() -> None:
        with watched(Disk(run, at, dies)):
            taught(recipe, run)

    assert killed(doomed) == signal.SIGKILL


def writing(whole: Whole, step: int) -> list[int]:
    """Numbers of the calls that write the state of a step."""
    name = f"-{step:08d}"
    found = [number for number, (_, path) in enumerate(whole.calls, 1) if "/state/" in path and name in path]
    assert len(found) > 8
    return found


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
def test_killed_at_any_moment_the_run_ends_with_the_same_bits(
    recipe: TrainRecipe, whole: Whole, tmp_path: Path, seed: int
) -> None:
    """A moment drawn from the whole run; every third time from the writing of a state."""
    chance = random.Random(seed)
    moments = range(1, len(whole.calls) + 1) if seed % 3 else writing(whole, chance.choice([2, 3, 4, 6, 8]))
    run = tmp_path / "run"
    interrupted(recipe, run, chance.choice(moments))
    taught(recipe, run)
    assert_same(run, whole.run)


def test_killed_between_two_steps_the_run_goes_on_from_the_state_before(
    recipe: TrainRecipe, whole: Whole, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step = loop.Teacher._one

    def doomed() -> None:
        def one(self: loop.Teacher, batches: Any) -> dict[str, Any]:
            if self.step == 5:
                dies("")
            return step(self, batches)

        loop.Teacher._one = one  # type: ignore[method-assign]
        taught(recipe, tmp_path / "run")

    assert killed(doomed) == signal.SIGKILL
    assert state.steps(tmp_path / "run/tune/state") == [3, 4]
    taught(recipe, tmp_path / "run")
    assert "going on from step-00000004" in capfd.readouterr().err
    assert_same(tmp_path / "run", whole.run)


def failing(recipe: TrainRecipe, whole: Whole, run: Path, at: int, act: Act) -> bool:
    """Let the disk fail at one call; the run ends with a clear error, or does without the call. Then it is mended."""
    with watched(Disk(run, at, act)) as disk:
        try:
            taught(recipe, run)
            failed = False
        except EnvironmentFault as error:
            failed = True
            assert "the disk failed" in str(error) and "run the same command again" in str(error)
    assert disk.hit
    saved = run / "tune" / "state"
    if saved.exists():
        assert not any(state.fault(one) for one in saved.glob("step-*")), "what was committed is sound"
    taught(recipe, run)
    assert_same(run, whole.run)
    return failed


@pytest.mark.parametrize("act", [FULL, pytest.param(BROKEN, marks=pytest.mark.slow)], ids=["full", "broken"])
def test_a_disk_that_fails_while_a_run_writes_stops_it_with_a_clear_error(
    recipe: TrainRecipe, whole: Whole, tmp_path: Path, act: Act
) -> None:
    """Some calls spread over the whole run; `test_each_kind_..` tries one of every kind."""
    count = len(whole.calls)
    chosen = [int((part + (0.25 if act is FULL else 0.75)) * count / 4) + 1 for part in range(4)]
    assert any([failing(recipe, whole, tmp_path / str(at), at, act) for at in chosen])


@pytest.mark.slow
@pytest.mark.parametrize("act", [FULL, BROKEN], ids=["full", "broken"])
def test_each_kind_of_write_of_a_whole_run_may_fail(
    recipe: TrainRecipe, whole: Whole, tmp_path: Path, act: Act
) -> None:
    """The last call of every kind: what is called, on which file; of states and steps one stands for all."""
    kinds = {(what, re.sub(r"[0-9a-f]{8}|\d+", "#", path)): at for at, (what, path) in enumerate(whole.calls, 1)}
    chosen = sorted(kinds.values())[act is BROKEN :: 2]  # each is full or broken, in turn
    failed = [failing(recipe, whole, tmp_path / str(at), at, act) for at in chosen]
    # The rest are flushes of folders, which some file systems refuse, and links, which a copy stands in for: a fifth,
    # a little more or less by which kinds fall to whom.
    assert sum(failed) > 0.75 * len(failed)


def tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"weight.a": torch.randn(40, 3), "exp_avg.a": torch.randn(40, 3).bfloat16(), "empty": torch.zeros(0)}


def each_call(folder: Path, work: Callable[[], Any], check: Callable[[], None], act: Act) -> int:
    """Do `work` again and again with `act` at its first call, its second and so on; `check` after each. The count."""
    for at in range(1, 1000):
        disk = Disk(folder, at, act)
        if act is dies:

            def doomed(disk: Disk = disk) -> None:
                with watched(disk):
                    work()

            hit = killed(doomed) == signal.SIGKILL
        else:
            with watched(disk):
                try:
                    work()
                except OSError:
                    assert disk.hit
            hit = disk.hit
        if not hit:
            return at - 1
        check()
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    "act", [FULL, BROKEN, pytest.param(dies, marks=pytest.mark.slow)], ids=["full", "broken", "kill -9"]
)
def test_whatever_call_of_a_state_s_writing_fails_one_can_be_loaded(tmp_path: Path, act: Act) -> None:
    old, new = tensors(0), tensors(1)
    state.save(tmp_path, 3, old, {"facts": {}})

    def work() -> None:
        state.save(tmp_path, 6, new, {"facts": {}})
        state.prune(tmp_path, [6])

    def check() -> None:
        found = state.latest(tmp_path)
        assert found is not None
        weights, facts = state.load(found)
        expected = {3: old, 6: new}[facts["step"]]
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        state.save(tmp_path, 3, old, {"facts": {}})
        state.prune(tmp_path, [3])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003"], "nothing is left behind"

    assert each_call(tmp_path, work, check, act) >= 12


@pytest.mark.parametrize(
    "act", [FULL, BROKEN, pytest.param(dies, marks=pytest.mark.slow)], ids=["full", "broken", "kill -9"]
)
def test_whatever_call_of_a_model_s_writing_fails_the_old_one_stays(tmp_path: Path, act: Act) -> None:
    vlm = fakes.tiny_vlm()
    folder = tmp_path / "at" / "model"
    checkpoint.save(vlm, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def check() -> None:
        if not folder.exists():  # killed between two renames, the old one stands aside
            assert act is dies
            (aside,) = folder.parent.glob(".model.*.old")
            aside.rename(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        if act is not dies:
            assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing is left behind"

    assert each_call(tmp_path, lambda: checkpoint.save(vlm, folder), check, act) >= 15


@pytest.mark.parametrize("act", [FULL, BROKEN], ids=["full", "broken"])
def test_whatever_call_of_adapters_writing_fails_no_file_is_torn(recipe: TrainRecipe, tmp_path: Path, act: Act) -> None:
    stage = recipe.stages["tune"]
    vlm = fakes.tiny_vlm()
    ready(vlm, stage, seed=0)
    how = stage.learn["language"].lora
    assert how is not None

    def work() -> None:
        lora.save(vlm.language, how, tmp_path, "base", "CAUSAL_LM")

    work()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def check() -> None:
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files

    assert each_call(tmp_path, work, check, act) >= 9


def test_a_file_that_grows_past_what_the_system_allows_is_a_fault_of_the_disk(
    recipe: TrainRecipe, tmp_path: Path
) -> None:
    """The system's own fault, not one that is played: no file of this process may be longer than 64 KiB."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(EnvironmentFault, match="file too large"):
            train(recipe, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    train(recipe, tmp_path / "run")
