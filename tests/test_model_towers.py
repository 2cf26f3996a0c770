"""Towers, connectors, languages: every row composes, counts are the published ones, features are transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fakes import SIGLIP, loud, tiny_recipe
from leveret.model import language, towers
from leveret.model.build import build, build_meta, check
from leveret.model.connectors import build_connector
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.towers import (
    TOWERS,
    Tower,
    TowerFacts,
    backbones,
    build_tower,
    count_tower,
    describe,
    load_tower,
    whole,
)
from leveret.runs import EnvironmentFault, RecipeError

REAL_TOWERS = [name for name, row in TOWERS.items() if not row.package]
REAL_LANGUAGES = [name for name, row in language.LANGUAGES.items() if not row.package]


@pytest.mark.parametrize("name", REAL_TOWERS)
def test_every_tower_row_has_the_published_count(name: str) -> None:
    facts = describe(VisionRecipe(tower=name))
    assert whole(facts) == backbones()["vision"][name]["parameters"]
    assert count_tower(facts) < whole(facts)
    with torch.device("meta"):
        tower = build_tower(facts)
    assert len(tower.blocks) == tower.published_depth - 1, "the last block but one is read, so the last is not built"
    expected = [name for name, _ in tower.unused() if not name.endswith("mask_token")]
    assert expected == []


@pytest.mark.parametrize("name", REAL_LANGUAGES)
def test_every_language_row_has_the_published_count(name: str) -> None:
    with torch.device("meta"):
        model = language.build_language(language.describe(LanguageRecipe(name=name)))
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == backbones()["language"][name]["parameters"]


def test_backbones_has_what_rows_need_and_no_more() -> None:
    assert set(backbones()["vision"]) == set(REAL_TOWERS)
    assert set(backbones()["language"]) == set(REAL_LANGUAGES)


CLASSES = {
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel", 0),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", 1),
    "dinov2": ("Dinov2Config", "Dinov2Model", 1),
}


def test_every_family_is_tested() -> None:
    assert set(CLASSES) | {"tiny"} == set(towers.TOWER_FAMILIES)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_are_the_hidden_states(family: str, layer: int, tmp_path: Path) -> None:
    """The tower reads the weights of a folder and gives hidden_states[layer] without class tokens, cut or whole."""
    config, cls, prefix = CLASSES[family]
    torch.manual_seed(0)
    model = loud(getattr(transformers, cls)(getattr(transformers, config)(**SIGLIP))).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    # transformers counts [embeddings, block 1, ..]; its last entry has been through other conventions, so count up
    expected = states[layer if layer > 0 else 4 + layer][:, prefix:]
    if layer == -1:
        expected = _last_block(model, states[2])[:, prefix:]
    for keep in ([], ["layers", "norm", "head"]):
        facts = describe(VisionRecipe(tower=str(tmp_path), layer=layer, keep=keep))
        tower = load_tower(facts).eval()
        with torch.no_grad():
            got = tower(pixels)
        assert got.shape == (2, tower.tokens, tower.width) == (2, 4, 16)
        torch.testing.assert_close(got, expected)
        got = tower(pixels)
        got.sum().backward()
        idle = dict(tower.unused())
        assert all((p.grad is None) == (name in idle) for name, p in tower.named_parameters())
        assert all(not p.requires_grad for p in idle.values())
        assert bool(keep) == any("norm" in name for name in idle) or family == "dinov2" or layer != -2


def _last_block(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    blocks = model.encoder.layer if hasattr(model.encoder, "layer") else model.encoder.layers  # type: ignore[union-attr]
    with torch.no_grad():
        return blocks[-1](hidden, None)  # type: ignore[index, operator]


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_the_vision_part_of_a_whole_dual_encoder(kind: str, tmp_path: Path) -> None:
    """Published SigLIP and CLIP folders hold both towers; the vision one is taken, with the processor's mean."""
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    config = getattr(transformers, f"{kind}Config")(vision_config=SIGLIP, text_config=text)
    model = loud(getattr(transformers, f"{kind}Model")(config)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    tower = load_tower(describe(VisionRecipe(tower=str(tmp_path)))).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(tower(pixels), expected[:, 1 if kind == "CLIP" else 0 :])
    assert tower.view.mean == (0.1, 0.2, 0.3)
    assert tower.view.resize == ("crop" if kind == "CLIP" else "squash")


def test_a_tiny_tower_gives_the_same_features_in_training() -> None:
    """Its batch norms keep their statistics: features of an image may not depend on the rest of the batch."""
    torch.manual_seed(0)
    config = {"size": 32, "width": 16, "layers": 2, "heads": 2}
    tower = build_tower(TowerFacts("tiny", config, depth=2, size=32))
    pixels = torch.randn(3, 3, 32, 32)
    before = tower.eval()(pixels)
    after = tower.train()(pixels)
    assert tower.tokens == 16 and before.shape == (3, 16, 16)
    assert torch.equal(before, after) and tower.training
    torch.testing.assert_close(tower(pixels[:1])[0], before[0])
    assert len(tower.blocks) == 2 and list(tower.unused()) == []


def test_connector_names_are_those_of_published_projectors() -> None:
    names = [name for name, _ in build_connector("mlp2x_gelu", 16, 24, 4).named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_all_faults_of_a_recipe_at_once_with_the_closest_ids() -> None:
    recipe = ModelRecipe(
        vision=VisionRecipe(tower="google/siglip-so400m-patch14-385"),
        connector=ConnectorRecipe(kind="mlp2x_gleu"),
        language=LanguageRecipe(name="phi-2"),
        chat="buny",
    )
    with pytest.raises(RecipeError) as caught:
        check(recipe)
    text = str(caught.value)
    for near in ("'google/siglip-so400m-patch14-384'", "'mlp2x_gelu'", "'microsoft/phi-2'", "'bunny'"):
        assert near in text
    for where in ("model.vision.tower", "model.connector.kind", "model.language.name", "model.chat"):
        assert where in text
    assert caught.value.exit_code == 2


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"layer: -28 given.*27 blocks; allowed: 1 to 27, or -1 to -27"):
        describe(VisionRecipe(tower="google/siglip-so400m-patch14-384", layer=-28))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecipeError, match="'bert'"):
        describe(VisionRecipe(tower=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "minicpm", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(RecipeError, match="runs no code from model repositories"):
        language.describe(LanguageRecipe(name=str(tmp_path)))


def test_missing_weights_say_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: object, **options: object) -> None:
        assert options["trust_remote_code"] is False
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(transformers.SiglipVisionModel, "from_pretrained", offline)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", offline)
    name = "google/siglip-base-patch16-224"
    words = f"hf download {name} --local-dir siglip-base-patch16-224.*model.vision.tower="
    with pytest.raises(EnvironmentFault, match=words):
        load_tower(describe(VisionRecipe(tower=name)))
    with pytest.raises(EnvironmentFault, match="hf download microsoft/phi-2"):
        language.load_language(language.describe(LanguageRecipe(name="microsoft/phi-2")))


def test_a_checkpoint_that_does_not_fill_the_tower(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in state if "layers.0.mlp.fc1.weight" in name)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*fc1\.weight"):
        load_tower(describe(VisionRecipe(tower=str(tmp_path))))


def test_the_tables_are_cut_and_the_bias_dropped(tmp_path: Path) -> None:
    """Bunny's Phi-2: the first rows of both tables stay, the output layer loses its bias."""
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    published = loud(transformers.PhiForCausalLM(config))
    published.lm_head.bias.data.fill_(3.0)
    published.save_pretrained(tmp_path)
    facts = language.describe(LanguageRecipe(name=str(tmp_path), vocab=80, head_bias=False))
    model = language.load_language(facts)
    assert torch.equal(model.get_input_embeddings().weight, published.get_input_embeddings().weight[:80])
    assert torch.equal(model.lm_head.weight, published.lm_head.weight[:80])
    assert model.lm_head.bias is None and model.config.vocab_size == 80


def test_bunny_composes_without_memory() -> None:
    """Facts: 3,182,254,624 parameters as released (26 layers and the norm, no head), 729 tokens."""
    recipe = ModelRecipe(
        vision=VisionRecipe(tower="google/siglip-so400m-patch14-384", keep=["norm"]),
        language=LanguageRecipe(name="microsoft/phi-2", vocab=50295, head_bias=False),
        chat="bunny",
    )
    vlm = build_meta(recipe)
    assert sum(p.numel() for p in vlm.parameters()) == 3_182_254_624
    assert vlm.spec.tokens == 729 and vlm.device.type == "meta"
    assert all(p.device.type == "meta" for p in vlm.parameters())
    keep = VisionRecipe(tower=recipe.vision.tower, keep=["layers", "norm", "head"])
    assert sum(p.numel() for p in build_meta(recipe.model_copy(update={"vision": keep})).parameters()) == 3_212_732_480


def test_building_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = build(tiny_recipe(), seed=3).connector.state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(9)
    other = build(tiny_recipe(), seed=3).connector.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(5)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(one["0.weight"], build(tiny_recipe(), seed=4).connector.state_dict()["0.weight"])
    assert isinstance(build(tiny_recipe(), weights=False).towers["vision"], Tower)


def test_a_tokenizer_larger_than_the_table_is_refused() -> None:
    recipe = tiny_recipe()
    small = recipe.model_copy(update={"language": LanguageRecipe(name=recipe.language.name, vocab=64)})
    with pytest.raises(RecipeError, match=r"model\.language\.vocab"):
        build(small)


def test_the_drawn_worlds_backbones_compose_and_come_back(tmp_path: Path) -> None:
    from fakes import tiny_batch
    from leveret.model.checkpoint import load, save

    recipe = ModelRecipe(
        vision=VisionRecipe(tower="world/vision"),
        connector=ConnectorRecipe(kind="residual_2d"),
        language=LanguageRecipe(name="world/language"),
        chat="tiny",
    )
    vlm = build(recipe)
    assert (vlm.spec.tokens, vlm.spec.towers[0].size) == (64, 64)
    assert vlm.language.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in vlm.parameters())
    assert sum(p.numel() for p in build_meta(recipe).parameters()) == sum(p.numel() for p in vlm.parameters())
    vlm.cast(torch.bfloat16)
    batch = tiny_batch(vlm, (80, 72))
    with torch.no_grad():
        logits = vlm(batch).logits
        assert logits.isfinite().all()
        assert torch.equal(load(save(vlm, tmp_path / "m"))(batch).logits, logits)
