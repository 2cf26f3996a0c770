"""The order in which LLaVA, Bunny, TinyLLaVA and Prismatic visit samples, to the index."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from leveret.inputs.grouped import length_grouped, modality_grouped, split_modality

pytestmark = pytest.mark.parity

HERE = Path(__file__).resolve().parents[2] / "shared" / "parity"
PARITY = Path(os.environ.get("LEVERET_PARITY", HERE))


def cases(prismatic: bool) -> list[Any]:
    found = []
    for path in sorted(PARITY.glob("samplers*/*.json")):
        if ("prismatic" in path.name) == prismatic:
            for number, case in enumerate(json.loads(path.read_text("utf-8"))["cases"]):
                found.append(pytest.param(path.stem.rpartition("-")[2], case, id=f"{path.parent.name}-{path.stem}-{number}"))
    return found or [
        pytest.param("", {}, marks=pytest.mark.skip(f"no samplers in {PARITY}: set LEVERET_PARITY"), id="none")
    ]


@pytest.mark.parametrize(("system", "case"), cases(prismatic=False))
def test_length_and_modality_groups_of_the_llava_family(system: str, case: dict[str, Any]) -> None:
    sizes = (case["batch_size"], case["world_size"])
    for kind in ("modality_grouped", "length_grouped"):
        torch.manual_seed(case["global_seed"])
        given = torch.Generator().manual_seed(case["generator_seed"])
        wanted = case[kind]
        if kind == "length_grouped":
            assert length_grouped([abs(length) for length in case["lengths"]], *sizes, given) == wanted
        elif isinstance(wanted, dict):
            with pytest.raises(ValueError, match="one kind"):
                modality_grouped(case["lengths"], *sizes, batches=given, rest="first")
        else:
            rest = "first" if system == "tinyllava" else "last"
            assert modality_grouped(case["lengths"], *sizes, batches=given, rest=rest) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(("system", "case"), cases(prismatic=True))
def test_prismatics_split_by_modality(system: str, case: dict[str, Any]) -> None:
    lengths = [length if image else -length for image, length in case["modality_lengths"]]
    batch, ranks = case["global_batch_size"], case["num_replicas"]
    for name, wanted in case["indices"].items():
        epoch, rank = (int(word[len(kind) :]) for word, kind in zip(name.split("."), ("epoch", "rank"), strict=True))
        if isinstance(wanted, dict):
            with pytest.raises(ValueError, match="samples with images|evenly"):
                split_modality(lengths, batch, ranks, case["seed"], epoch)
            continue
        groups = split_modality(lengths, batch, ranks, case["seed"], epoch)
        share = batch // ranks
        assert [row for group in groups for row in group[rank * share : (rank + 1) * share]] == wanted
