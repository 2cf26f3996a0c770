"""Answering keeps to a bound of memory that is told beforehand, and gives the same answers under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluate_fakes import tiny_world
from fakes import tiny_vlm
from leveret.generate import Engine
from leveret.generate.memory import free_of
from leveret.model.checkpoint import save
from leveret.model.vlm import VLM
from leveret.runs import RecipeError
from test_generate_engine import some_requests


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_vlm()


def engine(vlm: VLM, **options: int) -> Engine:
    return Engine(vlm, precision="fp32", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", [800_000, 1_200_000, 2_000_000, 50_000_000])
def test_what_is_held_is_what_was_planned(vlm: VLM, memory: int) -> None:
    requests = some_requests(40, seed=41, pictures=20)
    bound = engine(vlm, memory=memory)
    assert bound.answer(requests) == engine(vlm).answer(requests)
    plan, slots = bound.plan, bound.slots
    assert plan is not None and plan.total <= memory
    assert slots.cache.kv is not None
    assert slots.cache.kv.nbytes == plan.rows and slots.cache.kv.shape[2] == plan.slots == slots.size
    assert slots.cache.kv.shape[4] == plan.positions
    assert slots.prefixes.most <= plan.prefixes and bound.eyes.shelf.most <= plan.features


def test_less_memory_means_fewer_slots(vlm: VLM) -> None:
    requests = some_requests(80, seed=42)
    found = []
    for memory in (800_000, 1_000_000, 2_000_000, None):
        one = engine(vlm) if memory is None else engine(vlm, memory=memory)
        one.answer(requests)
        assert one.plan is not None
        found.append(one.plan.slots)
    assert found == sorted(found) and found[0] < found[-1] == 64


def test_too_little_is_refused_with_what_is_enough(vlm: VLM) -> None:
    requests = some_requests(8, seed=43)
    one = engine(vlm, memory=1000)
    with pytest.raises(
        RecipeError, match=r"the memory allowed is 1,000 bytes, and one answer .* allow at least"
    ) as told:
        one.answer(requests)
    one.memory = int(float(str(told.value).rpartition("at least ")[2].removesuffix("MB").replace(",", "")) * 1e6)
    assert one.answer(requests) == engine(vlm).answer(requests)


def test_another_call_has_a_plan_of_its_own(vlm: VLM) -> None:
    long, short = some_requests(6, seed=44), some_requests(3, seed=45)
    one = engine(vlm, memory=2_000_000)
    for requests in (long, short, long):
        assert one.answer(requests) == engine(vlm).answer(requests)
        assert one.plan is not None and one.plan.slots == len(requests)


def test_the_command_tells_what_it_held(vlm: VLM, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from leveret.cli import app

    world, folder = tiny_world(tmp_path / "world", scenes=3), save(vlm, tmp_path / "model")
    asked = ["eval", str(folder), str(world), "--suite", "colour", "--workers", "1", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*asked, "--memory", "3MB"])
    assert done.exit_code == 0, done.output
    assert "answers at once of" in done.output
    refused = CliRunner().invoke(app, [*asked[:-1], str(tmp_path / "b"), "--memory", "1KB"])
    assert isinstance(refused.exception, RecipeError) and "allow at least" in str(refused.exception)


def test_what_is_free_counts_kept_files_and_keeps_to_a_container(tmp_path: Path) -> None:
    info, group = tmp_path / "meminfo", tmp_path / "group"
    assert free_of(info, group, 77) == 77  # a system that tells neither
    info.write_text("MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:  60 kB\n")
    assert free_of(info, group, 1024) == 60 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert free_of(info, group, 1024) == 60 * 1024
    (group / "memory.max").write_text("50000\n")
    (group / "memory.current").write_text("30000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 5000\n")
    assert free_of(info, group, 1024) == 25_000
    (group / "memory.current").write_text("90000\n")
    assert free_of(info, group, 1024) == 0
