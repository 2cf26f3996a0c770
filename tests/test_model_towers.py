"""Towers, connectors, languages: every row composes, counts are the published ones, features are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from leveret.runs import DataError, EnvironmentFault, RecipeError
from tower_fakes import CLASSES, states_of, toy

REAL_TOWERS = [name for name, row in TOWERS.items() if not row.package]
REAL_LANGUAGES = [name for name, row in language.LANGUAGES.items() if not row.package]


# id -> (patches, width): ../shared/reference/configs.md and prismatic.md 4
PUBLISHED = {
    "google/siglip-so400m-patch14-384": (729, 1152),
    "google/siglip-so400m-patch14-224": (256, 1152),
    "google/siglip-base-patch16-224": (196, 768),
    "google/siglip-base-patch16-256": (256, 768),
    "google/siglip-base-patch16-384": (576, 768),
    "google/siglip-base-patch16-512": (1024, 768),
    "google/siglip2-base-patch16-256": (256, 768),
    "google/siglip2-base-patch16-512": (1024, 768),
    "google/siglip2-so400m-patch14-384": (729, 1152),
    "google/siglip2-base-patch16-naflex": (256, 768),
    "google/siglip2-so400m-patch16-naflex": (256, 1152),
    "openai/clip-vit-large-patch14-336": (576, 1024),
    "openai/clip-vit-large-patch14": (256, 1024),
    "openai/clip-vit-base-patch16": (196, 768),
    "openai/clip-vit-base-patch32": (49, 768),
    "facebook/dinov2-large": (256, 1024),
    "facebook/dinov2-base": (256, 768),
    "facebook/dinov2-with-registers-large": (256, 1024),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (196, 1024),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (196, 384),
    "google/vit-large-patch16-224": (196, 1024),
    "apple/aimv2-large-patch14-224": (256, 1024),
    "QuanSun/EVA02_CLIP_L_336_psz14_s6B": (576, 1024),
    "timm/vit_base_patch16_clip_224.openai": (196, 768),
    "timm/vit_large_patch14_clip_224.openai": (256, 1024),
    "timm/vit_large_patch14_clip_336.openai": (576, 1024),
    "timm/vit_base_patch16_siglip_224": (196, 768),
    "timm/vit_base_patch16_siglip_256": (256, 768),
    "timm/vit_base_patch16_siglip_384": (576, 768),
    "timm/vit_so400m_patch14_siglip_224": (256, 1152),
    "timm/vit_so400m_patch14_siglip_384": (729, 1152),
    "timm/vit_large_patch14_reg4_dinov2.lvd142m": (256, 1024),
    "timm/vit_large_patch16_224.augreg_in21k_ft_in1k": (196, 1024),
}


def entry_of(name: str) -> dict[str, Any]:
    return backbones()["vision"][TOWERS[name].like or name]


@pytest.mark.parametrize("name", REAL_TOWERS)
def test_every_tower_row_has_the_published_count(name: str) -> None:
    facts, entry = describe(VisionRecipe(tower=name)), entry_of(name)
    if name == "timm/vit_large_patch14_reg4_dinov2.lvd142m":
        # timm's count at 224 pixels; with us also a position of the class token and the mask token, both zeros
        assert whole(facts) == 303_230_976 + 2 * 1024
    else:
        assert whole(facts) == entry.get("parameters", entry.get("computed"))
    assert count_tower(facts) < whole(facts)
    with torch.device("meta"):
        tower = build_tower(facts)
    assert (tower.tokens, tower.width) == PUBLISHED[name]
    assert len(tower.blocks) == tower.published_depth - 1, "the last block but one is read, so the last is not built"
    expected = [name for name, _ in tower.unused() if not name.endswith("mask_token")]
    assert expected == []


@pytest.mark.parametrize("name", REAL_LANGUAGES)
def test_every_language_row_has_the_published_count(name: str) -> None:
    with torch.device("meta"):
        model = language.build_language(language.describe(LanguageRecipe(name=name)))
        model.tie_weights()
    entry = backbones()["language"][language.LANGUAGES[name].like or name]
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]


def test_backbones_has_what_rows_need_and_no_more() -> None:
    assert set(backbones()["vision"]) == {TOWERS[name].like or name for name in REAL_TOWERS}
    assert set(backbones()["language"]) == {language.LANGUAGES[name].like or name for name in REAL_LANGUAGES}


def test_every_family_is_tested() -> None:
    assert set(CLASSES) | {"tiny", "eva02_clip"} == set(towers.TOWER_FAMILIES)
    assert set(PUBLISHED) == set(REAL_TOWERS)


@pytest.mark.parametrize("family", CLASSES)
def test_features_are_the_hidden_states(family: str, tmp_path: Path) -> None:
    """The tower reads the weights of a folder and gives hidden_states[layer] without leading tokens, cut or whole."""
    model, prefix = toy(family), CLASSES[family][3]
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    states = states_of(model, family, pixels)
    for layer in (-1, -2, 1, 2, 3):
        expected = states[layer if layer > 0 else 4 + layer]
        for keep in ([], ["layers", "norm", "head"]):
            facts = describe(VisionRecipe(tower=str(tmp_path), layer=layer, keep=keep))
            tower = load_tower(facts).train()
            with torch.no_grad():
                got = tower(pixels)
            assert got.shape == (2, tower.tokens, tower.width) == (2, 4, 16)
            torch.testing.assert_close(got, expected[:, prefix:])
            tower(pixels).sum().backward()
            idle = dict(tower.unused())
            assert all((p.grad is None) == (name in idle) for name, p in tower.named_parameters())
            assert all(p.grad is None or p.grad.isfinite().all() for p in tower.parameters())
            assert all(not p.requires_grad for p in idle.values())
            assert bool(keep) == any("norm" in name for name in idle) or layer not in (-2, 3)


@pytest.mark.parametrize("family", CLASSES)
def test_which_tokens(family: str, tmp_path: Path) -> None:
    """cls_patch keeps what stands in front; drop_first loses one token, also where it is a real patch."""
    model, prefix = toy(family), CLASSES[family][3]
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    state = states_of(model, family, pixels)[2]
    for tokens, first in (("cls_patch", 0), ("drop_first", 1), ("patch", prefix)):
        tower = load_tower(describe(VisionRecipe(tower=str(tmp_path), tokens=tokens)))
        with torch.no_grad():
            torch.testing.assert_close(tower(pixels), state[:, first:])
        assert tower.tokens == state.shape[1] - first


@pytest.mark.parametrize("family", CLASSES)
def test_another_size_is_interpolated_as_the_class_does(family: str, tmp_path: Path) -> None:
    model, prefix = toy(family), CLASSES[family][3]
    model.save_pretrained(tmp_path)
    recipe = VisionRecipe(tower=str(tmp_path), size=48)
    if towers.TOWER_FAMILIES[family].sizes == "fixed":
        with pytest.raises(RecipeError, match="takes 32 pixels and no other size"):
            describe(recipe)
        return
    pixels = torch.randn(2, 3, 48, 48)
    tower = load_tower(describe(recipe)).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), states_of(model, family, pixels)[2][:, prefix:])
    assert tower.tokens == 9 and tower.view.size == 48


@pytest.mark.parametrize("family", CLASSES)
def test_s2_is_each_scale_seen_alone(family: str, tmp_path: Path) -> None:
    """Each scale cut into tiles, seen, put together and averaged; the tiles here are cut and joined by hand."""
    model = toy(family)
    model.save_pretrained(tmp_path)
    one = load_tower(describe(VisionRecipe(tower=str(tmp_path)))).eval()
    tower = load_tower(describe(VisionRecipe(tower=str(tmp_path), s2=[96, 32, 64]))).eval()
    assert (tower.view.size, tower.tokens, tower.width) == (96, 4, 48)
    pixels = torch.randn(2, 3, 96, 96)
    wanted = []
    with torch.no_grad():
        got = tower(pixels)
        for size in (32, 64, 96):
            image = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
            cuts = size // 32
            rows = [
                torch.cat(
                    [one(image[:, :, y : y + 32, x : x + 32]).reshape(2, 2, 2, 16) for x in range(0, size, 32)], dim=2
                )
                for y in range(0, size, 32)
            ]
            whole_grid = torch.cat(rows, dim=1)  # [2, 2 * cuts, 2 * cuts, 16]
            wanted.append(whole_grid.reshape(2, 2, cuts, 2, cuts, 16).mean(dim=(2, 4)).reshape(2, 4, 16))
    torch.testing.assert_close(got, torch.cat(wanted, dim=-1))
    for bad in ([32, 48], [32, 32]):
        with pytest.raises(RecipeError, match=r"model\.vision\.s2: .*multiples of the smallest"):
            describe(VisionRecipe(tower=str(tmp_path), s2=bad))
    with pytest.raises(RecipeError, match="largest scale is 64"):
        describe(VisionRecipe(tower=str(tmp_path), s2=[32, 64], size=32))
    with pytest.raises(RecipeError, match="choose patch"):
        describe(VisionRecipe(tower=str(tmp_path), s2=[32, 64], tokens="cls_patch"))


def test_bunnys_s2_has_the_published_shape() -> None:
    tower_facts = describe(VisionRecipe(tower="google/siglip-so400m-patch14-384", s2=[384, 768, 1152]))
    with torch.device("meta"):
        tower = build_tower(tower_facts)
    assert (tower.view.size, tower.tokens, tower.width) == (1152, 729, 3456)


def test_choices_that_change_the_numbers(tmp_path: Path) -> None:
    toy("clip_vision_model").save_pretrained(tmp_path)
    recipe = VisionRecipe(tower=str(tmp_path), activation="gelu", normalise="imagenet")
    tower, usual = load_tower(describe(recipe)), load_tower(describe(VisionRecipe(tower=str(tmp_path))))
    pixels = torch.randn(1, 3, 32, 32)
    assert tower.view.mean == (0.485, 0.456, 0.406) != usual.view.mean
    assert 1e-4 < float((tower(pixels) - usual(pixels)).abs().max().detach())
    with pytest.raises(RecipeError, match=r"activation: 'gleu' is not known.*'gelu'"):
        describe(VisionRecipe(tower=str(tmp_path), activation="gleu"))
    with pytest.raises(RecipeError, match=r"size: 8 given.*patches of 16"):
        describe(VisionRecipe(tower=str(tmp_path), size=8))
    with pytest.raises(RecipeError, match="part of its architecture"):
        describe(VisionRecipe(tower="QuanSun/EVA02_CLIP_L_336_psz14_s6B", activation="gelu"))


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
    (tmp_path / "config.json").write_text('{"model_type": "theirs", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(RecipeError, match="runs no code from model repositories"):
        language.describe(LanguageRecipe(name=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "minicpm", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(DataError, match="'minicpm' config that does not say 'scale_emb'"):
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


@pytest.mark.parametrize("kind", ["Siglip2", "Aimv2", "ViT"])
def test_the_vision_part_of_larger_models(kind: str, tmp_path: Path) -> None:
    """A NaFlex SigLIP2, an AIMv2-lit, and ImageNet's classifier, as they are published: the tower is found in them."""
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    if kind == "ViT":
        whole_model = loud(
            transformers.ViTForImageClassification(transformers.ViTConfig(**SIGLIP, num_labels=3))
        ).eval()
        family, inner = "vit", whole_model.vit
    else:
        sizes = {key: value for key, value in SIGLIP.items() if key != "image_size" or kind == "Aimv2"}
        seen = {**sizes, **({"num_patches": 4} if kind == "Siglip2" else {})}
        config = getattr(transformers, f"{kind}Config")(vision_config=seen, text_config=text)
        whole_model = loud(getattr(transformers, f"{kind}Model")(config)).eval()
        family, inner = f"{kind.lower()}_vision_model", whole_model.vision_model
    whole_model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    tower = load_tower(describe(VisionRecipe(tower=str(tmp_path)))).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), states_of(inner, family, pixels)[2][:, tower.facts.family == "vit" :])
