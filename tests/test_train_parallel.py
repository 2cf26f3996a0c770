"""One, two or four processes, with the whole model each or a share of it, teach the same, and go on for each other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fakes
import train_fakes
from leveret.model import checkpoint
from leveret.model.recipe import ModelRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.runs import EnvironmentFault, Interrupted, RecipeError, read_jsonl
from leveret.train import TrainRecipe, loop, plan, train
from leveret.train.data import Prepared
from leveret.train.order import micro_batches, order_of
from leveret.train.ranks import Ranks
from leveret.train.sharing import Sharing, decide
from leveret.train.strategy import Sharded, even_pieces

ALL = {"vision": {"lr": 1e-3}, "connector": {"lr": 5e-3}, "language": {"lr": 5e-3}}
LORA = {"connector": {"lr": 5e-3}, "language": {"lr": 5e-3, "lora": {"rank": 3, "alpha": 8, "dropout": 0.2}}}


class Groups:
    """Groups of processes that outlive a training, so that they import torch once. One at a time: torch has one
    default group."""

    def __init__(self) -> None:
        self.made: dict[int, Ranks] = {}
        self.start = _Kept.lead

    def lead(self, world: int) -> Ranks:
        if world == 1:
            return Ranks()  # one that ends with its training
        there = self.made.get(world)
        if there is None or any(follower.poll() is not None for follower, _ in there._followers):
            self.close()  # a test whose worker died took its group along
            self.made[world] = self.start(world)
        return self.made[world]

    def close(self) -> None:
        while self.made:
            self.made.popitem()[1].close()


class _Kept(Ranks):
    def __exit__(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def _groups() -> Iterator[Groups]:
    groups = Groups()
    yield groups
    groups.close()


@pytest.fixture
def groups(_groups: Groups, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Trainings of this test take a group that may be there already."""
    monkeypatch.setattr(Ranks, "lead", _groups.lead)
    return _groups


def mixed_set(folder: Path) -> Path:
    """The toy set, in which most samples show no image: in many steps some rank has none."""
    path = train_fakes.toy_set(folder, 21)
    records = json.loads(path.read_text("utf-8"))
    for number, record in enumerate(records):
        if number % 4:
            del record["image"]
            record["conversations"][0]["value"] = "what colour is the " + "very " * (number % 5) + "big square ?"
    path.write_text(json.dumps(records), "utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_set(tmp_path_factory.mktemp("mixed"))


def way(recipe: TrainRecipe, ranks: int, kind: str = "ddp", **more: Any) -> TrainRecipe:
    return recipe.model_copy(
        update={"ranks": ranks, "parallel": recipe.parallel.model_copy(update={"kind": kind, **more})}
    )


def rows(run: Path, *names: str) -> list[Any]:
    told = read_jsonl(run / "tune" / "metrics.jsonl")
    return [[row[name] for name in names] for row in told]


def flat(run: Path, *names: str) -> list[Any]:
    return [value for row in rows(run, *names) for value in row]


def weights(run: Path) -> dict[str, Tensor]:
    return checkpoint.load(run / "model").state_dict()


def alike(run: Path, other: Path, rel: float = 1e-5) -> None:
    """The same batches, losses and gradients equal to rounding, and so the same model."""
    assert rows(run, "step", "samples", "tokens", "supervised") == rows(
        other, "step", "samples", "tokens", "supervised"
    )
    assert flat(run, "loss") == pytest.approx(flat(other, "loss"), rel=rel)
    assert flat(run, "grad_norm") == pytest.approx(flat(other, "grad_norm"), rel=10 * rel)
    mine, theirs = weights(run), weights(other)
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def recipe(data: Path) -> TrainRecipe:
    """Everything learns, clipped; several passes a step; the epoch's last batch is one row, so that ranks have none."""
    return train_fakes.recipe(
        data, learn=ALL, steps=6, batch=5, micro_batch=2, clip=0.5, weight_decay=0.1, save_every=2
    )


@pytest.fixture(scope="module")
def one(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    run = tmp_path_factory.mktemp("one")
    train(recipe, run)
    return run


@given(st.integers(1, 40), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 12)))
def test_ranks_split_every_global_batch_and_make_as_many_passes(count: int, world: int, size: int | None) -> None:
    batch = list(range(100, 100 + count))
    shares = [even_pieces(batch, rank, world, size) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for piece in share for row in piece) == batch
    assert all(len(piece) <= size for share in shares for piece in share if size)
    for rank, share in enumerate(shares):
        assert [piece for piece in share if len(piece)] == list(micro_batches(batch, rank, world, size))


def test_the_toy_run_has_ranks_without_images_and_without_rows(recipe: TrainRecipe, one: Path, tmp_path: Path) -> None:
    """What the tests below stand on."""
    stage = recipe.stages["tune"]
    stop_after(recipe, tmp_path, 1)
    data = Prepared(tmp_path / "tune" / "cache")
    order = order_of(data, stage, "tune", 0)
    shown, shares = (data.image_offsets[1:] > data.image_offsets[:-1]), []
    for step in range(order.per_epoch):
        shares += [even_pieces(order.rows(step), rank, 2, stage.micro_batch) for rank in range(2)]
    assert any(not len(piece) for share in shares for piece in share)
    assert any(len(piece) and not any(shown[row] for row in piece) for share in shares for piece in share)
    assert any(shown[row] for share in shares for piece in share for row in piece)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_teach_what_one_teaches(
    groups: Groups, recipe: TrainRecipe, one: Path, tmp_path: Path, kind: str
) -> None:
    train(way(recipe, 2, kind), tmp_path)
    alike(tmp_path, one)


def stop_after(recipe: TrainRecipe, run: Path, step: int) -> None:
    """A run that is stopped after `step` steps."""

    def stop(vlm: VLM, at: int) -> dict[str, Any]:
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    stage = recipe.stages["tune"].model_copy(update={"validate_every": 1, "save_every": 100})
    with pytest.raises(Interrupted, match=f"after step {step + 1} "):
        train(recipe.model_copy(update={"stages": {"tune": stage}}), run, validators=[stop])


@pytest.fixture(scope="module")
def stopped(_groups: Groups, recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two ranks that were stopped after three of six steps, by kind."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "lead", _groups.lead)
        for kind in ("ddp", "fsdp"):
            found[kind] = tmp_path_factory.mktemp(kind)
            stop_after(way(recipe, 2, kind), found[kind], 2)
    return found


@pytest.mark.parametrize(("saved", "ranks", "kind"), [("ddp", 1, "ddp"), ("ddp", 2, "fsdp"), ("fsdp", 2, "ddp")])
def test_a_state_fits_other_ranks_and_the_other_way(
    groups: Groups, recipe: TrainRecipe, one: Path, stopped: dict[str, Path], tmp_path: Path, saved: str, ranks: int,
    kind: str, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = Path(shutil.copytree(stopped[saved], tmp_path / "run"))
    train(way(recipe, ranks, kind), run)
    alike(run, one)
    told = read_jsonl(run / "tune" / "metrics.jsonl")
    assert [row["step"] for row in told if "resumed" in row] == [4]
    assert told[3]["resumed"]["from"] == Sharing(saved, 2).words(2)
    assert "equal up to rounding and dropout's draws" in " ".join(capfd.readouterr().err.split())


def test_shares_go_on_bit_for_bit_where_they_stopped_dropout_on(groups: Groups, data: Path, tmp_path: Path) -> None:
    """Adapters of rank 3 leave ranks shares of other sizes; base weights and tower are frozen, and shared too."""
    recipe = way(train_fakes.recipe(data, learn=LORA, steps=5, batch=5, cache_features=False), 2, "fsdp")
    train(recipe, tmp_path / "whole")
    stop_after(recipe, tmp_path / "cut", 2)
    train(recipe, tmp_path / "cut")
    for file in ("model/model.safetensors", "tune/adapter/adapter_model.safetensors", "tune/adapter/rest.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert flat(tmp_path / "cut", "loss") == flat(tmp_path / "whole", "loss")
    assert not any("resumed" in row for row in read_jsonl(tmp_path / "cut" / "tune" / "metrics.jsonl"))


def test_adapters_and_frozen_shares_teach_what_one_rank_teaches(groups: Groups, data: Path, tmp_path: Path) -> None:
    language = {"lr": 5e-3, "lora": {"rank": 3, "alpha": 8}}
    recipe = train_fakes.recipe(data, learn={"connector": {"lr": 5e-3}, "language": language}, batch=5, steps=5)
    train(recipe, tmp_path / "one")
    train(way(recipe, 2, "fsdp", reshard=False), tmp_path / "two")
    alike(tmp_path / "two", tmp_path / "one")


def test_a_stage_follows_a_stage_and_a_connector_alone_learns(groups: Groups, data: Path, tmp_path: Path) -> None:
    stages: dict[str, dict[str, Any]] = {
        "align": {"learn": {"connector": {"lr": 1e-2}}, "steps": 3, "cache_features": False},
        "tune": {"learn": {"vision": {"lr": 1e-3, "from_layer": 1}, "language": {"lr": 5e-3}}, "steps": 3},
    }
    recipe = train_fakes.recipe(data, stages=stages)
    train(recipe, tmp_path / "one")
    train(way(recipe, 2, "fsdp"), tmp_path / "two")
    alike(tmp_path / "two", tmp_path / "one")


def test_what_a_stage_starts_from_and_does_not_teach_is_in_its_model(
    groups: Groups, recipe: TrainRecipe, one: Path, data: Path, tmp_path: Path
) -> None:
    """Rank 0 makes the model once more to save it: with what was laid over it, frozen parts too."""
    told = train_fakes.recipe(data, learn={"connector": {"lr": 1e-2}}, steps=2).model_dump(mode="json")
    told["start"] = {"from": str(one / "model"), "parts": ["vision", "language"]}
    train(way(TrainRecipe.model_validate(told), 2, "fsdp"), tmp_path / "two")
    taught, found = weights(one), weights(tmp_path / "two")
    frozen = [name for name in taught if not name.startswith("connector.")]
    assert frozen and all(torch.equal(found[name], taught[name]) for name in frozen)


def composed(what: str) -> ModelRecipe:
    """The tiny model with parts that are put together otherwise."""
    plain = fakes.tiny_recipe(connector={"towers": "resampler", "ldp": "ldp"}.get(what, "mlp2x_gelu"))
    tower = plain.vision.tower
    vision: dict[str, Any] = {
        "s2": {"tower": tower, "s2": [32, 64]},
        "tiles": {"tower": tower, "tiles": {}},
        "towers": {"towers": [{"tower": tower, "name": "one"}, {"tower": tower, "name": "two"}]},
    }
    return plain.model_copy(update={"vision": VisionRecipe.model_validate(vision[what])} if what in vision else {})


@pytest.mark.parametrize(
    "what", ["towers", *(pytest.param(what, marks=pytest.mark.slow) for what in ("s2", "tiles", "ldp"))]
)
def test_every_composition_can_be_shared(groups: Groups, data: Path, tmp_path: Path, what: str) -> None:
    """A tower that sees twice in one pass, a newline of its own, several towers, connectors of several modules."""
    recipe = train_fakes.recipe(data, learn=ALL, steps=4, batch=5, micro_batch=2, max_tokens=256)
    recipe = recipe.model_copy(update={"model": composed(what)})
    train(recipe, tmp_path / "one")
    train(way(recipe, 2, "fsdp"), tmp_path / "two")
    alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("how", [{"pack": True}, {"recompute": True}])
def test_how_a_pass_is_computed_goes_with_shares(
    groups: Groups, data: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    recipe = train_fakes.recipe(data, learn=ALL, steps=4, batch=5, micro_batch=2, **how)
    train(recipe, tmp_path / "one")
    train(way(recipe, 2, "fsdp"), tmp_path / "two")
    alike(tmp_path / "two", tmp_path / "one")


def test_a_look_at_shares_sees_the_whole_model(groups: Groups, recipe: TrainRecipe, tmp_path: Path) -> None:
    seen: dict[tuple[str, int], float] = {}

    def look(name: str) -> Any:
        def validator(vlm: VLM, step: int) -> dict[str, Any]:
            with torch.no_grad():
                seen[name, step] = float(vlm.language(input_ids=torch.arange(5, 25)[None]).logits.abs().mean())
            assert not vlm.training
            return {}

        return validator

    stage = recipe.stages["tune"].model_copy(update={"validate_every": 2, "steps": 4})
    shorter = recipe.model_copy(update={"stages": {"tune": stage}})
    train(shorter, tmp_path / "one", validators=[look("one")])
    train(way(shorter, 2, "fsdp"), tmp_path / "two", validators=[look("two")])
    assert [seen["two", step] for step in (2, 4)] == pytest.approx([seen["one", step] for step in (2, 4)], rel=1e-4)
    alike(tmp_path / "two", tmp_path / "one")


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    groups: Groups, recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, passes = loop.begin, iter(range(1000))

    def poisoned(*args: Any) -> VLM:
        vlm = begin(*args)
        forward = vlm.forward

        def bad(*args: Any, **options: Any) -> Any:
            out = forward(*args, **options)
            return type(out)(out.loss_sum * float("nan"), out.supervised, out.logits) if next(passes) == 2 else out

        vlm.forward = bad  # type: ignore[method-assign]
        return vlm

    monkeypatch.setattr(loop, "begin", poisoned)
    train(way(recipe, 2, "fsdp"), tmp_path)
    told = read_jsonl(tmp_path / "tune" / "metrics.jsonl")
    assert [row["step"] for row in told if "skipped" in row] == [2] and told[1]["loss"] is None
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_a_worker_that_is_killed_while_it_holds_a_share_is_named(
    groups: Groups, recipe: TrainRecipe, tmp_path: Path
) -> None:
    def kill(vlm: VLM, step: int) -> dict[str, Any]:
        worker = groups.made[2]._followers[0][0]
        os.kill(worker.pid, signal.SIGKILL)
        return {}

    stage = recipe.stages["tune"].model_copy(update={"validate_every": 2})
    killing = way(recipe.model_copy(update={"stages": {"tune": stage}}), 2, "fsdp")
    with pytest.raises(EnvironmentFault, match="worker process 1 was killed by signal 9"):
        train(killing, tmp_path, validators=[kill])
    groups.close()


def test_what_gpus_compute_in_runs_on_a_cpu_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: Groups
) -> None:
    """Weights gathered in bfloat16 beside frozen ones held in it, on a group of one: near autocast's losses."""
    groups.close()
    recipe = train_fakes.recipe(data, learn=LORA, steps=3, batch=5, precision="bf16", cache_features=False)
    train(recipe, tmp_path / "auto")
    arrange, gpu = loop.arrange, "cuda"
    monkeypatch.setattr(loop, "arrange", lambda *args: arrange(*args[:4], gpu, args[5]))
    monkeypatch.setattr(loop, "Sharded", lambda *args: Sharded(*args[:-1], half=True))
    monkeypatch.setattr(plan, "decide", lambda *args: Sharing("fsdp", 1))
    train(recipe, tmp_path / "half")
    assert flat(tmp_path / "half", "loss") == pytest.approx(flat(tmp_path / "auto", "loss"), rel=0.03)
    said = {value.dtype for value in weights(tmp_path / "half").values()}
    assert said == {torch.float32, torch.bfloat16}, "what is frozen was held in bfloat16"


# Four processes: a machine of two cores needs longer to start them than for all that two of them show.


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shard"), [("ddp", "all"), ("fsdp", "all"), ("fsdp", 2)])
def test_four_ranks_teach_what_one_teaches(
    groups: Groups, recipe: TrainRecipe, one: Path, tmp_path: Path, kind: str, shard: int | str
) -> None:
    train(way(recipe, 4, kind, shard=shard), tmp_path)
    alike(tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "kind", "shard"), [("ddp", "fsdp", 2), ("fsdp", "fsdp", "all"), ("fsdp", "ddp", "all")]
)
def test_a_state_of_two_ranks_fits_four(
    stopped: dict[str, Path], groups: Groups, recipe: TrainRecipe, one: Path, tmp_path: Path, saved: str, kind: str,
    shard: int | str,
) -> None:  # fmt: skip
    run = Path(shutil.copytree(stopped[saved], tmp_path / "run"))
    train(way(recipe, 4, kind, shard=shard), run)
    alike(run, one)


def plain(**parallel: Any) -> TrainRecipe:
    recipe = train_fakes.recipe(Path("none.json"))
    return way(recipe, 1, **{"kind": "auto", **parallel})


def test_how_ranks_hold_the_model_is_decided_by_the_recipe_and_the_room() -> None:
    assert not decide(plain(), 8, "cpu", 100, 10).sharded
    assert not decide(plain(), 8, "cuda:0", 79, 100).sharded
    assert decide(plain(), 8, "cuda:0", 81, 100) == Sharing("fsdp", 8)
    assert not decide(plain(kind="ddp"), 8, "cuda:0", 1000, 10).sharded
    assert decide(plain(kind="fsdp", shard=2, reshard=False), 4, "cpu") == Sharing("fsdp", 2, reshard=False)
    assert not decide(plain(kind="fsdp"), 1, "cuda:0").sharded
    assert decide(plain(kind="fsdp", offload=True), 1, "cuda:0") == Sharing("fsdp", 1, offload=True)
    assert not decide(plain(kind="fsdp", offload=True), 2, "cpu").offload
    with pytest.raises(RecipeError, match=r"parallel\.shard: 3 ranks.*4 ranks.*divisor of 4"):
        decide(plain(kind="fsdp", shard=3), 4, "cpu")


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from leveret.train.ranks import resolve

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve(2, "cuda:0") == 2
    with pytest.raises(EnvironmentFault, match=r"ranks is 3.*2 are here; set ranks=2"):
        resolve(3, "cuda:0")


def test_a_dry_run_counts_a_share_of_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from leveret.cli import run

    def told(*words: str) -> dict[str, Any]:
        command = ["train", "bunny/v1.0-3b", "--dry-run", "--json", "-o", str(tmp_path / "run"), *words]
        assert run(command) == 0
        return json.loads(capsys.readouterr().out)["stages"]["align"]

    whole, shared = told("ranks=4"), told("ranks=4", "parallel.kind=fsdp")
    assert whole["memory"]["gathered"] == 0 < shared["memory"]["gathered"] < whole["memory"]["weights"]
    for name in ("weights", "gradients", "optimiser"):
        assert shared["memory"][name] == pytest.approx(whole["memory"][name] / 4, abs=1)
    assert shared["memory"]["activations"] == whole["memory"]["activations"]
    two = told("ranks=4", "parallel.kind=fsdp", "parallel.shard=2")
    assert two["memory"]["weights"] == pytest.approx(whole["memory"]["weights"] / 2, abs=1)
    away = told("ranks=4", "parallel.kind=fsdp", "parallel.offload=true")
    assert away["memory"]["weights"] == 0 < away["memory"]["host"] and "of the host's memory" in away["notes"]["memory"]
    assert "4 rank(s) that share one copy" in away["notes"]["ranks"]
    assert run(["train", "bunny/v1.0-3b", "--dry-run", "ranks=4", "parallel.kind=fsdp", "parallel.shard=3"]) == 2
    assert "parallel.shard: 3 ranks" in capsys.readouterr().err
    assert run(["train", "bunny/v1.0-3b", "--dry-run", "parallel.kind=fsd"]) == 2
    assert "parallel.kind" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_torchrun_stops_when_it_is_told_to_and_goes_on(recipe: TrainRecipe, tmp_path: Path, kind: str) -> None:
    """Through the command, as on a cluster: SIGTERM to torchrun saves a state, the same command goes on."""
    plain = recipe.model_dump(mode="json", exclude={"ranks"})
    plain["stages"]["tune"]["steps"] = 40
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain), "utf-8")
    words = ["train", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run"), f"parallel.kind={kind}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["-m", "leveret.cli", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    metrics = tmp_path / "run" / "tune" / "metrics.jsonl"
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not (metrics.exists() and len(read_jsonl(metrics)) >= 3):
        time.sleep(0.01)
    child.terminate()
    said = child.communicate()[1]
    assert "which is saved" in said, said
    steps = len(read_jsonl(metrics))
    assert 3 <= steps < 40
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"going on from step-{steps:08d}" in done.stderr, done.stderr
    assert [row["step"] for row in read_jsonl(metrics)] == list(range(1, 41))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
