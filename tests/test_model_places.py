"""Where visual tokens lie: the square that each way of resizing shows, and every grid that a model can have.

The truth is planted. Towers whose blocks do nothing are local: a bright spot on a picture then changes only the tokens
of the patches that it lies in, so that what changed must be laid where the spot is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from fakes import LLAMA, loud, tiny_language_folder
from leveret.generate.engine import Eyes
from leveret.generate.model import reference
from leveret.inputs.extent import WHOLE, inside, seen, tiled
from leveret.inputs.resize import fit
from leveret.inputs.tiles import cut
from leveret.model.build import build
from leveret.model.connectors import CONNECTORS
from leveret.model.looks import looks
from leveret.model.places import Canvas, Places, canvases, connected, tower_places
from leveret.model.recipe import ModelRecipe
from leveret.model.vlm import VLM
from leveret.records import Split, Tiling, TowerView
from tower_fakes import CLASSES

SIDE, PATCH = 48, 8
"""Six patches to a side."""
SIZES = [(48, 48), (97, 48), (40, 70), (120, 33), (200, 210)]
"""(width, height) of pictures."""
SMALL: dict[str, dict[str, Any]] = {
    "resampler": {"queries": 5, "layers": 2, "heads": 2, "head_width": 8},
    "resampler_paper": {"queries": 5, "layers": 2, "width": 16, "heads": 2},
    "qformer": {"queries": 5, "layers": 3, "width": 16, "heads": 2, "hidden": 32},
}


# --- what a tower is shown --------------------------------------------------------------------------------------------


def gradient(width: int, height: int) -> Image.Image:
    """Red tells how far right a pixel lies, green how far down."""
    across = np.linspace(0, 255, width, dtype=np.float32)[None].repeat(height, 0)
    down = np.linspace(0, 255, height, dtype=np.float32)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([across, down, np.full_like(down, 255)], -1).round().astype(np.uint8))


@settings(max_examples=80)
@given(
    width=st.integers(40, 400), height=st.integers(40, 400), more=st.integers(0, 20),
    resize=st.sampled_from(["squash", "pad", "crop", "centre", "letterbox"]),
)  # fmt: skip
def test_the_square_covers_what_its_pixels_show(width: int, height: int, more: int, resize: Any) -> None:
    view = TowerView("v", 64, resize=resize, short=64 + more if more and resize != "squash" else 0, resample="bilinear")
    left, top, right, bottom = seen(view, height, width)
    pixels = np.asarray(fit(gradient(width, height), view)).astype(float)
    centres = (np.arange(64) + 0.5) / 64
    for axis, (begin, end, size) in enumerate([(left, right, width), (top, bottom, height)]):
        due = begin + (end - begin) * centres
        real = (due > 1.5 / size + 0.02) & (due < 1 - 1.5 / size - 0.02)
        line = pixels[32, :, 0] if axis == 0 else pixels[:, 32, 1]
        shown = line[real] / 255
        # one pixel of the picture, and one of the square, may be rounded away
        allowed = 1.5 / size + 1.0 * (end - begin) / 64 + 0.01
        assert np.abs(shown - due[real]).max(initial=0) < allowed, (resize, axis)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tiles_cover_what_their_pixels_show(width: int, height: int) -> None:
    tiling = Tiling(32, 4, ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96)))
    rows, columns = (side // 32 for side in tiling.best(height, width))
    tiles = cut(gradient(width, height), tiling)[1:]
    lines = [np.concatenate([np.asarray(t) for t in tiles[r * columns : (r + 1) * columns]], 1) for r in range(rows)]
    whole = np.concatenate(lines, 0).astype(float)
    left, top, right, bottom = tiled(tiling, height, width)
    drawn = whole[..., 2] > 250  # black is border
    at = np.argwhere(drawn)
    for y, x in at[:: max(1, len(at) // 200)]:
        due = left + (right - left) * (x + 0.5) / whole.shape[1], top + (bottom - top) * (y + 0.5) / whole.shape[0]
        for found, wanted, size in ((whole[y, x, 0], due[0], width), (whole[y, x, 1], due[1], height)):
            assert abs(found / 255 - wanted) < 2 / size + 0.03


def test_boxes_nest() -> None:
    assert inside(WHOLE, (0.1, 0.2, 0.3, 0.4)) == (0.1, 0.2, 0.3, 0.4)
    assert inside((0.5, 0.0, 1.0, 0.5), WHOLE) == (0.5, 0.0, 1.0, 0.5)
    assert inside((-1.0, 0.0, 1.0, 1.0), (0.5, 0.5, 1.0, 1.0)) == (0.0, 0.5, 1.0, 1.0)


# --- the truth, planted -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Towers of several families as folders: six patches to a side, blocks that do nothing."""
    import transformers

    root = tmp_path_factory.mktemp("towers")
    for family in ("siglip_vision_model", "clip_vision_model", "dinov2_with_registers", "siglip2_vision_model"):
        config, cls, extra, _ = CLASSES[family]
        sizes = {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": SIDE, "patch_size": PATCH, "num_patches": 36,
        }  # fmt: skip
        del sizes["image_size" if family == "siglip2_vision_model" else "num_patches"]
        torch.manual_seed(0)
        model = loud(getattr(transformers, cls)(getattr(transformers, config)(**{**extra, **sizes})), 0.05)
        model.save_pretrained(root / family)
    return {family.partition("_")[0]: str(root / family) for family in CLASSES if (root / family).is_dir()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model with room for many tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    loud(LlamaForCausalLM(LlamaConfig(**{**LLAMA, "max_position_embeddings": 4096}))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_language_folder()).save_pretrained(folder)
    return str(folder)


def local(vlm: VLM) -> VLM:
    """The model with blocks that add nothing: a token of the tower knows only its own patch."""
    with torch.no_grad():
        for tower in vlm.towers.values():
            for block in tower.blocks:  # type: ignore[union-attr]
                for parameter in block.parameters():
                    parameter.zero_()
    return vlm


def model(towers: dict[str, str], words: str, vision: dict[str, Any], connector: str = "mlp2x_gelu") -> VLM:
    vision = {"tower": towers["siglip"], **vision} if "towers" not in vision else vision
    recipe = ModelRecipe.model_validate(
        {
            "vision": vision,
            "connector": {"kind": connector, "options": SMALL.get(connector, {})},
            "language": {"name": words},
            "chat": "tiny",
        }
    )
    return local(build(recipe))


def spotted(width: int, height: int, at: tuple[float, float] | None) -> Image.Image:
    """A grey picture, with a bright spot of a twelfth of its sides around `at` (fractions)."""
    pixels = np.full((height, width, 3), 120, np.uint8)
    if at is not None:
        x, y = round(at[0] * width), round(at[1] * height)
        wide, high = max(2, width // 24), max(2, height // 24)
        pixels[max(0, y - high) : y + high, max(0, x - wide) : x + wide] = (255, 0, 255)
    return Image.fromarray(pixels)


@torch.inference_mode()
def tokens_of(vlm: VLM, picture: Image.Image) -> tuple[torch.Tensor, list[Canvas], list[str]]:
    """Visual tokens [m, D] of one picture, and where they lie."""
    from io import BytesIO

    held = BytesIO()
    picture.save(held, "PNG")
    ref = reference(held.getvalue())
    assert ref is not None
    eyes = Eyes(vlm, False, 0)
    named = eyes.name(ref)
    features = eyes.features([named.key])
    visual = vlm.connector(features["features"])
    if vlm.tiles is not None:
        visual = vlm.tiles(visual, features["tile_image"], features["image_sizes"])
    lying, notes = canvases(vlm, features["features"], [named.size])
    return visual.reshape(-1, visual.shape[-1]), lying, notes


GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "mlp2x_gelu"),
    "rest that fills no patch": ({"size": 52}, "linear"),
    "drop_first": ({"tokens": "drop_first"}, "linear"),
    "pad": ({"resize": "pad"}, "linear"),
    "crop": ({"resize": "crop"}, "linear"),
    "crop_pct": ({"resize": "centre", "crop": 0.8}, "linear"),
    "letterbox": ({"resize": "letterbox"}, "linear"),
    "s2": ({"s2": [48, 96]}, "mlp2x_gelu"),
    "pixel_shuffle": ({}, "pixel_shuffle"),
    "residual_2d": ({}, "residual_2d"),
    "ldp": ({}, "ldp"),
    "ldp odd": ({"size": 56}, "ldp"),
    "spp_v1": ({}, "spp_v1"),
    "spp_v2 odd": ({"size": 56}, "spp_v2"),
    "spp_v3": ({}, "spp_v3"),
    "minigpt": ({}, "minigpt"),
    "vanilla": ({}, "vanilla"),
    "anyres": ({"tiles": {}}, "mlp2x_gelu"),
    "anyres spatial": ({"tiles": {"merge": "spatial"}}, "mlp2x_gelu"),
    "anyres flat": ({"tiles": {"merge": "flat"}}, "mlp2x_gelu"),
    "anyres shuffled": ({"tiles": {}}, "pixel_shuffle"),
    "anyres_max": ({"tiles": {"limit": 1}}, "mlp2x_gelu"),
    "split": ({"split": {"side": 144}}, "pixel_shuffle"),
    "split without the whole": ({"split": {"side": 144, "whole": None, "grow": True}}, "linear"),
}


def check(vlm: VLM, size: tuple[int, int], slack: float = 0.0) -> None:
    """A spot at many places: what changes is laid where it is, on every canvas that shows the place."""
    blank, lying, _ = tokens_of(vlm, spotted(*size, None))
    met = 0
    for at in ((0.5, 0.5), (0.2, 0.3), (0.8, 0.25), (0.3, 0.85), (0.9, 0.9), (0.06, 0.5)):
        changed, again, _ = tokens_of(vlm, spotted(*size, at))
        energy = (changed - blank).pow(2).sum(-1)
        assert [one.grid for one in again] == [one.grid for one in lying]
        for canvas in lying:
            assert canvas.placed
            left, top, right, bottom = canvas.shown
            high, wide = (bottom - top) / canvas.grid[0], (right - left) / canvas.grid[1]
            # what was cut off is not there to be found
            if not (left + 1 / 24 < at[0] < right - 1 / 24 and top + 1 / 24 < at[1] < bottom - 1 / 24):
                continue
            laid = canvas.lay(energy)
            if not laid.any():
                continue
            met += 1
            row, column = divmod(int(laid.argmax()), canvas.grid[1])
            x, y = left + (column + 0.5) * wide, top + (row + 0.5) * high
            assert abs(x - at[0]) <= wide * (0.5 + slack) + 1 / 24, (canvas.part, canvas.grid, at, x, y)
            assert abs(y - at[1]) <= high * (0.5 + slack) + 1 / 24, (canvas.part, canvas.grid, at, x, y)
    assert met >= 3 * len(lying) - 2, "the spot was hardly ever on the map"


@pytest.mark.parametrize("kind", GRIDS)
def test_every_grid_is_laid_where_it_looks(kind: str, towers: dict[str, str], words: str) -> None:
    vision, connector = GRIDS[kind]
    vlm = model(towers, words, vision, connector)
    for size in SIZES:
        # groups of four tokens in a row reach as far to either side; LDP's convolutions mix neighbours
        check(vlm, size, slack={"minigpt": 3.5, "vanilla": 3.5, "ldp": 1.0, "ldp odd": 1.0}.get(kind, 0.3))


def test_images_at_their_own_shape(towers: dict[str, str], words: str) -> None:
    """NaFlex: every picture has a grid of its own."""
    vlm = model(towers, words, {"tower": towers["siglip2"], "patches": 30}, "linear")
    grids = set()
    for size in SIZES:
        check(vlm, size, slack=0.6)  # the picture is scaled bilinearly: a spot at an edge reaches the next patch
        _, (canvas,), _ = tokens_of(vlm, spotted(*size, None))
        assert canvas.grid == vlm.spec.tiling.grid(size[1], size[0])  # type: ignore[union-attr]
        grids.add(canvas.grid)
    assert len(grids) > 3


@pytest.mark.parametrize("fusion", ["channel", "interleave"])
@pytest.mark.parametrize("connector", ["linear", "mof_mlp"])
def test_fused_towers(fusion: str, connector: str, towers: dict[str, str], words: str) -> None:
    each = [{"tower": towers["dinov2"]}, {"tower": towers["siglip"]}]
    vlm = model(towers, words, {"towers": each, "fusion": fusion, "resize": "pad"}, connector)
    assert vlm.spec.tokens == 36 * (1 if fusion == "channel" else 2) * (2 if connector == "mof_mlp" else 1)
    for size in SIZES[:3]:
        check(vlm, size)


def test_towers_that_see_different_parts_say_so(towers: dict[str, str], words: str) -> None:
    each = [{"tower": towers["dinov2"], "resize": "crop"}, {"tower": towers["siglip"], "resize": "squash"}]
    vlm = model(towers, words, {"towers": each})
    assert "different parts" in tokens_of(vlm, spotted(97, 48, None))[2][0]


@pytest.mark.parametrize(("tower", "leading"), [("clip", 1), ("dinov2", 5)])
def test_tokens_that_are_no_patches_have_no_place(tower: str, leading: int, towers: dict[str, str], words: str) -> None:
    vlm = model(towers, words, {"tower": towers[tower], "tokens": "cls_patch"}, "linear")
    _, (canvas,), _ = tokens_of(vlm, spotted(48, 48, None))
    assert canvas.grid == (6, 6) and set(range(leading)) & set(canvas.token.tolist()) == set()
    assert canvas.stands() == list(range(leading, leading + 36))
    dropped = model(towers, words, {"tower": towers[tower], "tokens": "drop_first"}, "linear")
    _, (canvas,), _ = tokens_of(dropped, spotted(48, 48, None))
    assert canvas.stands() == list(range(leading - 1, leading + 35))
    weights = torch.rand(3, 36 + leading)
    assert torch.allclose(canvas.lay(weights[:, 1:]).sum(-1), weights[:, leading:].sum(-1))


def test_newlines_lie_nowhere_and_borders_are_left_out(towers: dict[str, str], words: str) -> None:
    vlm = model(towers, words, {"tiles": {}})
    visual, (whole, tiles), _ = tokens_of(vlm, spotted(120, 33, None))
    assert (whole.part, tiles.part) == ("whole", "tiles") and whole.shown == WHOLE and whole.grid == (6, 6)
    assert tiles.grid[0] < tiles.grid[1] and len(visual) == 36 + tiles.grid[0] * (tiles.grid[1] + 1)
    assert None not in tiles.stands()
    assert tiles.shown[0] > -0.2 and tiles.shown[2] < 1.2


@pytest.mark.parametrize("size", [(600, 15), (3000, 15), (15, 3000)])
def test_a_strip_of_which_tiles_hold_only_borders_is_seen_as_a_whole(
    size: tuple[int, int], towers: dict[str, str], words: str
) -> None:
    _, canvases, _ = tokens_of(model(towers, words, {"tiles": {}}), spotted(*size, None))
    assert [canvas.part for canvas in canvases] == ["whole"]


def test_a_grid_that_is_scaled_down_covers_the_same(towers: dict[str, str], words: str) -> None:
    plain, limited = (model(towers, words, {"tiles": {"limit": limit}}) for limit in (0, 1))
    tiling = limited.spec.tiling
    assert isinstance(tiling, Tiling) and tiling.shrunk(210, 200) is not None
    _, (_, whole), _ = tokens_of(plain, spotted(200, 210, None))
    visual, (_, small), _ = tokens_of(limited, spotted(200, 210, None))
    assert small.grid == tiling.shrunk(210, 200) and small.grid[0] < whole.grid[0] and small.shown == whole.shown
    assert None not in small.stands() and len(visual) == 36 + small.grid[0] * (small.grid[1] + 1)


# --- learned queries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SMALL))
def test_queries_lie_where_they_look(kind: str, towers: dict[str, str], words: str) -> None:
    vlm = model(towers, words, {}, kind)
    _, (canvas,), notes = tokens_of(vlm, spotted(48, 48, None))
    assert canvas.grid == (6, 6) and canvas.placed and "queries" in notes[0]
    weights = torch.rand(4, 5)
    assert torch.allclose(canvas.lay(weights).sum(-1), weights.sum(-1), atol=1e-5)
    assert canvas.stands() == [None] * 36


def test_looks_are_those_of_transformers(towers: dict[str, str], words: str) -> None:
    """The Q-Former's cross-attention as its eager code returns it; the two resamplers' written out here."""
    features = torch.randn(2, 36, 32)
    qformer: Any = model(towers, words, {}, "qformer").connector
    kept: list[torch.Tensor] = []
    attention = [m for m in qformer.modules() if type(m).__name__ == "Blip2QFormerMultiHeadAttention"]
    attention[0].config._attn_implementation = "eager"
    hooks = [
        module.register_forward_hook(lambda m, a, k, out: kept.append(out[1]), with_kwargs=True)
        for module in attention
        if module.key.in_features == 32
    ]
    with torch.no_grad():
        qformer(features)
        for hook in hooks:
            hook.remove()
        due = torch.stack(kept).mean((0, 2))
        found = looks(qformer, features)
    assert found is not None and found.shape == (2, 5, 36) and len(kept) == 2
    torch.testing.assert_close(found, due)
    paper: Any = model(towers, words, {}, "resampler_paper").connector
    block = paper.resampler_blocks[0]
    paper.resampler_blocks = nn.ModuleList([block])
    with torch.no_grad():
        query = block.to_q(block.norm_hidden(paper.queries)).unflatten(-1, (2, 8)).transpose(0, 1)
        key = block.to_k(block.norm_image(features)).unflatten(-1, (2, 8)).transpose(1, 2)
        torch.testing.assert_close(looks(paper, features), (query @ key.mT / 8**0.5).softmax(-1).mean(1))
    perceiver: Any = model(towers, words, {}, "resampler").connector
    with torch.no_grad():
        found = looks(perceiver, features)
    assert found is not None and torch.allclose(found.sum(-1), torch.ones(2, 5), atol=1e-6)
    assert not perceiver.layers[0][0]._forward_pre_hooks, "nothing stays on the model"


def test_a_planted_look_is_found() -> None:
    """A query whose key is one token's lies in that token's cell."""
    from leveret.model.resampler import PerceiverResampler

    torch.manual_seed(0)
    made = PerceiverResampler(16, 16, queries=4, layers=1, heads=1, head_width=16, times=1)
    with torch.no_grad():
        made.linear.weight.copy_(torch.eye(16))
        made.linear.bias.zero_()
        made.layers[0][0].to_q.weight.copy_(40 * torch.eye(16))  # type: ignore[index, union-attr]
        made.layers[0][0].to_kv.weight[:16].copy_(torch.eye(16))  # type: ignore[index, union-attr]
        features = torch.randn(1, 9, 16)
        features[0, [2, 7, 5, 0]] = made.latents
        found = looks(made, features)
    assert found is not None and found[0].argmax(-1).tolist() == [2, 7, 5, 0] and float(found.amax(-1).min()) > 0.9


# --- the whole way ---------------------------------------------------------------------------------------------------

WHOLE_WAY: dict[str, tuple[dict[str, Any], str]] = {
    **{kind: GRIDS[kind] for kind in ("plain", "s2", "ldp", "vanilla", "anyres", "anyres_max", "split")},
    "own shape": ({"patches": 30}, "linear"),
    "class token": ({"tokens": "cls_patch"}, "linear"),
    **{kind: ({}, kind) for kind in SMALL},
    "queries of tiles": ({"split": {"side": 96}}, "resampler"),
}


@pytest.mark.parametrize("kind", WHOLE_WAY)
def test_a_model_of_every_kind_is_looked_into(kind: str, towers: dict[str, str], words: str) -> None:
    """Two pictures of different shapes: rows sum to 1, what lies on maps and what lies nowhere is the image's share,
    and there is a page."""
    from leveret.generate.look import look
    from leveret.generate.look_page import page
    from leveret.generate.model import Model
    from leveret.records import Turn

    vision, connector = WHOLE_WAY[kind]
    tower = {"own shape": "siglip2", "class token": "clip"}.get(kind, "siglip")
    vlm = model(towers, words, {"tower": towers[tower], **vision}, connector)
    pictures = [spotted(97, 48, (0.3, 0.5)), spotted(40, 70, (0.5, 0.5))]
    turns = (Turn("user", "<image>\n<image>\nhow many red square ?"),)
    found = look(Model(vlm, precision="fp32"), turns, pictures, "two")
    assert {canvas.image for canvas in found.canvases} == {0, 1}
    assert torch.allclose(found.said.shares.sum(-1), torch.ones(found.said.shares.shape[:2]), atol=1e-5)
    total = found.said.shares[..., 0].mean(0)
    laid = sum(found.maps(place)[0].sum((-1, -2)) for place in range(len(found.canvases)))
    held = {token for canvas in found.canvases for token in canvas.token.tolist()}
    loose = [token for token in range(found.said.weights.shape[-1]) if token not in held]
    assert bool(loose) == (kind in ("anyres", "anyres_max", "class token"))
    assert torch.allclose(laid + found.said.weights[..., loose].sum(-1).mean(0), total, atol=1e-5)
    cells = max(sum(c.grid[0] * c.grid[1] for c in found.canvases), found.said.weights.shape[-1])
    bounded = look(Model(vlm, precision="fp32"), turns, pictures, "two red squares and a blue one", most=2 * 6 * cells)
    assert len(bounded.said.weights) + len(bounded.asked.weights) == 6 and bounded.unread, (
        "maps count, not tokens alone"
    )
    facts = found.as_json()
    for canvas, weights in zip(facts["images"], facts["weights"], strict=True):
        assert len(weights[0][0]) == canvas["grid"][0] * canvas["grid"][1]
    html = page(found, pictures, question="q", model="m")
    assert html.count('class="stage"') == len(found.canvases)


# --- what nobody knows ------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A connector of a user's own."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, : self.keep]


class Telling(Own):
    def looks(self, features: torch.Tensor) -> torch.Tensor:
        return torch.eye(features.shape[1])[: self.keep].flip(0).expand(len(features), -1, -1)


def test_connectors_of_a_users_own(towers: dict[str, str], words: str) -> None:
    vlm = model(towers, words, {}, "linear")
    places, features = tower_places(vlm.towers["vision"]), torch.randn(2, 36, 32)  # type: ignore[arg-type]
    lying, note = connected(Own(36), places, features)
    assert lying == [places] * 2 and "keep places" in note
    lying, note = connected(Own(5), places, features)
    assert lying == [None, None] and "nobody knows" in note
    lying, _ = connected(Telling(5), places, features)
    assert lying[1] is not None and lying[1].mix.argmax(-1).tolist() == [4, 3, 2, 1, 0]
    vlm.connector = Own(36)
    object.__setattr__(vlm.spec, "tokens", 7)
    vlm.connector.keep = 7
    _, (canvas,), notes = tokens_of(vlm, spotted(48, 48, None))
    assert canvas.grid == (1, 1) and not canvas.placed and notes
    assert canvas.lay(torch.ones(7)).tolist() == [7.0]


def test_every_connector_says_where_its_tokens_lie() -> None:
    """A new row of the table must be known here."""
    from leveret.model.connectors import build_connector

    plain = Places((4, 4), WHOLE, torch.eye(16))
    for kind in CONNECTORS:
        options = SMALL.get(kind, {})
        connector = build_connector(kind, 32, 32, 16, options)
        with torch.no_grad():
            lying, note = connected(connector, plain, torch.randn(1, 16, 32))
        assert lying[0] is not None and "your own" not in note, kind
        with torch.no_grad():
            assert lying[0].mix.shape[0] == connector(torch.randn(1, 16, 32)).shape[1], kind
        assert torch.allclose(lying[0].mix.sum(-1), torch.ones(len(lying[0].mix)), atol=1e-5), kind


def test_grid_connectors_on_what_is_no_grid() -> None:
    from leveret.model.connectors import build_connector

    odd = Places((4, 4), WHOLE, torch.eye(16)[[1, 0, *range(2, 16)]])
    lying, note = connected(build_connector("pixel_shuffle", 8, 8, 16), odd, torch.randn(3, 16, 8))
    assert lying == [None] * 3 and "no plain grid" in note


def test_split_tiles_with_queries(towers: dict[str, str], words: str) -> None:
    """Queries of every tile lie where they looked in their tile."""
    vlm = model(towers, words, {"split": {"side": 144}}, "resampler")
    visual, lying, _ = tokens_of(vlm, spotted(140, 90, None))
    assert isinstance(vlm.spec.tiling, Split) and [one.part for one in lying] == ["whole", "tiles"]
    assert lying[1].grid == (12, 18) and len(visual) == 5 * (1 + 6)
    total = sum(float(one.lay(torch.ones(len(visual))).sum()) for one in lying)
    assert total == pytest.approx(len(visual), abs=1e-3)
