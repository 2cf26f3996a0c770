"""An id of the hub goes wherever a folder goes, and a model goes to the hub; against a stand-in on 127.0.0.1."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from evaluate_fakes import tiny_world
from fakes import tiny_vlm
from hub_fakes import GATED, TOKEN, Hub, Seat
from leveret import doctor
from leveret.cli import run
from leveret.evaluate import SUITES
from leveret.inputs import find_chat
from leveret.model import checkpoint
from leveret.model.hub import as_id, hub_fault, parted, to_fetch
from leveret.model.peers.write import write
from leveret.model.push import push
from leveret.model.source import locate
from leveret.runs import DataError, EnvironmentFault, RecipeError


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """me/tiny is ours, with files beside it that nobody needs; me/theirs is the same in Bunny's layout; me/pickled is
    that as a pickle alone, me/sharded in two files. sized/ has them once more, for `doctor`; me/many has some in
    folders, as TRI-ML/prismatic-vlms has its own."""
    import torch
    from safetensors.torch import load_file, save_file

    place = tmp_path_factory.mktemp("hub")
    vlm = tiny_vlm(chat="llama")  # the format that a reader of Bunny's layout gives to a Llama
    vlm.tokenizer.add_special_tokens(
        {"extra_special_tokens": [*vlm.tokenizer.extra_special_tokens, find_chat("llama").stop[0]]}
    )
    vlm.language.resize_token_embeddings(len(vlm.tokenizer))
    ours = checkpoint.save(vlm, place / "me/tiny")
    for name in ("modeling.py", "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "consolidated.safetensors"):
        (ours / name).parent.mkdir(exist_ok=True)
        (ours / name).write_text("evil")
    write(vlm, theirs := place / "me/theirs", "bunny")
    (theirs / "modeling_bunny.py").write_text("raise SystemExit('this code was run')")
    torch.save({"x": torch.zeros(1)}, theirs / "pytorch_model.bin")
    shutil.copytree(theirs, place / "me/pickled")
    state = load_file(theirs / "model.safetensors")
    (place / "me/pickled/model.safetensors").unlink()
    torch.save(state, place / "me/pickled/pytorch_model.bin")
    shutil.copytree(theirs, place / "me/sharded")
    (place / "me/sharded/model.safetensors").unlink()
    shards = {name: f"model-0000{part}-of-00002.safetensors" for part, name in zip(cycle((1, 2)), state, strict=False)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, place / "me/sharded" / shard)
    (place / "me/sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    for name in ("tiny", "theirs", "pickled", "sharded"):
        shutil.copytree(place / "me" / name, place / "sized" / name)
    for name, folder in (("theirs", "prism-siglip+7b"), ("tiny", "deep/ours"), ("sharded", "shards")):
        shutil.copytree(place / "me" / name, place / "me/many" / folder)
    (place / "me/many/README.md").write_text("several models")
    with Hub(place) as standin:
        yield standin


@pytest.fixture(scope="module")
def online(hub: Hub) -> Iterator[Seat]:
    with hub.seat() as seat:
        yield seat


@pytest.fixture(scope="module")
def offline(hub: Hub) -> Iterator[Seat]:
    with hub.seat(HF_HUB_OFFLINE="1") as seat:
        yield seat


@pytest.fixture(scope="module")
def away(hub: Hub) -> Iterator[Seat]:
    """Nobody listens where its hub should be."""
    with hub.seat(HF_ENDPOINT="http://127.0.0.1:9") as seat:
        yield seat


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


ASK = ("-p", "What is this?")


def test_chat_with_an_id_and_again_without_a_connection(
    hub: Hub, online: Seat, offline: Seat, away: Seat, picture: str
) -> None:
    hub.asked.clear()
    first = online("chat", "me/tiny", picture, *ASK)
    assert first.code == 0, first.err
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert hub.fetched() == names
    hub.asked.clear()
    for seat, name in ((offline, "me/tiny"), (away, "me/tiny@main")):
        again = seat("chat", name, picture, *ASK)
        assert (again.code, again.out) == (0, first.out), again.err
    assert not hub.asked


def test_a_folder_here_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.save(tiny_vlm(), tmp_path / "you/tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("leveret.model.hub.fetch", lambda *_, **__: pytest.fail("the hub was asked"))
    assert locate("you/tiny").folder.resolve() == folder


@pytest.mark.parametrize("name", ["theirs", "pickled", "sharded"])
def test_a_model_of_another_tool_is_talked_to_without_converting(
    hub: Hub, online: Seat, offline: Seat, picture: str, name: str
) -> None:
    hub.asked.clear()
    done = online("chat", f"me/{name}", picture, *ASK)
    assert done.code == 0, done.err
    assert not any(file.endswith(".py") for file in hub.fetched())
    assert ("pytorch_model.bin" in hub.fetched()) == (name == "pickled")
    for given in (str(hub.place / "me" / name), f"me/{name}"):
        again = offline("chat", given, picture, *ASK)
        assert (again.code, again.out) == (0, done.out), again.err


def test_everything_takes_an_id(hub: Hub, online: Seat, picture: str, tmp_path: Path) -> None:
    data = tmp_path / "d.json"
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    data.write_text(json.dumps([{"id": "a", "image": Path(picture).name, "conversations": turns}]))
    for words in (
        ("merge", "me/tiny", "me/tiny@main", "-o", str(tmp_path / "merged")),
        ("convert", "me/theirs", str(tmp_path / "ours")),
        ("convert", "me/tiny", str(tmp_path / "hf"), "--to", "hf-llava"),
        ("show", str(data), "--images", str(tmp_path), "--model", "me/tiny", "--json"),
    ):
        done = online(*words)
        assert done.code == 0, done.err
    assert json.loads(done.out)["answer"]
    merged, tiny = (place / "model.safetensors" for place in (tmp_path / "merged", hub.place / "me/tiny"))
    assert merged.read_bytes() == tiny.read_bytes()
    assert json.loads((tmp_path / "merged/merged.json").read_text())["models"] == ["me/tiny", "me/tiny@main"]
    assert checkpoint.load(tmp_path / "ours").chat == "llama"


def test_a_model_of_the_hub_is_examined_and_gone_on_with(online: Seat, offline: Seat, tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    words = ("eval", "me/tiny", str(world), "--suite", SUITES["world"][0], "--no-blind", "--json")
    seen = []
    for seat, out in ((online, tmp_path / "a"), (offline, tmp_path / "b")):
        for n in (1, 2):  # the second goes on: it is the same model
            done = seat(*words, "-n", str(n), "-o", str(out))
            assert done.code == 0, done.err
            assert [task["n"] for task in json.loads(done.out)["tasks"].values()] == [n]
        seen.append((out / "recipe.yaml").read_text())
    assert seen[0] == seen[1]


def test_doctor_downloads_no_weights(hub: Hub, online: Seat) -> None:
    told = {}
    for name in ("sized/tiny", "sized/theirs", "sized/sharded"):
        done = online("doctor", name, "--json")
        assert done.code == 0, done.err
        told[name] = json.loads(done.out)["model"]
        home = hub.place / ".home/hub" / f"models--{name.replace('/', '--')}"
        kept = {path.name for path in home.rglob("snapshots/*/*")}
        assert "config.json" in kept and not any(file.endswith((".safetensors", ".bin")) for file in kept)
    assert told["sized/tiny"]["parameters"] == told["sized/theirs"]["parameters"]
    assert told["sized/theirs"]["parts"]["vision"] == told["sized/sharded"]["parts"]["vision"]
    assert told["sized/sharded"]["parts"]["language"]["what"].startswith("sized/sharded, ")
    assert told["sized/tiny"]["parts"] == doctor.examine(str(hub.place / "me/tiny"))["parts"]
    done = online("doctor", "sized/pickled")
    assert done.code == 2 and "its weights are pickles" in done.err
    assert online("chat", "sized/pickled", *ASK).code == 0
    done = online("doctor", "sized/pickled", "--json")  # now they are here
    assert json.loads(done.out)["model"]["parameters"] == told["sized/tiny"]["parameters"], done.err


def test_adapters_of_the_hub_are_told_without_the_weights_they_stand_on(hub: Hub, online: Seat) -> None:
    from peft import LoraConfig, get_peft_model

    shutil.copytree(hub.place / "me/tiny", hub.place / "based/tiny")
    language = checkpoint.load(hub.place / "based/tiny").language
    folder = hub.place / "based/lora"
    get_peft_model(language, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "based/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    hub.asked.clear()
    done = online("doctor", "based/lora", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["model"]
    assert told["adapters"]["base"] == "based/tiny" and told["adapters"]["layers"] == 2
    assert told["parts"] == doctor.examine(str(hub.place / "me/tiny"))["parts"]
    home = hub.place / ".home/hub"
    assert any((home / "models--based--lora").rglob("adapter_model.safetensors"))
    assert not any(file.suffix in (".safetensors", ".bin") for file in (home / "models--based--tiny").rglob("*"))


def test_a_model_in_a_folder_of_a_repository(
    hub: Hub, online: Seat, offline: Seat, away: Seat, picture: str, tmp_path: Path
) -> None:
    """Only what lies in there is fetched, by every command, and found again without a connection."""
    hub.asked.clear()
    done = online("doctor", "me/many/shards", "--json")  # before its weights are here
    assert done.code == 0, done.err
    told = json.loads(done.out)["model"]
    home = hub.place / ".home/hub/models--me--many"
    assert not any(file.suffix in (".safetensors", ".bin") for file in home.rglob("snapshots/*/*/*"))
    assert told["parameters"] == doctor.examine(str(hub.place / "me/sharded"))["parameters"]
    hub.asked.clear()
    first = online("chat", "me/many/prism-siglip+7b", picture, *ASK)
    assert first.code == 0, first.err
    assert "prism-siglip+7b/model.safetensors" in hub.fetched()
    assert all(name.startswith("prism-siglip+7b/") for name in hub.fetched())
    assert not any(name.endswith((".py", ".bin")) for name in hub.fetched())
    assert first.out == online("chat", "me/theirs", picture, *ASK).out
    hub.asked.clear()
    for seat, name in ((offline, "me/many/prism-siglip+7b"), (away, "me/many/prism-siglip+7b@main")):
        again = seat("chat", name, picture, *ASK)
        assert (again.code, again.out) == (0, first.out), again.err
    done = offline("chat", "me/many/deep/ours", picture, *ASK)
    assert done.code == 5 and "me/many/deep/ours" in done.err and "HF_HUB_OFFLINE is set" in done.err
    assert not hub.asked
    done = online("convert", "me/many/deep/ours", str(tmp_path / "out"), "--to", "llava")
    assert done.code == 0, done.err
    assert hub.fetched() and all(name.startswith("deep/ours/") for name in hub.fetched())
    for name, said in (
        ("me/many", "holds no model itself, but in folders: give me/many/deep/ours (or another of 3: "),
        ("me/many/deep", "give me/many/deep/ours"),
        ("me/many/nothing", "the hub has me/many, but no folder 'nothing' with a model in it"),
    ):
        for verb in (("chat", name, *ASK), ("doctor", name)):
            done = online(*verb)
            assert done.code == 3 and said in done.err and len(done.err.strip().splitlines()) == 1, done.err
    done = online("push", str(hub.place / "me/tiny"), "me/many/three", "--dry-run")
    assert done.code == 2 and "not a name of the hub; give OWNER/NAME" in done.err


def test_a_folder_of_models_on_this_machine_holds_folders_of_repositories_too(hub: Hub) -> None:
    found = locate("me/many/deep/ours", hub=hub.place)
    assert found.folder == hub.place / "me/many/deep/ours" and found.ours


@pytest.mark.parametrize(
    ("name", "where", "code", "said"),
    [
        ("nobody/nothing", "online", 3, "no such folder here, and the hub has no model of this name"),
        ("me/tiny@v9", "online", 3, "no revision 'v9'"),
        (GATED, "online", 5, "accepted its terms"),
        ("nobody/nothing", "offline", 5, "HF_HUB_OFFLINE is set"),
        ("nobody/nothing", "away", 5, "the hub could not be asked"),
        ("nowhere", "online", 3, "does not exist"),
        ("../nowhere/x", "online", 3, "does not exist"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(
    name: str, where: str, code: int, said: str, request: pytest.FixtureRequest
) -> None:
    for verb in (("chat", name, *ASK), ("doctor", name)):
        done = request.getfixturevalue(where)(*verb)
        if verb[0] == "chat" or "/" in name:
            assert done.code == code and said in done.err, done.err
        lines = [line for line in done.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: ")


def test_a_mistyped_path_is_told_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quickstart", "rehearsal", ".hidden"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    away = OfflineModeIsEnabled("offline")
    near, far = (hub_fault(away, f"runs/{name}") for name in ("quikstart", "zzz"))
    assert isinstance(near, DataError) and "no such folder here (runs holds quickstart, ...)" in str(near)
    assert isinstance(far, DataError) and "(runs holds quickstart, rehearsal)" in str(far)
    assert isinstance(hub_fault(away, "nobody/nothing"), EnvironmentFault)


def test_ids_and_paths_are_told_apart() -> None:
    assert as_id("BAAI/Bunny-v1_0-3B") == ("BAAI/Bunny-v1_0-3B", None)
    assert as_id("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert as_id("TRI-ML/prismatic-vlms/prism-dinosiglip+7b") == ("TRI-ML/prismatic-vlms/prism-dinosiglip+7b", None)
    assert as_id("a/b/c/d@v1") == ("a/b/c/d", "v1")
    assert parted("a/b/c/d") == ("a/b", "c/d/") and parted("a/b") == ("a/b", "")
    for path in ("/a/b", "./a/b", "../a", "~/a", "a", "a/b/", "a/b//c", "a/b/../c", "a/b/.c", "a/b@", "a/-b", "a /b",
                 "runs/../x", "a+b/c", "a/b/c d"):  # fmt: skip
        assert as_id(path) is None, path


def test_of_a_repository_only_what_a_model_is_read_from_is_fetched() -> None:
    bunny_lora = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"]
    assert to_fetch(bunny_lora) == sorted(set(bunny_lora) - {"adapter_model.bin"})
    both = [
        "config.json",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "pytorch_model-1.bin",
        "x.py",
        "x.pkl",
    ]
    assert to_fetch(both) == ["config.json", "model-1.safetensors", "model.safetensors.index.json"]
    assert to_fetch(["config.json", "pytorch_model.bin", "training_args.bin", "optimizer.pt"]) == [
        "config.json", "pytorch_model.bin",
    ]  # fmt: skip
    assert to_fetch(["mm_projector.bin", "config.json"]) == ["config.json", "mm_projector.bin"]
    factory = [f"{part}/pytorch_model.bin" for part in ("language_model", "vision_tower", "connector")]
    assert to_fetch([*factory, "other/pytorch_model.bin"]) == sorted(factory)
    assert to_fetch(["checkpoints/latest-checkpoint.pt", "config.json"]) == [
        "checkpoints/latest-checkpoint.pt", "config.json",
    ]  # fmt: skip


# --- the way there ----------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_a_model_that_others_load(hub: Hub, online: Seat, tmp_path: Path, picture: str) -> None:
    run_folder = tmp_path / "run"
    checkpoint.save(tiny_vlm(), run_folder / "model")
    (run_folder / "model/notes.txt~").write_text("x")
    done = online("push", str(run_folder), "me/new", "--private", "--json", token=TOKEN)
    assert done.code == 0, done.err
    assert hub.private["me/new"] is True and "/me/new/commit/" in json.loads(done.out)["url"]
    files = hub.committed["me/new"]
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                          "chat_template.jinja", "README.md"}  # fmt: skip
    assert files["model.safetensors"] == (run_folder / "model/model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert 'leveret.load("me/new")' in card and "4 tokens" in card and "mlp2x_gelu" in card and "`tiny`" in card
    assert card.startswith("---\nlibrary_name:") and "siglip-0" in card
    for content in (files["README.md"], files["config.json"]):
        assert str(Path(tiny_vlm().recipe.language.name).parent) not in content.decode()  # no path of this machine
    for name, content in files.items():
        (hub.place / "me/new").mkdir(exist_ok=True)
        (hub.place / "me/new" / name).write_bytes(content)
    back, here = (online("chat", given, picture, *ASK) for given in ("me/new", str(run_folder)))
    assert (back.code, back.out) == (0, here.out), back.err


def test_a_card_of_ones_own_is_kept_and_a_dry_run_asks_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.save(tiny_vlm(), tmp_path / "m")
    assert run(["push", str(folder), "me/new", "--dry-run"]) == 0
    assert "a small vision-language model" in capsys.readouterr().out.lower()
    (folder / "README.md").write_text("mine")
    told = push(folder, "me/new", dry_run=True)
    assert told["card"] == "mine" and told["url"] is None
    assert not os.path.exists(tmp_path / "me")


def test_what_is_not_whole_is_not_pushed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    begun = tmp_path / "begun"
    checkpoint.save(tiny_vlm(), begun / "align" / "model")
    with pytest.raises(DataError, match="finished run"):
        push(begun, "me/new")
    folder = checkpoint.save(tiny_vlm(), tmp_path / "m")
    for name in ("new", "a/b/c", "me/new@main", "/me"):
        with pytest.raises(RecipeError, match="give OWNER/NAME"):
            push(folder, name)
    (folder / "tokenizer_config.json").rename(folder / "t")
    with pytest.raises(DataError, match="no tokenizer"):
        push(folder, "me/new")
    (folder / "t").rename(folder / "tokenizer_config.json")
    state = load_file(folder / "model.safetensors")
    del state["connector.2.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"connector.2.bias is missing"):
        push(folder, "me/new")
    (folder / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(RecipeError, match="leveret convert"):
        push(folder, "me/new")


@pytest.mark.parametrize(
    ("name", "where", "token", "said"),
    [
        ("me/other", "online", "", "hf auth login"),
        ("others/model", "online", TOKEN, "does not let you write there"),
        ("me/other", "offline", TOKEN, "HF_HUB_OFFLINE is set"),
        ("me/other", "away", TOKEN, "could not be reached"),
    ],
)
def test_a_hub_that_does_not_take_it_is_one_clear_line(
    hub: Hub, name: str, where: str, token: str, said: str, request: pytest.FixtureRequest
) -> None:
    done = request.getfixturevalue(where)("push", str(hub.place / "me/tiny"), name, token=token)
    assert done.code == 5 and said in done.err, done.err
    assert "Traceback" not in done.err and "me/other" not in hub.committed
