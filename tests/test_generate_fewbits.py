"""Models loaded in 8 and 4 bits, and where they are computed. bitsandbytes itself where it is installed (its CPU code
where there is no GPU), else a stand-in: what it is asked for, in torch's own arithmetic."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import leveret
from evaluate_fakes import tiny_world
from fakes import tiny_batch, tiny_vlm
from leveret.cli import run
from leveret.generate.model import Model
from leveret.model import checkpoint, fewbits, precision
from leveret.runs import EnvironmentFault, RecipeError
from leveret.train import quantised
from test_train_learning import Linear4bit, Params4bit

REAL = importlib.util.find_spec("bitsandbytes") is not None
DEVICE = "cuda" if REAL and torch.cuda.is_available() else "cpu"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    return checkpoint.save(tiny_vlm(), tmp_path / "model")


class Int8Params(torch.nn.Parameter):
    """A weight that is rounded to 255 numbers a row when it comes onto a device."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, has_fp16_weights: bool = True) -> Any:
        assert not has_fp16_weights
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.__dict__["SCB"] = None
        return made

    def to(self, *where: Any, **more: Any) -> Any:
        if self.SCB is None:
            self.SCB = self.data.float().abs().amax(1, keepdim=True)
            self.data = (self.data.float() / self.SCB * 127).round().to(torch.int8)
        return self


class Linear8bitLt(torch.nn.Linear):
    def __init__(self, inner: int, outer: int, bias: bool = True, **more: Any) -> None:
        assert more["has_fp16_weights"] is False
        super().__init__(inner, outer, bias, device=more["device"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.data.float() * self.weight.SCB / 127  # type: ignore[attr-defined]
        return torch.nn.functional.linear(x.float(), weight, self.bias).to(x.dtype)


class Four(Linear4bit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


@pytest.fixture
def allowed(load_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, computed on whatever this machine has."""
    monkeypatch.setattr(fewbits, "refuse", lambda *given: None)
    if DEVICE == "cpu":
        monkeypatch.setattr(fewbits, "native_bf16", lambda device: True)  # many a CPU has none, and then computes in 32
    if REAL and (DEVICE == "cuda" or load_in == "8bit"):  # its 4 bits on a CPU want layers of 64 and more
        return
    fake, inside = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.nn")
    fake.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    fake.__dict__["nn"] = inside
    inside.__dict__.update(Linear4bit=Four, Params4bit=Params4bit, Linear8bitLt=Linear8bitLt, Int8Params=Int8Params)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", inside)


def meant(layer: Any) -> torch.Tensor:
    """The weights that a layer's few bits stand for."""
    weight = layer.weight
    if isinstance(weight, Params4bit):
        return weight.data.float() * weight.quant_state
    if isinstance(weight, Int8Params):
        return weight.data.float() * weight.SCB / 127
    return quantised.plain(layer).weight.float()


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
@torch.no_grad()
def test_the_language_models_layers_stand_in_few_bits(
    load_in: str, folder: Path, allowed: None, tmp_path: Path
) -> None:
    whole, few = leveret.load(folder, DEVICE, precision="fp32"), leveret.load(folder, DEVICE, load_in=load_in)
    kinds = ("Params4bit", "Int8Params")
    rounded = [name for name, x in few.vlm.language.named_parameters() if type(x).__name__ in kinds]
    assert len(rounded) == 14 and all(".layers." in name for name in rounded)  # 7 in each of its two layers
    rest = [x for x in few.vlm.parameters() if type(x).__name__ not in kinds]
    assert {x.dtype for x in rest} == {few.vlm.dtype} and few.vlm.dtype in (torch.bfloat16, torch.float16)
    batch = tiny_batch(whole.vlm, lengths=(24,), images=(True,)).to(DEVICE)
    halves = replace(batch, pixels={name: pixels.to(few.vlm.dtype) for name, pixels in batch.pixels.items()})
    found = few.vlm(halves, logits="all").logits.float()
    before = whole.vlm(batch, logits="all").logits
    for name in rounded:
        own = whole.vlm.language.get_submodule(name.removesuffix(".weight"))
        own.weight.data = meant(few.vlm.language.get_submodule(name.removesuffix(".weight")))
    due = whole.vlm(batch, logits="all").logits
    assert (found - due).abs().mean() < 0.05 * due.abs().mean()  # what 16 bits round
    assert (found - due).abs().mean() < (before - due).abs().mean() or load_in == "8bit"
    with pytest.raises(ValueError, match="stands in few bits"):
        checkpoint.save(few.vlm, tmp_path / "again")


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_it_answers_and_is_examined(
    load_in: str, folder: Path, allowed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(tmp_path / "p.png")
    assert run(["chat", str(folder), picture, "-p", "What is it?", "--load-in", load_in, "--device", DEVICE]) == 0
    said, due = capsys.readouterr().out, leveret.load(folder, DEVICE, load_in=load_in).ask(picture, "What is it?", 256)
    printed = ["".join(sign for sign in text if sign.isascii() and sign.isalnum()) for text in (said, due)]
    assert printed[0] == printed[1] != ""
    world, out = tiny_world(tmp_path / "world", 2), tmp_path / "out"
    assert run(["eval", str(folder), str(world), "-o", str(out), "--json", "--load-in", load_in]) == 0
    few = json.loads((out / "results.json").read_text())["model"]
    capsys.readouterr()
    # answers of the whole model do not go into the same folder
    assert run(["eval", str(folder), str(world), "-o", str(out)]) == 2
    assert run(["eval", str(folder), str(world), "-o", str(tmp_path / "whole"), "--json"]) == 0
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["model"] != few


def test_where_it_cannot_be_it_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EnvironmentFault, match=r"4bit needs a GPU \(CUDA\), and this runs on cpu; leave it out"):
        leveret.load(folder, "cpu", load_in="4bit")
    with pytest.raises(RecipeError, match="--load-in 3bit: allowed are 8bit and 4bit"):
        leveret.load(folder, load_in="3bit")
    if not REAL:
        with pytest.raises(EnvironmentFault, match=r"needs bitsandbytes.*pip install 'leveret\[quant\]'"):
            leveret.load(folder, "cuda", load_in="8bit")
    if not torch.cuda.is_available():
        assert run(["chat", str(folder), "-p", "What?", "--load-in", "8bit"]) == 5
        assert "needs a GPU" in capsys.readouterr().err
    assert run(["chat", str(folder), "-p", "What?", "--load-in", "int8"]) == 2
    assert "allowed are 8bit and 4bit" in capsys.readouterr().err
    other = ["eval", "openai:http://127.0.0.1:9/v1#x", str(tmp_path), "-o", str(tmp_path / "o"), "--load-in", "8bit"]
    assert run(other) == 2
    assert "is not run by leveret itself" in capsys.readouterr().err


# --- where it is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "due"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_cuda_then_mps_then_the_cpu(cuda: bool, mps: bool, due: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert precision.pick_device("auto") == due
    assert precision.pick_device("cuda:1") == "cuda:1" and precision.pick_device("cpu") == "cpu"


def test_a_device_that_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.backends.mps.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        with pytest.raises(EnvironmentFault, match="device 'mps' cannot be used"):
            leveret.load(folder)
    assert run(["chat", str(folder), "-p", "What?", "--device", "gpu"]) == 5
    assert "device 'gpu' cannot be used" in capsys.readouterr().err


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="precision 'fp8': allowed are auto, bf16, fp32"):
        precision.resolve_precision("fp8", "cpu")
    assert precision.resolve_precision("auto", "mps") == "fp32" and precision.resolve_precision("bf16", "mps") == "bf16"
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, native=native: native)
        assert precision.resolve_precision("auto", "cuda") == ("bf16" if native else "fp32")
    assert isinstance(Model(tiny_vlm(), precision="fp32"), Model)
