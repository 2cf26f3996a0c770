"""Every published model by its name: its recipe composes without weights, and its sizes are the published ones.

Sources: ../shared/reference/configs.md (parts, totals), tinyllava.md 2.5 and 6.1, prismatic.md 3, 4 and 7, bunny.md 2
and 3. What no source has is worked out here from what they have, in the open.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from leveret import recipe
from leveret.cli import run
from leveret.inputs.formats import find_chat
from leveret.model.build import build_meta
from leveret.model.language import LANGUAGES
from leveret.model.parts import modules
from leveret.model.peers import prismatic
from leveret.model.towers import describe_all
from leveret.train.stages import TrainRecipe

NAMES = recipe.names("models")


def mlp(width: int, hidden: int) -> int:
    """mlp2x_gelu: two linear layers with biases."""
    return (width + 1) * hidden + (hidden + 1) * hidden


# towers: configs.md
SIGLIP, SIGLIP_224, SIGLIP_26 = 428_225_600, 427_680_704, 397_747_744
"""Whole; at 224 pixels; as Bunny-v1.0-3B and the first TinyLLaVA carry it: 26 of 27 layers, final norm, no head."""
CLIP, CLIP_224, VIT = 303_507_456, 303_179_776, 303_301_632
EVA_BLOCK = 4 * 1024**2 + 3 * 1024 + 6 * 1024 + 3 * 1024 * 2730 + 2 * 2730 + 1024 + 2 * 2730
"""Attention without k bias; three norms, one of them in attention; SwiGLU with biases and a norm inside."""
EVA_23 = 303_645_632 - EVA_BLOCK - 2 * 1024
"""The tower without its last block and the final norm."""
SIGLIP2_BASE = (3 * 16**2 + 1) * 768 + 32**2 * 768 + 11 * (4 * 769 * 768 + 769 * 3072 + 3073 * 768 + 4 * 768)
DINO_SPARE = 2 * 1024
"""transformers' DINOv2 has a position for the class token, and a mask token; timm's has neither (configs.md, traps)."""
DINO_224 = 303_230_976 + DINO_SPARE
DINO_384 = 303_715_328 + DINO_SPARE
DINO_336 = 303_230_976 + (24**2 - 16**2) * 1024 + DINO_SPARE

# language models: configs.md
PHI_2, PHI_2_BUNNY, PHI_1_5 = 2_779_683_840, 2_774_999_040, 1_418_270_720
PHI_1_5_BUNNY = PHI_1_5 - 2 * (51_200 - 50_295) * 2048 - 51_200  # as Phi-2's: shorter tables, no bias
PHI_2_PRISM = PHI_2 - (51_200 - 50_304) * (2 * 2560 + 1)  # 50,295 + 1 tokens, up to a multiple of 64
STABLELM, QWEN_1_5, MINICPM, PHI_3, LLAMA_3 = 1_644_515_328, 1_836_828_672, 2_724_880_896, 3_821_079_552, 8_030_261_248
TINYLLAMA, GEMMA, QWEN_05, QWEN_3 = 1_100_048_384, 2_506_172_416, 494_032_768, 3_085_938_688
LLAMA_7, LLAMA_13 = 6_738_415_616, 13_015_864_320
SMOLLM2 = 361_821_120
PRISM_7, PRISM_13, MISTRAL = 6_738_939_904, LLAMA_13 + 2 * 64 * 5120, 7_241_732_096 + 2 * 64 * 4096


@dataclass(frozen=True)
class Sizes:
    vision: int
    connector: int
    language: int
    tokens: int


C, S = 6_295_552, 6_557_696  # CLIP and SigLIP to 2,048: tinyllava.md 2.5
PUBLISHED = {
    "bunny/v1.0-3b": Sizes(SIGLIP_26, 9_507_840, PHI_2_BUNNY, 729),
    "bunny/phi-1.5-siglip": Sizes(SIGLIP_26, S, PHI_1_5_BUNNY, 729),
    "bunny/stablelm-2-siglip": Sizes(SIGLIP_26, S, STABLELM, 729),
    "bunny/v1.0-2b-zh": Sizes(SIGLIP_26, S, QWEN_1_5, 729),
    "bunny/v1.0-3b-zh": Sizes(SIGLIP_26, mlp(1152, 2304), MINICPM, 729),
    "bunny/phi-1.5-eva": Sizes(EVA_23, C, PHI_1_5_BUNNY, 576),
    "bunny/stablelm-2-eva": Sizes(EVA_23, C, STABLELM, 576),
    "bunny/phi-2-eva": Sizes(EVA_23, 9_180_160, PHI_2_BUNNY, 576),
    **dict.fromkeys(("bunny/v1.0-4b", "bunny/v1.0-4b-recipe-2"), Sizes(SIGLIP, mlp(1152, 3072), PHI_3, 729)),
    **dict.fromkeys(("bunny/v1.1-4b", "bunny/v1.1-4b-recipe-2"), Sizes(SIGLIP, mlp(3456, 3072), PHI_3, 729)),
    **dict.fromkeys(
        ("bunny/llama-3-8b-v", "bunny/llama-3-8b-v-recipe-2"), Sizes(SIGLIP, mlp(1152, 4096), LLAMA_3, 729)
    ),
    **dict.fromkeys(
        ("bunny/v1.1-llama-3-8b-v", "bunny/v1.1-llama-3-8b-v-recipe-2"), Sizes(SIGLIP, mlp(3456, 4096), LLAMA_3, 729)
    ),
    **{f"llava/v1.5-7b{more}": Sizes(CLIP, 20_979_712, LLAMA_7, 576) for more in ("", "-lora")},
    **{f"llava/v1.5-13b{more}": Sizes(CLIP, mlp(1024, 5120), LLAMA_13, 576) for more in ("", "-lora")},
    **{f"tinyllava/{data}-c-tl": Sizes(CLIP, C, TINYLLAMA, 576) for data in ("base", "share", "factory")},
    **{f"tinyllava/{data}-c-slm": Sizes(CLIP, C, STABLELM, 576) for data in ("base", "share", "factory")},
    **{f"tinyllava/{data}-c-phi": Sizes(CLIP, 9_180_160, PHI_2, 576) for data in ("base", "share", "factory")},
    **{f"tinyllava/{data}-sig-tl": Sizes(SIGLIP_26, S, TINYLLAMA, 729) for data in ("base", "share")},
    **{f"tinyllava/{data}-sig-slm": Sizes(SIGLIP_26, S, STABLELM, 729) for data in ("base", "share")},
    **{f"tinyllava/{data}-sig-phi": Sizes(SIGLIP_26, 9_507_840, PHI_2, 729) for data in ("base", "share")},
    # the Factory's towers are whole, and give all patches but the first
    **{
        f"tinyllava/factory-sig-{name}{more}": Sizes(SIGLIP, connector, language, 728)
        for name, connector, language in (
            ("phi", 9_507_840, PHI_2), ("tl", S, TINYLLAMA), ("slm", S, STABLELM), ("gemma", S, GEMMA),
            ("qwen2-0.5b", 1_836_800, QWEN_05), ("qwen2.5-0.5b", 1_836_800, QWEN_05), ("qwen2.5-3b", S, QWEN_3),
        )
        for more in ("", "-lora", "-qlora", "-share")
    },
    "tinyllava/factory-mof-tl": Sizes(CLIP_224 + 304_368_640, 2 * C, TINYLLAMA, 512),
    # ours: 11 of 12 layers of SigLIP2-base, four patches of 32 x 32 in one token, without a bias
    "nano": Sizes(SIGLIP2_BASE, 4 * 768 * 960, SMOLLM2, 256),
}  # fmt: skip

# prismatic/conf/models.py: id -> (vision_backbone_id, llm_backbone_id, image_resize_strategy), as far as it is not
# LLaVA's reproduction. Where it has two mistakes of its own, what the paper says (prismatic.md 15).
_LLAMA, _FUSED, _FUSED_CLIP = "llama2-{}-pure", "dinosiglip-vit-so-384px", "dinoclip-vit-l-336px"
PRISMATIC = {
    **dict.fromkeys(
        (
            "reproduction-llava-v15+7b", "reproduction-llava-v15+13b", "one-stage+7b", "one-stage+13b",
            "full-ft-multi-stage+7b", "full-ft-one-stage+7b", "vicuna-no-cotraining+7b", "train-1.25-epochs+7b",
            "train-1.5-epochs+7b", "train-2-epochs+7b", "train-3-epochs+7b", "llava-lvis4v+7b", "llava-lrv+7b",
            "llava-lvis4v-lrv+7b",
        ),
        ("clip-vit-l-336px", "vicuna-v15-{}", "letterbox"),
    ),
    "in1k-224px+7b": ("in1k-vit-l", "vicuna-v15-{}", "letterbox"),
    "dinov2-224px+7b": ("dinov2-vit-l", "vicuna-v15-{}", "letterbox"),
    "clip-224px+7b": ("clip-vit-l", "vicuna-v15-{}", "letterbox"),
    "siglip-224px+7b": ("siglip-vit-so400m", "vicuna-v15-{}", "letterbox"),
    **{f"clip-336px-{how}+7b": ("clip-vit-l-336px", "vicuna-v15-{}", how) for how in ("resize-crop", "resize-naive")},
    **{
        f"siglip-384px-{how}+7b": ("siglip-vit-so400m-384px", "vicuna-v15-{}", how)
        for how in ("letterbox", "resize-crop", "resize-naive")
    },
    **{
        f"{name}-{how}+7b": (backbone, "vicuna-v15-{}", how)
        for name, backbone in (("dinoclip-336px", _FUSED_CLIP), ("dinosiglip-384px", _FUSED))
        for how in ("letterbox", "resize-naive")
    },
    "dinosiglip-224px-resize-naive+7b": ("dinosiglip-vit-so-224px", "vicuna-v15-{}", "resize-naive"),
    **dict.fromkeys(("llama2+7b", "llama2+13b", "llama2-no-cotraining+7b"), ("clip-vit-l-336px", _LLAMA, "letterbox")),
    **dict.fromkeys(("llama2-chat+7b", "llama2-chat+13b"), ("clip-vit-l-336px", "llama2-{}-chat", "letterbox")),
    "mistral-v0.1+7b": ("clip-vit-l-336px", "mistral-v0.1-{}-pure", "letterbox"),
    "mistral-instruct-v0.1+7b": ("clip-vit-l-336px", "mistral-v0.1-{}-instruct", "letterbox"),
    "phi-2+3b": ("clip-vit-l-336px", "phi-2-{}", "letterbox"),
    **{
        f"prism-{name}{more}+{size}": (backbone, _LLAMA, "resize-naive")
        for name, backbone in (
            ("clip", "clip-vit-l-336px"), ("siglip", "siglip-vit-so400m-384px"), ("dinosiglip", _FUSED)
        )
        for more in ("-controlled", "")
        for size in ("7b", "13b")
    },
    **{
        f"prism-dinosiglip-224px{more}+7b": ("dinosiglip-vit-so-224px", _LLAMA, "resize-naive")
        for more in ("-controlled", "")
    },
}  # fmt: skip
# vision_backbone_id -> (parameters, tokens, width): prismatic.md 4 and configs.md
BACKBONES = {
    "clip-vit-l": (CLIP_224, 256, 1024),
    "clip-vit-l-336px": (CLIP, 576, 1024),
    "siglip-vit-so400m": (SIGLIP_224, 256, 1152),
    "siglip-vit-so400m-384px": (SIGLIP, 729, 1152),
    "dinov2-vit-l": (DINO_224, 256, 1024),
    "in1k-vit-l": (VIT, 196, 1024),
    "dinoclip-vit-l-336px": (DINO_336 + CLIP, 576, 2048),
    "dinosiglip-vit-so-224px": (DINO_224 + SIGLIP_224, 256, 2176),
    "dinosiglip-vit-so-384px": (DINO_384 + SIGLIP, 729, 2176),
}
# the connectors of prismatic.md 7, to the digits it has; width of the images' features, of the language model -> count
CONNECTED = {
    (1024, 4096): 20_979_712, (1152, 4096): 21_504_000, (1024, 5120): 31_467_520, (1152, 5120): mlp(1152, 5120),
    (1024, 2560): 9_180_160, (2176, 4096): 71_385_600, (2176, 5120): 89_737_728, (2048, 4096): 67_125_248,
}  # fmt: skip


def _prism(name: str) -> Sizes:
    seen, spoken, _ = PRISMATIC[name]
    vision, tokens, width = BACKBONES[seen]
    language, hidden = {
        "7b": (MISTRAL if "mistral" in spoken else PRISM_7, 4096), "13b": (PRISM_13, 5120), "3b": (PHI_2_PRISM, 2560)
    }[name.rpartition("+")[2]]  # fmt: skip
    return Sizes(vision, CONNECTED[width, hidden], language, tokens)


SIZES = {**PUBLISHED, **{f"prismatic/{name}": _prism(name) for name in PRISMATIC}}


def test_every_published_model_is_here() -> None:
    assert set(NAMES) == {*SIZES, "world"}
    assert len(PRISMATIC) == 50  # prismatic.md 3 lists 49: dinosiglip-224px-resize-naive+7b is the other one


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_are_the_published_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What `leveret train NAME --dry-run` tells is what was published, part by part."""
    assert run(["train", name, "--dry-run", "--json"]) == 0
    for stage in json.loads(capsys.readouterr().out)["stages"].values():
        counts = {row["part"]: row["parameters"] for row in stage["parts"]}
        tokens = stage["notes"]["tokens"].partition(" per image")[0]
        assert Sizes(**counts, tokens=int(tokens)) == SIZES[name]


def test_the_docs_list_every_model_with_its_sizes() -> None:
    text = (Path(__file__).parents[1] / "docs/models.md").read_text("utf-8")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    told = {name: (int(total.replace(",", "")), int(tokens)) for name, _, _, total, tokens in rows}
    assert told == {name: (s.vision + s.connector + s.language, s.tokens) for name, s in SIZES.items()}
    assert all(f"`{name}`" in text for name, row in LANGUAGES.items() if not row.package)


@pytest.mark.parametrize(
    ("name", "change", "total"),
    [
        ("bunny/v1.0-3b", [], 3_182_254_624),
        ("bunny/v1.0-3b", ["model.vision.keep=[layers, norm, head]"], 3_212_732_480),
        ("tinyllava/factory-sig-phi", [], 3_217_417_280),
        ("tinyllava/share-sig-phi", [], 3_186_939_424),
        ("llava/v1.5-7b", [], 7_062_902_784),
        ("llava/v1.5-7b", ["model.language.vocab=32064"], 7_063_427_072),
        ("prismatic/prism-dinosiglip+7b", [], 7_542_266_432 + DINO_SPARE),
        ("prismatic/prism-dinosiglip-224px+7b", [], 7_541_237_184 + DINO_SPARE),
    ],
)
def test_totals(name: str, change: list[str], total: int) -> None:
    vlm = build_meta(recipe.load(name, TrainRecipe, "models", change).model)
    assert sum(p.numel() for p in vlm.parameters()) == total


def test_the_whole_eva_tower_is_the_published_one() -> None:
    whole = recipe.load("bunny/phi-2-eva", TrainRecipe, "models", ["model.vision.keep=[layers, norm, head]"])
    vision = modules(build_meta(whole.model))["vision"]
    assert sum(p.numel() for p in vision.parameters()) == 304_432_832


@pytest.mark.parametrize(
    ("name", "said"),
    [("c-tl", 1.4), ("sig-tl", 1.5), ("c-slm", 1.9), ("sig-slm", 2.0), ("c-phi", 3.0), ("sig-phi", 3.1)],
)
def test_tinyllavas_names_are_its_sizes_cut_short(name: str, said: float) -> None:
    """tinyllava.md 6.1: 3.0B of 3.09, 1.9B of 1.95. Only towers of 26 layers fit all of them."""
    sizes = SIZES[f"tinyllava/base-{name}"]
    assert (sizes.vision + sizes.connector + sizes.language) // 10**8 == round(said * 10)


def test_tinyllavas_gemma_is_named_without_its_table() -> None:
    """TinyLLaVA-Gemma-SigLIP-2.4B has 2.94 billion parameters; 2.4 leaves out Gemma's 256,000 rows of embeddings."""
    sizes = SIZES["tinyllava/factory-sig-gemma"]
    total = sizes.vision + sizes.connector + sizes.language
    assert total == 2_940_955_712 and (total - 256_000 * 2048) // 10**8 == 24


def test_bunnys_averages_are_the_published_ones() -> None:
    """bunny.md 2; what is averaged must be of one composition."""
    shares = {"v1.0-4b": 0.3, "v1.1-4b": 0.3, "llama-3-8b-v": 0.5, "v1.1-llama-3-8b-v": 0.42}
    for name in NAMES:
        told = recipe.load(name, TrainRecipe, "models")
        base = name.removeprefix("bunny/").removesuffix("-recipe-2")
        if base not in shares:
            assert told.average is None
            continue
        assert told.average is not None
        said = {one.recipe: one.weight for one in told.average}
        both = (f"bunny/{base}", f"bunny/{base}-recipe-2")
        assert said == {both[0]: shares[base], both[1]: pytest.approx(1 - shares[base])}
        one, other = (recipe.load(each, TrainRecipe, "models").model for each in both)
        assert one == other


def test_what_is_published_decays_by_the_rule_of_its_trainer() -> None:
    for name in NAMES:
        told = recipe.load(name, TrainRecipe, "models")
        rule = "trainer" if name.startswith(("bunny/", "llava/", "tinyllava/")) else "matrices"
        assert {stage.decays for stage in told.stages.values()} == {rule}, name


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("lora")])
def test_every_published_lora_is_said_as_it_was(name: str) -> None:
    """tinyllava.md 2.1, 2.2 and 5.4: rank 128, alpha 256, dropout .05; the Factory's QLoRA stands on 8 bits."""
    learn = recipe.load(name, TrainRecipe, "models").stages["tune"].learn
    lora = learn["language"].lora
    assert lora is not None and (lora.rank, lora.alpha, lora.dropout, lora.targets) == (128, 256, 0.05, None)
    assert lora.bits == (8 if name.endswith("qlora") else None)
    assert learn["language"].lr == 2e-4
    assert learn["connector"].lr == (2e-5 if name.startswith("llava") else 2e-4)


@pytest.mark.parametrize("name", PRISMATIC)
def test_prismatics_recipes_are_what_its_checkpoints_are_read_as(name: str) -> None:
    """The reader of Prismatic's checkpoints goes by its ids; the recipe of an id is the same model."""
    seen, spoken, resize = PRISMATIC[name]
    backbone = prismatic.BACKBONES[seen]
    source, builder = prismatic.LANGUAGES[spoken.format(name.rpartition("+")[2])]
    model = recipe.load(f"prismatic/{name}", TrainRecipe, "models").model
    towers = model.vision.each()
    assert [tower.tower for tower in towers] == [f"timm/{row}" for _, row in backbone.towers]
    assert {tower.resize for tower in towers} == {prismatic.STRATEGIES[resize]}
    assert {facts.size for facts in describe_all(model.vision)} == {backbone.size}
    assert [t.activation for t in towers] == [
        "gelu" if len(towers) > 1 and view == "clip" else None for view, _ in backbone.towers
    ]
    assert model.language.name == source
    assert model.chat == prismatic.published("Prismatic", builder).name


@pytest.mark.parametrize("name", NAMES)
def test_a_model_speaks_in_formats_there_are(name: str) -> None:
    """Stages that only align may write otherwise; the last one teaches the format that the model answers in."""
    found = recipe.load(name, TrainRecipe, "models")
    assert found.name == name
    for stage in found.stages.values():
        find_chat(stage.chat or found.model.chat)
    assert (list(found.stages.values())[-1].chat or found.model.chat) == found.model.chat
