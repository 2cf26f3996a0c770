"""Key tables of towers: both ways, recognised by contents, and refused with a reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from fakes import loud
from leveret.model import tower_keys
from leveret.model.eva import EvaVision, rotation
from leveret.model.recipe import VisionRecipe
from leveret.model.tower_files import read_weights
from leveret.model.towers import describe, fill_tower, load_tower
from leveret.runs import DataError, EnvironmentFault, RecipeError
from tower_fakes import CLASSES, EVA, eva_file, states_of, toy

PAIRS = [(family, layout) for family, layouts in tower_keys.LAYOUTS.items() for layout in layouts]


def own_state(family: str) -> dict[str, torch.Tensor]:
    if family == "eva02_clip":
        torch.manual_seed(0)
        return dict(loud(EvaVision(EVA)).state_dict())
    return dict(toy(family).state_dict())


@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_to_theirs_and_back(family: str, layout: str) -> None:
    """Every name is found again, with the same bits, under a prefix and beside other things."""
    ours = own_state(family)
    if layout == "timm" and family == "dinov2_with_registers":
        ours["embeddings.position_embeddings"][:, 0] = 0  # timm keeps it inside the class token
    if layout == "timm" and "embeddings.mask_token" in ours:
        ours["embeddings.mask_token"].zero_()
    if layout in ("apple", "nanovlm"):  # they have no head
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("head.")}
    theirs = tower_keys.to_theirs(ours, family, layout, "some.tower.")
    assert all(name.startswith("some.tower.") for name in theirs)
    theirs["other.weight"] = torch.zeros(1)
    assert tower_keys.recognise(theirs, family) == (layout, "some.tower.")
    back = tower_keys.to_ours(theirs, family)
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == {
        name: tuple(tensor.shape) for name, tensor in ours.items()
    }
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_timms_registers_give_the_same_features(tmp_path: Path) -> None:
    """A class position that is not zero goes into the token: other weights, the same numbers."""
    family = "dinov2_with_registers"
    model = toy(family)
    model.save_pretrained(tmp_path)
    facts = describe(VisionRecipe(tower=str(tmp_path)))
    state = tower_keys.to_theirs(model.state_dict(), family, "timm")
    assert state["pos_embed"].shape == (1, 4, 16) and "mask_token" not in state
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = fill_tower(facts, state)(pixels)
    torch.testing.assert_close(got, states_of(model, family, pixels)[2][:, 5:])


def test_positions_are_resampled_only_for_peers(tmp_path: Path) -> None:
    """Another grid: timm's files are brought to it while loading; a transformers checkpoint is refused."""
    model = toy("siglip_vision_model")
    model.save_pretrained(tmp_path)
    facts = describe(VisionRecipe(tower=str(tmp_path)))
    large = {**model.state_dict(), "embeddings.position_embedding.weight": torch.randn(9, 16)}
    with pytest.raises(DataError, match=r"1 of another shape: embeddings.position_embedding.weight \(9, 16\)"):
        fill_tower(facts, large)
    tower = fill_tower(facts, tower_keys.to_theirs(large, "siglip_vision_model", "timm"))
    assert tower.model.embeddings.position_embedding.weight.shape == (4, 16)
    same = torch.randn(1, 5, 16)
    assert tower_keys.resample(same, same.shape) is same
    flat = torch.ones(1, 1 + 25, 16)
    flat[:, 0] = 7.0
    small = tower_keys.resample(flat, torch.Size((1, 5, 16)))
    torch.testing.assert_close(small[:, 1:], torch.ones(1, 4, 16))
    assert torch.equal(small[:, 0], flat[:, 0])


def test_dinov2s_positions_as_they_were_then(tmp_path: Path) -> None:
    """The scale of DINOv2's own code, (G + 0.1) / g, against a bicubic interpolation written out for one point."""
    model = toy("dinov2")
    model.save_pretrained(tmp_path)
    facts = describe(VisionRecipe(tower=str(tmp_path), size=64))
    tower = fill_tower(facts, model.state_dict(), positions="dino")
    assert tower.facts.config["image_size"] == 64 and tower.tokens == 16
    got = tower.model.embeddings.position_embeddings
    stored = model.embeddings.position_embeddings.detach()
    assert torch.equal(got[:, :1], stored[:, :1])
    place = (2 + 0.5) / (4.1 / 2) - 0.5  # the point in row 2, column 2 of 4, in the 2 x 2 grid
    start, t = int(place), place - int(place)

    def weight(x: float) -> float:
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)

    weights = [weight(t + 1), weight(t), weight(1 - t), weight(2 - t)]
    rows = [min(max(start + shift, 0), 1) for shift in (-1, 0, 1, 2)]
    grid = stored[0, 1:].reshape(2, 2, -1)
    wanted = sum(weights[y] * weights[x] * grid[rows[y], rows[x]] for y in range(4) for x in range(4))
    torch.testing.assert_close(got[0, 1 + 2 * 4 + 2].detach(), wanted)
    other = load_tower(facts)(torch.ones(1, 3, 64, 64))
    assert 1e-3 < float((tower(torch.ones(1, 3, 64, 64)) - other).abs().max().detach())


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    model = toy("clip_vision_model")
    model.save_pretrained(tmp_path)
    facts = describe(VisionRecipe(tower=str(tmp_path)))
    state = dict(model.state_dict())
    gone = "encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(DataError, match=rf"1 missing: {gone}"):
        fill_tower(facts, {name: tensor for name, tensor in state.items() if name != gone})
    with pytest.raises(DataError, match="1 unexpected: strange"):
        fill_tower(facts, {**state, "strange": torch.zeros(1)})
    openai = tower_keys.to_theirs(state, "clip_vision_model", "openai", "visual.")
    with pytest.raises(DataError, match="1 names that the openai layout does not know: strange"):
        fill_tower(facts, {**openai, "visual.strange": torch.zeros(1)})
    with pytest.raises(DataError, match=r"no clip_vision_model tower in it.*'conv1\.weight'"):
        fill_tower(facts, {"lm_head.weight": torch.zeros(1)})
    two = {f"{side}.{name}": tensor for side in ("left", "right") for name, tensor in state.items()}
    with pytest.raises(DataError, match=r"2 towers of one kind, under 'left\.', 'right\.'"):
        fill_tower(facts, two)
    assert fill_tower(facts, two, under="right.").tokens == 4
    with pytest.raises(DataError, match="timm layout has no name for strange"):
        tower_keys.to_theirs({**state, "strange": torch.zeros(1)}, "clip_vision_model", "timm")


@pytest.mark.parametrize("family", ["siglip_vision_model", "vit", "dinov2", "clip_vision_model"])
def test_transformers_names_of_other_versions(family: str, tmp_path: Path) -> None:
    """What transformers itself wrote before version 5, and what it writes now, fill the same tower."""
    model = toy(family)
    model.save_pretrained(tmp_path)
    facts = describe(VisionRecipe(tower=str(tmp_path)))
    old = tower_keys.to_theirs(model.state_dict(), family, "transformers", "vision_model.")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = load_tower(facts)(pixels)
        for state in (old, model.state_dict(), read_weights(tmp_path / "model.safetensors")):
            assert torch.equal(fill_tower(facts, state)(pixels), wanted)


def test_aimv2_as_apple_published_it(tmp_path: Path) -> None:
    """A flat configuration for code of its own, and names of its own, in several files."""
    from safetensors.torch import save_file

    model = toy("aimv2_vision_model")
    without_head = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    state = tower_keys.to_theirs(without_head, "aimv2_vision_model", "apple")
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    told = {**model.config.to_dict(), "model_type": "aimv2", "auto_map": {"AutoModel": "modeling_aimv2.AIMv2Model"}}
    del told["use_head"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    pixels = torch.randn(1, 3, 32, 32)
    tower = load_tower(describe(VisionRecipe(tower=str(tmp_path))))
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), states_of(model, "aimv2_vision_model", pixels)[2])
    (tmp_path / "part-0.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"part-0\.safetensors: cannot be read"):
        load_tower(tower.facts)


TIMM = {
    "vit_so400m_patch14_siglip_384": "siglip_vision_model",
    "vit_large_patch14_clip_336": "clip_vision_model",
    "vit_large_patch14_reg4_dinov2": "dinov2_with_registers",
    "vit_large_patch16_224": "vit",
}


@pytest.mark.parametrize("architecture", TIMM)
def test_a_timm_folder(architecture: str, tmp_path: Path) -> None:
    """Sizes come from the weights and model_args; activation, epsilon and normalisation from the row."""
    family = TIMM[architecture]
    state = tower_keys.to_theirs(toy(family).state_dict(), family, "timm")
    torch.save(state, tmp_path / "pytorch_model.bin")
    told = {"architecture": architecture, "model_args": {"img_size": 32, "num_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    facts = describe(VisionRecipe(tower=str(tmp_path)))
    config = {**facts.config}
    assert (facts.family, facts.size, facts.resize) == (family, 32, "squash")
    assert config["hidden_act"] == ("quick_gelu" if "clip" in architecture else "gelu")
    assert config["layer_norm_eps"] == (1e-5 if "clip" in architecture else 1e-6)
    tower = load_tower(facts)
    assert (tower.tokens, tower.width, len(tower.blocks)) == (4, 16, 2)
    large = load_tower(describe(VisionRecipe(tower=str(tmp_path), size=48)))
    assert large(torch.zeros(1, 3, 48, 48)).shape == (1, 9, 16)
    (tmp_path / "config.json").write_text(json.dumps({**told, "pretrained_cfg": {"tag": "laion2b"}}))
    assert describe(VisionRecipe(tower=str(tmp_path))).config["hidden_act"] == "gelu", "OpenAI's alone had another"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    with pytest.raises(DataError, match=r"no model_args\.num_heads"):
        describe(VisionRecipe(tower=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture.replace("patch", "path")}))
    with pytest.raises(RecipeError, match=f"did you mean .*{architecture}"):
        describe(VisionRecipe(tower=str(tmp_path)))


def test_an_eva_file(tmp_path: Path) -> None:
    """Its sizes are read from it; features are those of the network that wrote it."""
    path = eva_file(tmp_path / "eva.pt")
    facts = describe(VisionRecipe(tower=str(path)))
    assert dict(facts.config) == EVA and facts.resize == "centre"
    torch.manual_seed(0)
    model = loud(EvaVision(EVA))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden, angles = model.embeddings(pixels), model.angles(pixels.device)
        for depth, block in enumerate(model.blocks, 1):
            hidden = block(hidden, angles)
            tower = load_tower(describe(VisionRecipe(tower=str(path), layer=depth)))
            torch.testing.assert_close(tower(pixels), hidden[:, 1:])
        kept = load_tower(describe(VisionRecipe(tower=str(path), keep=["layers", "norm", "head"])))
        torch.testing.assert_close(kept.model(pixels), model(pixels))
    state = read_weights(path)
    state["visual.rope.freqs_cos"] = state["visual.rope.freqs_cos"].flip(0)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(DataError, match="rotary table is not that of"):
        describe(VisionRecipe(tower=str(tmp_path / "other.pt")))
    torch.save({"visual.x": torch.zeros(1)}, tmp_path / "none.pt")
    with pytest.raises(DataError, match="not an EVA-02-CLIP file"):
        describe(VisionRecipe(tower=str(tmp_path / "none.pt")))


def test_evas_rotation_turns_planes() -> None:
    """Against complex numbers: neighbours are one plane, half of them turn with the row and half with the column."""
    angles = rotation(3, 16, 8, torch.device("cpu"))
    assert angles.shape == (9, 8)
    from leveret.model.eva import rotate

    tokens = torch.randn(1, 1, 10, 8)
    turned = rotate(tokens, angles)
    assert torch.equal(turned[:, :, 0], tokens[:, :, 0])
    for row in range(3):
        for column in range(3):
            place = torch.tensor([row, row, column, column]) / 3 * 16
            speed = 10000.0 ** -(torch.tensor([0, 2, 0, 2]) / 4)
            plane = torch.view_as_complex(tokens[0, 0, 1 + 3 * row + column].reshape(4, 2))
            wanted = torch.view_as_real(plane * torch.exp(1j * place * speed)).flatten()
            torch.testing.assert_close(turned[0, 0, 1 + 3 * row + column], wanted)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    (tmp_path / "code.pt").write_bytes(pickle.dumps({"a": Code()}, protocol=2))
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00\x00")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name in ("code.pt", "torn.safetensors"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as weights"):
            read_weights(tmp_path / name)
    with pytest.raises(DataError, match="holds a list"):
        read_weights(tmp_path / "list.pt")


def test_weights_of_a_peer_that_are_not_here(tmp_path: Path) -> None:
    row = describe(VisionRecipe(tower="timm/vit_large_patch14_clip_336.openai"))
    with pytest.raises(EnvironmentFault, match=r"hf download timm/vit_large_patch14_clip_336\.openai"):
        load_tower(row)
    with pytest.raises(
        EnvironmentFault, match=r"hf download QuanSun/EVA-CLIP EVA02\S+\.pt .*model\.vision\.tower=\./EVA02"
    ):
        load_tower(describe(VisionRecipe(tower="QuanSun/EVA02_CLIP_L_336_psz14_s6B")))
    (tmp_path / "config.json").write_text('{"architecture": "vit_large_patch16_224"}')
    with pytest.raises(EnvironmentFault, match=r"none of model\.safetensors"):
        describe(VisionRecipe(tower=str(tmp_path)))


def test_every_family_of_transformers_has_its_layout() -> None:
    assert set(tower_keys.LAYOUTS) == {*CLASSES, "eva02_clip"}
