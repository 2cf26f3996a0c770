"""Work that is left out changes nothing: rows nobody reads, and products that the causal mask takes away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leveret.model.attention import causal_blocks, lay, packs, trained_in_blocks, varlen
from leveret.model.rows import last_of, only_rows

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "head_dim": 8,
    "attn_implementation": "eager",
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": 3, "phi": 2, "phi3": 2, "gemma2": 3, "gemma3_text": 3, "qwen2": 3, "qwen3": 3, "granite": 3, "olmo2": 3,
    "stablelm": 3, "gpt_neox": 1, "cohere": 3, "qwen3_moe": 2, "mixtral": 2,
}  # fmt: skip
"""Family -> how many parts of its last layer run on some rows only. phi and phi3 spell one of the projections
otherwise, GPT-NeoX all of its attention; experts are left whole."""


def language(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **{**SMALL, **(EXPERTS if "mo" in family or "mix" in family else {}), **changes}
    )
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # so that no layer is nearly the identity
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def told(model: Any, inputs: Tensor, rows: Tensor, picked: bool, **options: Any) -> list[Tensor]:
    """Logits of `rows`, and the gradients of a function of them: of the inputs and of every parameter."""
    model.zero_grad(set_to_none=True)
    inputs = inputs.clone().requires_grad_(True)
    with only_rows(model, rows if picked else None):
        logits = model(inputs_embeds=inputs, use_cache=False, **options).logits
    logits = logits.squeeze(0) if picked else logits[rows]
    torch.logsumexp(logits, -1).square().sum().backward()
    return [logits.detach(), inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]


def alike(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_nobody_reads_are_left_out_and_nothing_else_changes(family: str) -> None:
    model = language(family)
    inputs = torch.randn(3, 20, 32)
    rows = torch.zeros(3, 20, dtype=torch.bool)
    rows[0, 12:15] = rows[1, 19] = rows[2, 0] = True
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, 16:] = 0
    assert len(last_of(model)) == FAMILIES[family]
    alike(told(model, inputs, rows, True, attention_mask=mask), told(model, inputs, rows, False, attention_mask=mask))
    with only_rows(model, rows):
        pass
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()), "hooks are left behind"


def test_layers_that_are_computed_again_are_left_whole() -> None:
    model = language("llama")
    inputs, rows = torch.randn(2, 12, 32), torch.zeros(2, 12, dtype=torch.bool)
    rows[:, -2:] = True
    plain = told(model, inputs, rows, True)
    model.gradient_checkpointing_enable()
    assert last_of(model) == []
    alike(told(model, inputs, rows, True), plain)


def test_no_row_and_every_row() -> None:
    model = language("llama")
    inputs = torch.randn(2, 5, 32)
    for rows in (torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)):
        with only_rows(model, rows):
            assert model(inputs_embeds=inputs, use_cache=False).logits.shape == (1, int(rows.sum()), 96)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 300), heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]), batch=st.integers(1, 3),
    scale=st.floats(0.05, 1.0),
)  # fmt: skip
def test_attention_in_blocks_is_causal_attention(length: int, heads: tuple[int, int], batch: int, scale: float) -> None:
    torch.manual_seed(length)
    many, few = heads
    made = [torch.randn(batch, n, length, 8, dtype=torch.float64, requires_grad=True) for n in (many, few, few)]
    out = causal_blocks(*made, scale)
    want = torch.nn.functional.scaled_dot_product_attention(*made, is_causal=True, scale=scale, enable_gqa=True)
    assert torch.allclose(out, want, atol=1e-12)
    to = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, made, to), torch.autograd.grad(want, made, to), strict=True):
        assert torch.allclose(a, b, atol=1e-5), "sums over blocks are kept in float32"


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "phi"])
@pytest.mark.parametrize("kind", ["whole", "padded behind", "padded before", "packed"])
def test_training_in_blocks_is_training(family: str, kind: str) -> None:
    model = language(family)
    inputs = torch.randn(2, 150, 32)
    options: dict[str, Tensor | None] = {"attention_mask": torch.ones(2, 150, dtype=torch.long)}
    rows = torch.rand(2, 150) < 0.3
    if kind == "padded behind":
        options["attention_mask"][1, 100:] = 0  # type: ignore[index]
        rows[1, 100:] = False
    elif kind == "padded before":
        options["attention_mask"][1, :40] = 0  # type: ignore[index]
        rows[1, :40] = False
    elif kind == "packed":
        place = torch.cat([torch.arange(70), torch.arange(80)]).expand(2, -1)
        options = {"attention_mask": None, "position_ids": place}
    plain = told(model, inputs, rows, True, **options)
    with trained_in_blocks(model) as so:
        assert so
        alike(told(model, inputs, rows, True, **options), plain)
    assert model.config._attn_implementation == "eager"


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4), heads=st.sampled_from([(4, 4), (4, 2)]))
@settings(max_examples=20)
def test_samples_of_a_packed_row_do_not_see_each_other(lengths: list[int], heads: tuple[int, int]) -> None:
    torch.manual_seed(sum(lengths))
    many, few = heads
    made = [torch.randn(1, n, sum(lengths), 8, dtype=torch.float64, requires_grad=True) for n in (many, few, few)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    out = causal_blocks(*made, 0.3, ends)
    apart = [[x[:, :, end - n : end] for x in made] for n, end in zip(lengths, ends, strict=True)]
    want = torch.cat([causal_blocks(*one, 0.3) for one in apart], 2)
    assert torch.equal(out, want)
    to = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, made, to), torch.autograd.grad(want, made, to), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "phi", "olmo2", "stablelm", "cohere"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_gives_what_its_samples_give(family: str, attention: str) -> None:
    model = language(family, attn_implementation=attention)
    inputs = torch.randn(1, 160, 32)
    lengths, begins = [70, 80], (0, 80, 160)
    positions, real = torch.zeros(1, 160, dtype=torch.long), torch.zeros(1, 160, dtype=torch.bool)
    for begin, length in zip(begins[:2], lengths, strict=True):
        positions[0, begin : begin + length] = torch.arange(length)
        real[0, begin : begin + length] = True
    rows = real & (torch.rand(1, 160) < 0.3)
    assert packs(model)
    for begin, length in zip(begins[:2], lengths, strict=True):
        alone, chosen = inputs[:, begin : begin + length], rows[:, begin : begin + length]
        want = told(model, alone, chosen, True, attention_mask=torch.ones(1, length, dtype=torch.long))
        only = torch.zeros_like(rows)
        only[:, begin : begin + length] = chosen
        with trained_in_blocks(model, packed=True):
            lay(begins)
            ones = torch.ones(1, 160, dtype=torch.long)
            found = told(model, inputs, only, True, attention_mask=ones, position_ids=positions)
        assert found[1][:, : begin].abs().max() == 0 if begin else True
        found[1] = found[1][:, begin : begin + length]
        alike(found, want)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt_oss", "gpt_neox"])
def test_families_with_windows_or_attention_of_their_own_do_not_pack(family: str) -> None:
    assert not packs(language(family))


def test_on_a_gpu_a_packed_row_goes_to_attention_for_lengths_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: a stand-in takes what torch's kernel takes, and computes it sample by sample."""
    asked: list[dict[str, Any]] = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, _: Tensor, *longest: int, **options: Any) -> Tensor:
        asked.append({"longest": longest, **options})
        pieces = []
        for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
            one = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
            options = {"is_causal": True, "scale": asked[-1]["scale"], "enable_gqa": asked[-1]["enable_gqa"]}
            pieces.append(torch.nn.functional.scaled_dot_product_attention(*one, **options)[0].transpose(0, 1))
        return torch.cat(pieces)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    made = [torch.randn(1, heads, 90, 8) for heads in (4, 2, 2)]
    found = varlen(*made, 0.25, (0, 40, 90))
    assert torch.allclose(found, causal_blocks(*made, 0.25, [40, 90]), atol=1e-6)
    assert asked == [{"longest": (50, 50), "scale": 0.25, "window_size": (-1, 0), "enable_gqa": True}]


@pytest.mark.parametrize(("family", "changes"), [("gemma2", {}), ("gpt_neox", {}), ("gpt_oss", {})])
def test_other_attention_stays_as_it_is(family: str, changes: dict[str, Any]) -> None:
    model = language(family, **changes)
    before = model.config._attn_implementation
    with trained_in_blocks(model) as so:
        assert not so
        assert model.config._attn_implementation == before
