"""The tiny backbones: pre-training continues to the bit, the shipped weights are what the card says and small."""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes import world_tokenizer
from leveret.runs import sha256_of
from leveret.world import reading, vision
from leveret.world.draw import PALETTE, rgb
from leveret.world.pretrain import pretrain, rate_at
from leveret.world.scenes import COLOURS, HELD_OUT, SHAPES, Scene, Thing, stream

WEIGHTS = Path(str(files("leveret") / "world" / "weights"))


def quiet(*_: Any, **__: Any) -> None:
    pass


def test_a_stopped_pretraining_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path, stops: list[int | None]) -> dict[str, torch.Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))

            def loss_of(step: int, net: torch.nn.Module = net) -> tuple[torch.Tensor, dict[str, float]]:
                x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
                return (net(x).squeeze(1) - x.sum(1)).square().mean(), {}

            pretrain({"net": net}, loss_of, steps=20, rate=1e-2, clip=1.0, warmup=2, folder=folder, log=quiet,
                     save_every=5, stop_after=stop)  # fmt: skip
        return net.state_dict()

    whole, stopped = run(tmp_path / "a", [None]), run(tmp_path / "b", [7, 12, None])
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_the_rate_rises_holds_and_falls() -> None:
    rates = [rate_at(step, 100, 10) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[9] == 1.0 and rates[60] == 1.0
    assert rates[-1] < 0.05 and all(a >= b for a, b in pairwise(rates[70:]))


def test_a_training_row_is_a_whole_conversation_and_pure() -> None:
    writer = reading.Writer(world_tokenizer())
    for step in (0, 5600, 6600, 11900):
        row = writer.training_row(stream(0, "rows", step), step)
        again = writer.training_row(stream(0, "rows", step), step)
        if not row["ids"]:
            continue  # a hinted row about a scene of one thing: no relation to ask, and no weight
        assert row["ids"] == again["ids"] and len(row["ids"]) == len(row["weights"])
        assert row["ids"][0] == writer.user and row["ids"][-1] == writer.end
        assert max(row["weights"]) == reading.FIRST


def test_compound_scenes_come_short_and_as_wide_as_a_tower_and_empty_rows_weigh_nothing() -> None:
    writer = reading.Writer(world_tokenizer())
    sizes = {writer.training_batch(stream(0, "wide", i), 9000)["words"].shape[1] for i in range(24)}
    assert sizes == set(reading.SLOTS)
    assert {writer.training_batch(stream(0, "wide", i), 0)["words"].shape[1] for i in range(24)} == {16}
    scene = reading.sample_scene(stream(0, "empty", 0))
    row = writer.row(scene, None, [])
    assert row["ids"] == [] and row["weights"] == [] and not row["compound"]
    batch = writer.batch([row, writer.row(scene, None, [("a", "b")])])
    assert batch["weights"][0].sum() == 0 < batch["weights"][1].sum()


def test_hints_stand_at_the_words_that_name_the_things() -> None:
    writer = reading.Writer(world_tokenizer())
    seen = 0
    for index in range(200):
        row = writer.training_row(stream(0, "hints", index), 8000)
        for at, numbers in row["hinted"]:
            piece = writer.tokenizer.decode([row["ids"][at]])
            assert piece.strip() in SHAPES and len(numbers) == 4
            seen += 1
    assert seen > 20


def test_the_towers_nameless_things_keep_away_from_held_out_pairs() -> None:
    """It is shown colours and shapes that have no name, but nothing that comes near a pair it must not know."""
    things = [thing for i in range(1500) for thing in vision.seen_scene(stream(0, "seen", i)).things]
    mixed = [thing for thing in things if thing.colour not in COLOURS]
    odd = [thing for thing in things if thing.shape not in SHAPES]
    assert 0.1 < len(mixed) / len(things) < 0.3 and 0.04 < len(odd) / len(things) < 0.14
    assert all(thing.shape in SHAPES for thing in mixed) and all(thing.colour in COLOURS for thing in odd)
    for thing in mixed:
        away = {name: np.abs(np.subtract(rgb(thing.colour), PALETTE[name])) for name in COLOURS}
        nearest = min(away, key=lambda name: float((away[name] ** 2).sum()))
        assert (nearest, thing.shape) not in HELD_OUT and (away[nearest] ** 2).sum() > vision.APART**2
    assert not HELD_OUT & {(thing.colour, thing.shape) for thing in things}


def test_the_dense_targets_of_what_has_no_name() -> None:
    """A polygon has a colour and a box but is no shape to be counted; a mixed colour is no answer."""
    things = (Thing("nameless-7", "red", 2, 2, 18, 18), Thing("ring", "#102030", 34, 34, 50, 50))
    (targets,), loose = vision.dense_targets([Scene(64, 64, things, None, 1)])
    (polygon,), (ring,) = (np.flatnonzero(targets[:, column] >= 0) for column in (0, 1))
    assert targets[polygon, :3].tolist() == [COLOURS.index("red"), -1, -1]
    assert targets[ring, :3].tolist() == [-1, SHAPES.index("ring"), -1] and not loose
    assert targets[polygon, 3:7].tolist() == [1, 1, 9, 9] and targets[ring, 7:10].tolist() == [16, 32, 48]
    cover = targets[ring, 10:].reshape(vision.LOOK, vision.LOOK)
    assert cover[0, 0] == 0 and cover[4, 4] < 30 and cover[0, 4] > 100
    assert not np.array_equal(targets[polygon, 10:], targets[ring, 10:])
    assert vision.loose_caption(Scene(64, 64, things[:1], None, 1), stream(0, "c", 0)) == "a red object"


def test_shipped_weights_are_those_of_the_card_and_under_four_megabytes() -> None:
    card = json.loads((WEIGHTS / "card.json").read_text())
    for name, facts in card["files"].items():
        assert sha256_of(WEIGHTS / name) == facts["sha256"], name
    # the other towers and language models have cards of their own: test_world_towers.py, test_world_languages.py
    apart = [WEIGHTS / "towers", WEIGHTS / "languages"]
    shipped = [path for path in WEIGHTS.rglob("*") if path.is_file() and not set(apart) & set(path.parents)]
    assert sum(path.stat().st_size for path in shipped) < 4_000_000
    assert {path.relative_to(WEIGHTS).as_posix() for path in shipped} - set(card["files"]) == {"CARD.md", "card.json"}
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in shipped)


@pytest.mark.slow
def test_backbones_train_from_nothing_and_write_a_card(tmp_path: Path) -> None:
    from leveret.world.backbones import build, shipped

    few = {"vision": 6, "scorer": 6, "language": 6, "supervised": 3, "language-small-base": 2}
    folder = build(tmp_path / "out", steps=few, only=tuple(few))
    card = json.loads((folder / "card.json").read_text())
    assert {path.relative_to(folder).as_posix() for path in shipped(folder)} == set(card["files"])
    assert "grounded" in (folder / "CARD.md").read_text()
    towers = json.loads((folder / "towers" / "card.json").read_text())
    assert set(towers["files"]) == {"supervised.safetensors"} and "supervised" not in card["steps"]
    assert "**supervised** (3 steps of 64 pictures)" in (folder / "towers" / "CARD.md").read_text()
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".safetensors", ".md", ".json")}
    assert build(tmp_path / "out", steps=few, only=tuple(few)) == folder
    assert all(path.read_bytes() == data for path, data in first.items() if path.name != "environment.json")
