"""Several processes give the answers of one engine, also when one of them is lost on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import leveret.generate.helpers as helpers_module
from fakes import tiny_vlm
from leveret.generate import Engine, Request
from leveret.generate.crew import Crew, _pack, _pack_answers, _unpack, _unpack_answers
from leveret.generate.helpers import Helpers
from leveret.model.checkpoint import load, save
from leveret.records import ImageRef, Prediction, Turn
from leveret.runs import DataError
from test_generate_engine import some_requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_vlm()
    with torch.no_grad():
        model.language.get_output_embeddings().weight[model.tokenizer.eos_token_id] *= 2
    return save(model, tmp_path_factory.mktemp("crew") / "model")


@pytest.fixture(scope="module")
def helpers() -> Iterator[Helpers]:
    with Helpers(2) as found:
        found.ready(helpers_module.START_FROM)
        yield found


def engine(folder: Path) -> Engine:
    return Engine(load(folder), precision="fp32")


def test_a_crew_answers_as_one_engine_does(folder: Path, helpers: Helpers) -> None:
    requests = some_requests(300, seed=1)
    requests += [replace(requests[0], max_new_tokens=1), requests[1]]  # names may repeat
    alone, seen = engine(folder).answer(requests), []
    together = Crew(engine(folder), folder, helpers).answer(requests, on_prediction=seen.append)
    assert together == alone
    assert sorted(p.question_id for p in seen) == sorted(r.question_id for r in requests)
    assert Crew(engine(folder), folder, helpers).answer([]) == []


def test_helpers_turn_to_another_model(folder: Path, helpers: Helpers, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        for weight in model.connector.parameters():
            weight.mul_(-1)
    other = save(model, tmp_path / "other")
    requests = some_requests(200, seed=2)
    for place in (other, folder):
        assert Crew(engine(place), place, helpers).answer(requests) == engine(place).answer(requests)


def test_a_fault_is_told_as_it_is_without_helpers_and_the_crew_goes_on(folder: Path, helpers: Helpers) -> None:
    requests = some_requests(200, seed=3)
    wrong = Request("the wrong one", (ImageRef("/nowhere.png"),), (Turn("user", "<image>\nwhat?"),))
    with pytest.raises(DataError, match="the wrong one"):
        Crew(engine(folder), folder, helpers).answer([*requests, wrong])
    assert Crew(engine(folder), folder, helpers).answer(requests) == engine(folder).answer(requests)


def test_a_caller_that_stops_leaves_helpers_that_answer_the_next_call(folder: Path, helpers: Helpers) -> None:
    requests = some_requests(200, seed=4)

    def stop(prediction: Prediction) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Crew(engine(folder), folder, helpers).answer(requests, on_prediction=stop)
    assert Crew(engine(folder), folder, helpers).answer(requests) == engine(folder).answer(requests)


def test_a_lost_helper_costs_no_answer(folder: Path, helpers: Helpers, capfd: pytest.CaptureFixture[str]) -> None:
    """The last that asks `helpers`: from here on there is one."""
    requests = some_requests(200, seed=5)
    one, other = helpers.ready(helpers_module.START_FROM)
    os.kill(one.process.pid, signal.SIGKILL)
    assert Crew(engine(folder), folder, helpers).answer(requests) == engine(folder).answer(requests)
    assert helpers.ready(1) == [other]
    assert "has ended; going on without it" in capfd.readouterr().err


def test_helpers_start_for_many_questions_and_end_with_their_owner(folder: Path) -> None:
    with Helpers(1) as mine:
        assert mine.ready(helpers_module.START_FROM - 1) == []
        (worker,) = mine.ready(helpers_module.START_FROM)
        assert worker.process.poll() is None
    assert worker.process.poll() is not None


def test_a_helper_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    import subprocess
    import sys

    owner = (
        "import time; from leveret.generate.helpers import Helpers, START_FROM; "
        "print(Helpers(1).ready(START_FROM)[0].process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        helper = int(process.stdout.readline())
        process.kill()
    until = time.monotonic() + 30
    while Path(f"/proc/{helper}").exists() and time.monotonic() < until:
        state = Path(f"/proc/{helper}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{helper}").exists()


def test_requests_and_answers_survive_the_way(folder: Path) -> None:
    requests = [*some_requests(20, seed=6), Request("c", (), (Turn("user", "?"),), choices=("a", "b"))]
    assert _unpack(_pack("model", requests)) == ("model", requests, None)
    assert _unpack(_pack("model", [], 10**9)) == ("model", [], 10**9)
    predictions = [Prediction("a", "é\n", {"x": 0.1 + 0.2}, {"tokens": 3, "finish": "stop"}), Prediction("b", "")]
    assert _unpack_answers(_pack_answers(predictions)) == predictions
