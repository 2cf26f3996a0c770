"""Every row of the table of connectors: token counts before building, learning, saving, and what is refused."""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fakes import SIGLIP, loud, tiny_batch, tiny_recipe, tiny_vlm
from leveret.model import published
from leveret.model.build import build, build_meta, check
from leveret.model.checkpoint import load, save
from leveret.model.connectors import CONNECTORS, build_connector, connector_tokens, find_connector, settle
from leveret.model.parts import learnable
from leveret.model.recipe import ConnectorRecipe, ModelRecipe, VisionRecipe
from leveret.model.resampler import PaperResampler
from leveret.runs import DataError, RecipeError

KINDS = [*CONNECTORS, "mlp1x_gelu", "mlp4x_gelu"]
SMALL: dict[str, dict[str, Any]] = {
    "resampler": {"queries": 3, "layers": 2, "heads": 2, "head_width": 4},
    "resampler_paper": {"queries": 3, "layers": 2, "width": 12, "heads": 2},
    "qformer": {"queries": 3, "layers": 3, "width": 12, "heads": 2, "hidden": 20},
}
"""Settings that make a large kind small."""


def made(kind: str, tokens: int = 16, width: int = 6, hidden: int = 8, **options: Any) -> nn.Module:
    """A fresh connector, the same every time; one that leaves the width as it is gets equal ones."""
    torch.manual_seed(0)
    hidden = width if find_connector(kind).plain else hidden
    return build_connector(kind, width, hidden, tokens, {**SMALL.get(kind, {}), **options})


def sizes(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    small = st.integers(1, 4)
    if kind in SMALL:
        return st.fixed_dictionaries({"queries": st.integers(1, 9), "layers": st.integers(1, 2)})
    fields = {name: small for name in ("pool", "group", "factor") if name in find_connector(kind).settings.model_fields}
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_tokens_are_known_before_building(kind: str, data: st.DataObject) -> None:
    """Whatever is accepted comes out as said; whatever is refused is refused before and while building."""
    side = data.draw(st.integers(1, 8))
    tokens = data.draw(st.sampled_from([side * side, side * side, side]))
    width, hidden = 2 * data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    options = data.draw(sizes(kind))
    try:
        out = connector_tokens(kind, tokens, {**SMALL.get(kind, {}), **options})
    except RecipeError as refused:
        assert "model.connector" in str(refused) and any(str(given) in str(refused) for given in (tokens, side))
        with pytest.raises(RecipeError):
            made(kind, tokens, width, hidden, **options)
        return
    connector = made(kind, tokens, width, hidden, **options).eval()
    images = data.draw(st.integers(1, 3))
    input = torch.randn(images, tokens, width)
    output = connector(input)
    assert output.shape == (images, out, width if find_connector(kind).plain else hidden)
    assert output.isfinite().all()
    assume(images > 1)  # an image's tokens do not depend on the batch
    torch.testing.assert_close(connector(input[1:2])[0], output[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind: str, autocast: bool) -> None:
    connector = made(kind).train()
    input = torch.randn(2, 16, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = connector(input)
        # not the plain sum: behind a LayerNorm that is the same whatever comes in
        loss = (output.float() * torch.randn(output.shape)).sum()
    loss.backward()
    assert output.isfinite().all() and input.grad is not None and input.grad.isfinite().all() and input.grad.any()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # a key's bias shifts all scores of a query alike; residual_2d's MLP begins at nothing, so what feeds it waits
        if not name.endswith("key.bias") and not (kind == "residual_2d" and name.startswith("up.")):
            assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_in_bf16(kind: str) -> None:
    connector = made(kind).to(torch.bfloat16).eval()
    output = connector(torch.randn(2, 16, 6, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@cache
def wide_tower() -> Path:
    """A tower as wide as the tiny language model, for the kinds that leave the width as it is."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    wide_tower.keep = tempfile.TemporaryDirectory(prefix="leveret-wide-")  # type: ignore[attr-defined]
    folder = Path(wide_tower.keep.name)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    loud(SiglipVisionModel(SiglipVisionConfig(**{**SIGLIP, "hidden_size": 32}))).save_pretrained(folder)
    return folder


def recipe_with(kind: str) -> ModelRecipe:
    recipe = tiny_recipe()
    vision = VisionRecipe(tower=str(wide_tower())) if find_connector(kind).plain else recipe.vision
    connector = ConnectorRecipe(kind=kind, options=SMALL.get(kind, {}))
    return recipe.model_copy(update={"vision": vision, "connector": connector})


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_it_learns_answers_and_comes_back(kind: str, tmp_path: Path) -> None:
    vlm = build(recipe_with(kind))
    assert vlm.spec.tokens == connector_tokens(kind, 4, SMALL.get(kind, {}))
    batch = tiny_batch(vlm, (16, 14))
    vlm(batch).loss_sum.backward()
    learns = {name for name, parameter in vlm.connector.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in vlm.connector.named_parameters()}
    if learns:
        assert len(list(learnable(vlm, "connector"))) == len(learns)
    meta = build_meta(recipe_with(kind))
    assert meta.spec == vlm.spec
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in vlm.parameters())
    left = tiny_batch(vlm, (16, 14), side="left")
    assert torch.equal(
        vlm.generate(left, max_new_tokens=2, do_sample=False)[:, 0], vlm(left, logits="last").logits.argmax(-1)
    )
    for dtype in (torch.float32, torch.bfloat16):
        vlm.cast(dtype)
        back = load(save(vlm, tmp_path / "model"))
        assert back.recipe == vlm.recipe and back.spec == vlm.spec
        mine, theirs = vlm.connector.state_dict(), back.connector.state_dict()
        assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
        with torch.no_grad():
            assert torch.equal(back(batch).logits, vlm(batch).logits)


def test_what_is_saved_says_every_setting(tmp_path: Path) -> None:
    """So that a model stays itself when a default changes; and configs from before there were settings still load."""
    vlm = build(recipe_with("resampler"))
    file = save(vlm, tmp_path / "model") / "config.json"
    said = json.loads(file.read_text())["recipe"]["connector"]
    assert said["options"] == {"queries": 3, "layers": 2, "heads": 2, "head_width": 4, "times": 4}
    plain = tiny_vlm()
    file = save(plain, tmp_path / "old") / "config.json"
    config = json.loads(file.read_text())
    assert config["recipe"]["connector"].pop("options") == {}
    file.write_text(json.dumps(config))
    assert load(tmp_path / "old").recipe == plain.recipe


def test_carried_layers_are_stored_but_do_not_learn() -> None:
    every = {f"linear_{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    for kind, idle in {"spp": {0, 1, 2}, "spp_v1": {0}, "spp_v2": {0}, "spp_v3": set()}.items():
        connector = made(kind)
        assert set(connector.state_dict()) == every
        learn = {name for name, _ in connector.named_parameters()}
        assert learn == {name for name in every if int(name[7]) not in idle}


# --- arithmetic that no parity folder holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_is_transformers(factor: int) -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    connector = made("pixel_shuffle", tokens=36, factor=factor)
    input = torch.randn(2, 36, 6)
    theirs = Idefics3Connector.pixel_shuffle(None, input, factor)  # type: ignore[arg-type]
    torch.testing.assert_close(connector(input), theirs @ connector.proj.weight.T)  # type: ignore[union-attr]
    assert list(connector.state_dict()) == ["proj.weight"], "nanoVLM's MP.proj.weight"


def test_the_papers_resampler_step_by_step() -> None:
    """Against its formula written out: scaled queries, scores, softmax, both residuals, norms before each."""
    connector = made("resampler_paper")
    assert isinstance(connector, PaperResampler)
    input = torch.randn(2, 16, 6)
    queries = connector.queries.expand(2, -1, -1)
    for block in connector.resampler_blocks:
        part: Any = block
        image = part.norm_image(input)
        q, k, v = part.to_q(part.norm_hidden(queries)), part.to_k(image), part.to_v(image)
        seen = []
        for head in range(2):
            place = slice(6 * head, 6 * head + 6)
            scores = torch.einsum("bid,bjd->bij", q[..., place] / 6**0.5, k[..., place])
            seen.append(scores.softmax(-1) @ v[..., place])
        queries = part.to_out(torch.cat(seen, -1)) + queries
        norm, up, gelu, down = part.feed_forward
        queries = down(gelu(up(norm(queries)))) + queries
    torch.testing.assert_close(connector(input), connector.final_proj(connector.post_norm(queries)))


def test_neighbours_of_a_grid() -> None:
    """Which tokens meet: an average of four ones and zeros tells."""
    input = torch.zeros(1, 16, 2)
    input[0, [0, 1, 4, 5]] = 1.0  # the square at the top left of 4 x 4
    connector = made("spp_v2", width=2, hidden=2)
    with torch.no_grad():
        for layer in (connector.linear_1, connector.linear_2):
            layer.weight.copy_(torch.eye(2))  # type: ignore[union-attr, operator]
            layer.bias.zero_()  # type: ignore[union-attr, operator]
        assert connector(input)[0, :, 0].tolist() == [1.0, 0.0, 0.0, 0.0]


def parameters(kind: str, in_width: int, out_width: int, tokens: int = 576, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_connector(kind, in_width, out_width, tokens, options).parameters())


@pytest.mark.parametrize(
    ("kind", "in_width", "out_width", "published_count"),
    [
        ("linear", 1024, 2048, 2_099_200),
        ("linear", 1152, 2560, 2_951_680),
        ("linear", 1024, 4096, 4.20e6),
        ("mlp2x_gelu", 1024, 2048, 6_295_552),
        ("mlp2x_gelu", 1152, 896, 1_836_800),
        ("mlp2x_gelu", 1152, 2560, 9_507_840),
        ("mlp2x_gelu", 1024, 5120, 31.47e6),
        ("mlp2x_gelu", 2176, 896, 2.75e6),
        ("fused-gelu-mlp", 2176, 4096, 71.39e6),
        ("fused-gelu-mlp", 2176, 5120, 89.74e6),
        ("fused-gelu-mlp", 2048, 4096, 67.13e6),
        ("fused-gelu-mlp", 2176, 896, 27.55e6),
        ("resampler", 1024, 2048, 115.6e6),
        ("resampler", 1152, 2560, 176.3e6),
        ("resampler_paper", 1024, 2048, 24.1e6),
        ("resampler_paper", 1152, 2560, 25.1e6),
        ("qformer", 1024, 2048, 103e6),
        ("qformer", 1152, 2560, 105e6),
        ("mof_mlp", 2048, 2048, 2 * 6_295_552),
    ],
)
def test_parameter_counts_are_the_published_ones(
    kind: str, in_width: int, out_width: int, published_count: float
) -> None:
    """At the defaults, as TinyLLaVA, Prismatic and their papers state them, to the digits they state."""
    count = parameters(kind, in_width, out_width)
    digits = len(f"{published_count:.0f}".rstrip("0"))
    assert float(f"{count:.{digits - 1}e}") == published_count


@pytest.mark.parametrize(
    ("kind", "tokens", "out"),
    [
        ("ldp", 729, 196),
        ("ldp", 576, 144),
        ("spp_v1", 729, 169),
        ("spp_v3", 576, 144),
        ("minigpt", 576, 144),
        ("resampler", 729, 128),
        ("qformer", 728, 128),
        ("mof_mlp", 256, 512),
        ("pixel_shuffle", 196, 49),
        ("spp", 729, 729),
    ],
)
def test_token_counts_are_the_published_ones(kind: str, tokens: int, out: int) -> None:
    assert connector_tokens(kind, tokens) == out


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tokens", "options", "words"),
    [
        ("pixel_shuffle", 729, {}, "pixel_shuffle needs a grid with a side that 2 divides, but the tower's is 27"),
        ("pixel_shuffle", 728, {}, "pixel_shuffle needs a square grid of tokens, but the tower gives 728"),
        ("spp_v1", 728, {}, "spp_v1 needs a square grid of tokens, but the tower gives 728; choose mlp2x_gelu"),
        ("spp_v1", 9, {"pool": 4}, "options.pool: 4 is more than the side of the grid of 9 tokens"),
        ("ldp", 257, {}, "ldp needs a square grid"),
        ("residual_2d", 15, {}, "residual_2d needs a square grid"),
        ("minigpt", 729, {}, "minigpt needs a number of tokens that 4 divides, but the tower's is 729"),
        ("vanilla", 6, {"group": 4}, "vanilla needs a number of tokens that 4 divides"),
        ("resampler", 9, {"querys": 4}, r"options\.querys: not a setting of resampler\. .*did you mean queries"),
        ("resampler", 9, {"queries": 0}, r"options\.queries: .*greater than or equal to 1.*queries \(default 128\)"),
        ("resampler_paper", 9, {"width": 64}, "heads must divide width, but 12 does not divide 64"),
        ("linear", 9, {"queries": 4}, "not a setting of linear. Settings of linear: none"),
        ("mlp0x_gelu", 9, {}, "'mlp0x_gelu' is not known. Allowed: linear, .*mlpNx_gelu with any N"),
        ("qfromer", 9, {}, "did you mean 'qformer'"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, tokens: int, options: dict[str, Any], words: str) -> None:
    for call in (
        lambda: connector_tokens(kind, tokens, options),
        lambda: build_connector(kind, 8, 8, tokens, options),
    ):
        with pytest.raises(RecipeError, match=words):
            call()


def test_widths_that_do_not_fit() -> None:
    for kind in ("identity", "spp"):
        with pytest.raises(RecipeError, match=f"{kind} needs equal widths, but the tower's is 6 and .* model's 8"):
            build_connector(kind, 6, 8, 4)
    with pytest.raises(RecipeError, match=r"options\.first: set the first tower's width, for 7 has no half"):
        build_connector("mof_mlp", 7, 8, 4)
    with pytest.raises(RecipeError, match="9 leaves nothing of 8"):
        build_connector("mof_mlp", 8, 8, 4, {"first": 9})
    assert build_connector("mof_mlp", 7, 8, 4, {"first": 3})(torch.randn(1, 4, 7)).shape == (1, 8, 8)


def test_every_fault_of_the_settings_is_told_with_the_recipes_others() -> None:
    recipe = tiny_recipe(chat="buny").model_copy(
        update={"connector": ConnectorRecipe(kind="qformer", options={"layers": "many", "depth": 3})}
    )
    with pytest.raises(RecipeError) as caught:
        check(recipe)
    for words in ("options.layers: ", "options.depth: not a setting", "model.chat"):
        assert words in str(caught.value)


def test_settings_are_settled_once() -> None:
    recipe = settle(ConnectorRecipe(kind="pixel_shuffle", options={"factor": 3}))
    assert recipe.options == {"factor": 3, "bias": False} and settle(recipe) == recipe
    assert settle(ConnectorRecipe(dropout=0.5)) == ConnectorRecipe(dropout=0.5)


# --- other systems' names ---------------------------------------------------------------------------------------------


def test_connectors_by_other_systems_names() -> None:
    def llava(kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
        recipe = published.of_llava({"mm_projector_type": kind, **more})
        return recipe.kind, recipe.options

    assert llava("mlp5x_gelu") == ("mlp5x_gelu", {})
    assert [llava(kind)[0] for kind in ("spp", "sppv1", "spp_v2_avg", "spp-v3")] == [
        "spp",
        "spp_v1",
        "spp_v2",
        "spp_v3",
    ]
    assert llava("resampler", num_queries=9) == ("resampler_paper", {"width": 768, "heads": 12, "queries": 9})
    assert llava("resampler", resampler_hidden_size=512)[1]["heads"] == 8
    specifiers = ("linear", "gelu-mlp", "no-align+fused-gelu-mlp", "full-align+gelu-mlp")
    assert [published.of_prismatic(s).kind for s in specifiers] == [
        "linear", "mlp2x_gelu", "fused-gelu-mlp", "mlp2x_gelu",
    ]  # fmt: skip
    factory = published.of_factory({"connector_type": "qformer", "num_queries": 5})
    assert factory == ConnectorRecipe(kind="qformer", options={"queries": 5})
    for wrong in (
        lambda: published.of_llava({"mm_projector_type": "honeybee"}),
        lambda: published.of_llava({}),
        lambda: published.of_factory({"connector_type": "resampler2"}),
        lambda: published.of_prismatic("align+mlp"),
    ):
        with pytest.raises(DataError, match=r"is not known\. Allowed: .*linear"):
            wrong()


def test_the_qformers_published_names() -> None:
    connector = made("qformer")
    theirs = published.write_state("qformer", connector.state_dict(), "connector._connector.", positions=64)
    assert "connector._connector.bert.encoder.layer.0.crossattention.self.key.weight" in theirs
    assert "connector._connector.bert.encoder.layer.1.attention.self.query.bias" in theirs
    assert "connector._connector.bert.encoder.layer.1.crossattention.self.key.weight" not in theirs
    assert theirs["connector._connector.bert.embeddings.position_ids"].shape == (1, 64)
    assert published.read_state(theirs).keys() == connector.state_dict().keys()
    assert published.read_state({"language_model.lm_head.weight": torch.zeros(1)}) == {}


# --- what the page says -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "connectors.md").read_text("utf-8")


def test_the_page_names_every_row_and_setting() -> None:
    said: dict[str, set[str]] = {}
    for line in PAGE.splitlines():
        cells = [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[0]:
            said |= {kind: set(cells[2]) for kind in cells[0]}
    assert said.pop("mlpNx_gelu") == set()
    assert said == {kind: set(row.settings.model_fields) for kind, row in CONNECTORS.items()}


def test_the_pages_own_connector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a setting of its own; test_own_parts.py teaches it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my.py").write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(connector="my.py:CONNECTOR")
    recipe.connector.options["eps"] = 0.5
    vlm = build(recipe)
    assert vlm.spec.tokens == 4 and vlm.connector[0].eps == 0.5  # type: ignore[index]
    assert vlm(tiny_batch(vlm)).loss_sum.isfinite()
    recipe.connector.options["epsilon"] = 0.5
    with pytest.raises(RecipeError, match=r"not a setting of my\.py:CONNECTOR.*did you mean eps"):
        build(recipe)


def test_parts_that_do_not_fit_are_refused_before_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from leveret.model import language, towers

    for module, name in ((towers, "load_tower"), (language, "load_language")):
        monkeypatch.setattr(module, name, lambda facts: pytest.fail("weights were fetched"))
    for kind, options in (("identity", {}), ("pixel_shuffle", {"factor": 3}), ("spp_v1", {"pool": 3})):
        connector = ConnectorRecipe(kind=kind, options=options)
        with pytest.raises(RecipeError, match=r"model\.connector"):
            build(tiny_recipe().model_copy(update={"connector": connector}))


def test_settings_in_a_recipe_file(tmp_path: Path) -> None:
    """Given in YAML, changed on the command line, and taken away by a recipe that extends it."""
    from pydantic import BaseModel

    from leveret import recipe

    class Whole(BaseModel):
        connector: ConnectorRecipe

    (tmp_path / "a.yaml").write_text("connector: {kind: resampler, options: {queries: 64}}")
    given = recipe.load(tmp_path / "a.yaml", Whole, "models", ["connector.options.layers=2"]).connector
    assert given.options == {"queries": 64, "layers": 2}
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path / 'a.yaml'}\nconnector: {{kind: linear, options: null}}")
    assert recipe.load(tmp_path / "b.yaml", Whole, "models").connector == ConnectorRecipe(kind="linear")
