"""Tasks and suites: splits in a suite, folders of a task's own name, tasks from a file, what is on disk, baselines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluate_fakes import FakeEngine, FakeModel, tiny_world, write
from leveret.cli import run
from leveret.evaluate import SUITES, TASKS, TaskRow, evaluate, load_items, score
from leveret.evaluate.baselines import chance, constants
from leveret.evaluate.forms import Item
from leveret.evaluate.prepare import check, overview
from leveret.evaluate.scorers import SCORERS, Scorer
from leveret.evaluate.sources import SOURCES
from leveret.evaluate.tables import latex, markdown
from leveret.evaluate.tasks import asked, find_files, task_row
from leveret.runs import DataError, RecipeError

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("world"))


def picture(path: Path, colour: tuple[int, int, int] = (200, 40, 40)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)


# --- suites ---------------------------------------------------------------------------------------------------------


def test_every_suite_names_tasks_that_are_there() -> None:
    for suite in SUITES:
        assert asked(suite)
    assert {entry.partition(".")[0] for entries in SUITES.values() for entry in entries} <= set(TASKS)


def test_suites_hold_nothing_twice_and_their_rows_are_told_apart() -> None:
    for entries in SUITES.values():
        assert len(set(entries)) == len(entries)
    pairs = asked("gqa.val") + asked("gqa", "testdev")
    assert [(row.id, split) for row, split in pairs] == [("gqa.val", "val"), ("gqa", "testdev")]


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no suite 'prismatik'.*prismatic"):
        asked("prismatik")
    with pytest.raises(RecipeError, match=r"no task 'popes'.*pope"):
        asked("popes.dev")


def test_two_splits_of_one_task_stand_in_one_table(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "both", ("count.train", "count.test", "shape"))
    results = evaluate(
        FakeModel(), world, "both", out=tmp_path / "o", engine=FakeEngine(), rules={"count": "own", "shape": "own"}
    )
    assert list(results["tasks"]) == ["count.train", "count.test", "shape"]
    facts = results["tasks"]
    assert facts["count.train"]["split"] == "train" and facts["count.test"]["majority_of"] == "train"
    assert facts["count.train"]["majority_of"] == "test", "a split is no twin of itself"
    assert facts["count.train"]["data"] != facts["count.test"]["data"]
    assert (tmp_path / "o/items/count.train.jsonl").is_file() and (tmp_path / "o/answers/count.test.jsonl").is_file()
    with pytest.raises(RecipeError, match="A rule is given for box, which 'both' does not ask"):
        evaluate(FakeModel(), world, "both", out=tmp_path / "p", engine=FakeEngine(), rules={"box": "own"})


def test_what_has_no_public_answers_is_asked_and_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [{"image_id": 7, "question": "What?", "question_id": 70 + k} for k in range(2)]
    write(tmp_path / "vqav2/v2_OpenEnded_mscoco_test2015_questions.json", {"questions": questions})
    hidden = load_items("vqav2", tmp_path, "server")
    assert [item.gold for item in hidden] == [None, None] and hidden[0].image is not None
    picture(Path(hidden[0].image.path))
    write(tmp_path / "tally_qa/test.json", [{"image": "a.jpg", "question": "q", "question_id": 1, "answer": 2}])
    picture(tmp_path / "tally_qa/a.jpg")
    monkeypatch.setitem(SUITES, "some", ("vqav2.server", "tally_qa"))
    engine = FakeEngine(lambda request: "2")
    results = evaluate(FakeModel(), tmp_path, "some", out=tmp_path / "o", engine=engine)
    assert list(results["tasks"]) == ["tally_qa"] and results["tasks"]["tally_qa"]["score"] == 1.0
    assert results["unscored"]["vqav2.server"]["n"] == 2
    assert len(Path(results["unscored"]["vqav2.server"]["answers"]).read_text().splitlines()) == 2
    assert not (tmp_path / "o/items/vqav2.server.jsonl").exists()
    again = FakeEngine(lambda request: "2")
    alone = evaluate(FakeModel(), tmp_path, "vqav2.server", out=tmp_path / "p", engine=again)
    assert alone["tasks"] == {} and "<section" in (tmp_path / "p/report.html").read_text("utf-8")


def test_files_may_lie_in_a_folder_of_the_tasks_name(tmp_path: Path) -> None:
    questions = [{"image": "a.jpg", "question": "q", "question_id": 1, "answer": 2}]
    write(tmp_path / "tally_qa/test.json", questions)
    write(tmp_path / "vizwiz/val.json", [{"image": "v.jpg", "question": "x", "answers": [{"answer": "a"}] * 10}])
    home, files = find_files(task_row("tally_qa"), tmp_path)
    assert home == tmp_path / "tally_qa" and [file.name for file in files] == ["test.json"]
    (item,) = load_items("tally_qa", tmp_path)
    assert item.image is not None and item.image.path == str(tmp_path / "tally_qa/a.jpg")
    (item,) = load_items("vizwiz", tmp_path)
    assert item.image is not None and item.image.path == str(tmp_path / "vizwiz/images/v.jpg")
    more = TaskRow(**{**{f: getattr(TASKS["tally_qa"], f) for f in TaskRow.__slots__}, "id": "tally_qa_ocr"})
    assert find_files(more, tmp_path)[0] == tmp_path / "tally_qa"


def test_a_suite_names_all_that_is_missing_or_asks_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tiny_world(tmp_path / "world", scenes=3)
    monkeypatch.setitem(SUITES, "some", ("colour", "count", "vqav2.server", "tally_qa", "relation"))
    colours, counts = root / "eval/colour/test_balanced_questions.json", root / "eval/count/test.json"
    kept = colours.read_bytes(), counts.read_bytes()
    counts.unlink()
    colours.write_text("{")
    write(root / "tally_qa/test.json", [{"image": "a.jpg", "question": "q", "question_id": 1, "answer": 2}])
    out, engine = tmp_path / "o", FakeEngine()

    def asked_of(skip: bool = True) -> dict[str, Any]:
        return evaluate(FakeModel(), root, "some", out=out, engine=engine, blind=False, skip_missing=skip)

    with pytest.raises(DataError, match=r"4 of the 5 tasks of 'some' cannot be asked") as fault:
        asked_of(skip=False)
    for words in (
        r"colour: unreadable: .*test_balanced_questions.json: not JSON",
        r"count: missing: the splits here are train, not test; run leveret world draw .*at .*/world/eval/count/test",
        r"vqav2.server: missing: fetch https://visualqa.org.*vqav2/v2_OpenEnded_mscoco_test2015_questions.json",
        r"tally_qa: pictures missing: 1 of 1 pictures are not there, first .*tally_qa/a.jpg",
        r"--skip-missing asks the other 1. `leveret tasks prepare .* --suite some`",
    ):
        assert re.search(words, str(fault.value)), words
    assert not engine.asked and not out.exists()
    results = asked_of()
    assert list(results["tasks"]) == ["relation"]
    assert {task: left["state"] for task, left in results["skipped"].items()} == {
        "colour": "unreadable", "count": "missing", "vqav2.server": "missing", "tally_qa": "pictures missing",
    }  # fmt: skip
    assert "- count: skipped, missing: " in (out / "results.md").read_text("utf-8")
    assert "Not scored" in (out / "report.html").read_text("utf-8")
    counts.write_bytes(kept[1])
    n, results = len(engine.asked), asked_of()
    assert list(results["tasks"]) == ["count", "relation"] and len(engine.asked) == n + 3, "only what is new is asked"
    colours.write_bytes(kept[0])
    counts.unlink()
    n, results = len(engine.asked), asked_of()
    assert list(results["tasks"]) == ["colour", "relation"] and len(engine.asked) == n + 3
    counts.write_text(kept[1].decode().replace("How many", "Count"))
    with pytest.raises(RecipeError, match=r"other data or another model:\n  questions.count"):
        asked_of()
    with pytest.raises(DataError, match=r"^Task 'existence', split 'test': no .* --suite own\)\.$"):
        evaluate(FakeModel(), tmp_path, out=tmp_path / "n", engine=engine, skip_missing=True)
    plan = ["eval", "some/model", str(root), "-o", str(tmp_path / "x"), "--suite", "some", "--dry-run"]
    assert run(plan) == 3 and "cannot be asked" in capsys.readouterr().err
    assert run([*plan, "--skip-missing"]) == 0
    assert re.search(
        r"relation +questions 3, with other pictures 3\n +vqav2.server +skipped, missing", capsys.readouterr().out
    )


def test_one_of_suite_and_task_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "m", "d", "-o", "o", "--suite", "world", "--task", "gqa"]) == 2
    assert "--suite world and --task gqa: give one of the two" in capsys.readouterr().err


def test_a_split_is_told_by_the_whole_name_of_its_file(tmp_path: Path) -> None:
    for name in ("MMBench_DEV_EN_legacy.tsv", "MMBench_TEST_EN.tsv"):
        write(tmp_path / "mmbench" / name, [])
    (row,) = (row for row in overview(tmp_path)["tasks"] if row["id"] == "mmbench")
    assert row["here"] == ["server", "test"]


# --- a task of one's own --------------------------------------------------------------------------------------------


def documented() -> str:
    text = (REPO / "docs/evaluate.md").read_text("utf-8")
    (found,) = re.findall(r"```yaml\n(# signs.yaml.*?)```", text, re.DOTALL)
    return found


@pytest.fixture
def signs(tmp_path: Path) -> tuple[Path, Path]:
    """The documented file, and data for it."""
    (tmp_path / "signs.yaml").write_text(documented())
    records = []
    for k, word in enumerate(("stop", "slow", "exit")):
        picture(tmp_path / f"data/photos/s{k}.jpg", (60 * k, 90, 40))
        records.append({"image_id": f"s{k}", "question": "Which word?", "question_id": k, "answers": [word] * 10})
    write(tmp_path / "data/signs/test.json", {"data": records})
    return tmp_path / "signs.yaml", tmp_path / "data"


def test_the_documented_task_is_asked_scored_and_listed(
    signs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data = signs
    results = evaluate(FakeModel(), data, str(file), out=tmp_path / "o", engine=FakeEngine(lambda request: "Stop."))
    (facts,) = results["tasks"].values()
    assert list(results["tasks"]) == ["signs"] and facts["score"] == pytest.approx(1 / 3) and facts["rule"] == "own"
    engine = FakeEngine(lambda request: "Stop.")
    moved = file.rename(tmp_path / "elsewhere-signs.yaml")
    moved.write_text(moved.read_text() + "\nid: signs\n")
    evaluate(FakeModel(), data, str(moved), out=tmp_path / "o", engine=engine)
    assert engine.asked == [], "the same questions, wherever the file lies"
    told = score(str(moved), tmp_path / "o/answers/signs.jsonl", data)
    assert told["score"] == pytest.approx(facts["score"])
    assert run(["score", str(moved), str(tmp_path / "o/answers/signs.jsonl"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "signs"
    assert run(["tasks", "list", "--task", str(moved), "--data", str(data)]) == 0
    assert "What does the sign say? [test]" in re.sub(" +", " ", capsys.readouterr().out)
    assert run(["eval", "some/model", str(data), "-o", str(tmp_path / "x"), "--task", str(moved), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("form: textvq\nfiles: a\nrule: own", r"form: given 'textvq'.*did you mean 'textvqa'"),
        ("form: own\nfiles: a\nrule: own\npromt: x", r"promt: unknown key.*did you mean 'prompt'"),
        ("form: own\nfiles: a\nrule: pop", r"rule: given 'pop'.*'pope'"),
        ("form: own\nfiles: a\nrule: own\nmax_new_tokens: 0", r"max_new_tokens: given 0"),
        ("form: own\nfiles: ../a\nrule: own", r"files: .*without '\.\.'"),
        ("form: own\nfiles: /etc/a\nrule: own", r"below the data folder"),
        ("form: own\nfiles: a", r"give `rule`, or `rules`.*neither is there"),
        ("form: own\nfiles: a\nrule: own\nrules: {x: own}", r"both are there"),
        ("form: own\nfiles: a\nrule: own\nheadline: acuracy", r"headline.*did you mean 'accuracy'"),
        ("form: own\nfiles: a\nrule: own\nid: a/b", r"id: "),
        ("- a", r"a mapping"),
    ],
)
def test_faults_of_a_task_file_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        task_row(str(tmp_path / "my.yaml"))


def test_a_task_file_that_is_not_there_and_a_prompt_over_no_field(signs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not there"):
        asked(str(tmp_path / "no.yaml"))
    file, data = signs
    file.write_text(file.read_text().replace("{question}", "{quesion}"))
    with pytest.raises(DataError, match=r"the prompt asks for \{quesion\}"):
        load_items(str(file), data)


# --- what is on disk ------------------------------------------------------------------------------------------------


def test_the_list_tells_every_task(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = overview(world)
    by = {row["id"]: row for row in found["tasks"]}
    assert set(by) == set(TASKS) and found["suites"].keys() == SUITES.keys()
    assert "test" in by["colour"]["here"] and by["gqa"]["here"] == [] and by["existence"]["here"]
    assert by["pope"]["rules"]["bunny"].startswith("POPE") and "prismatic" in by["pope"]["suites"]
    assert run(["tasks", "list", "--json"]) == 0
    assert all(row["here"] is None for row in json.loads(capsys.readouterr().out)["tasks"])


def test_every_benchmark_has_a_place_it_is_published_at() -> None:
    from leveret.evaluate.tasks.field import FIELD

    assert {row.id for row in FIELD} <= set(SOURCES)


def pope(root: Path, n: int = 2) -> None:
    for category in ("random", "popular", "adversarial"):
        rows = [{"question_id": k, "image": "a.jpg", "text": "Is it?", "label": "yes"} for k in range(n)]
        write(root / f"pope/coco/coco_pope_{category}.json", rows)


def test_prepare_names_what_is_missing_and_where_it_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> tuple[str, str]:
        (record,) = check(tmp_path, "pope")
        return record["state"], record.get("mend", "")

    kind, mend = state()
    assert kind == "missing" and str(tmp_path / "pope/coco/coco_pope_*.json") in mend
    assert "github.com/RUCAIBox/POPE" in mend and str(tmp_path / "pope/val2014") in mend
    pope(tmp_path)
    kind, mend = state()
    assert kind == "other version" and "e3e39262" in mend
    (tmp_path / "pope/coco/coco_pope_random.json").write_text("not json\n")
    assert state()[0] == "unreadable"
    assert run(["tasks", "prepare", str(tmp_path), "--suite", "pope", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["ready"] is False
    assert run(["tasks", "prepare", str(tmp_path), "--suite", "gqa"]) == 3
    shown = capsys.readouterr().out
    assert "gqa " in shown and "missing" in shown and "cs.stanford.edu" in shown


def test_prepare_of_what_is_whole(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {record["state"] for record in check(world, "world")} == {"ready"}
    assert run(["tasks", "prepare", str(world), "--suite", "world"]) == 0
    write(tmp_path / "vsr/test.jsonl", [{"image": "a.jpg", "caption": "c", "label": 1}] * 1222)
    (record,) = check(tmp_path, "vsr")
    assert record["state"] == "pictures missing" and record["questions"] == 1222 and record["pictures_missing"] == 1
    picture(tmp_path / "vsr/images/a.jpg")
    (record,) = check(tmp_path, "vsr")
    assert record["state"] == "ready" and "mend" not in record


# --- baselines and tables -------------------------------------------------------------------------------------------


def item(name: str, gold: Any, **meta: Any) -> Item:
    return Item(name, None, "?", gold, meta={"image_id": name, **meta})


def test_chance_is_of_the_options_offered() -> None:
    letters = SCORERS["scienceqa"]
    mixed = [item("a", 0, choices=2), item("b", 1, choices=4)]
    assert chance("accuracy", mixed, letters) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert chance("accuracy", [item("a", 0, choices=["x", "y", "z"])], letters) == pytest.approx(1 / 3)
    assert chance("accuracy", [item("a", 0, choices={"A": "x", "C": "y"})], letters) == pytest.approx(1 / 2)
    open_too = [item("a", 0, choices=4), item("b", 0, choices=4), item("c", 1)]
    assert chance("accuracy", open_too, letters) == pytest.approx((1 / 4 + 1 / 4 + 0) / 3)
    assert chance("accuracy", [item("a", 3)], SCORERS["tally_qa_integers"]) is None
    truths = [item(str(k), bool(k % 2)) for k in range(4)]
    assert chance("accuracy", truths, SCORERS["vsr_true_false"]) == 0.5
    assert chance("accuracy", truths[:1], SCORERS["vsr_true_false"]) == 0.5, "one gold alone still has two words"


def test_rules_over_probabilities_have_baselines_too() -> None:
    row = task_row("vsr")
    rule = SCORERS[row.rules["prismatic_probabilities"]]
    truths = [item(str(k), k % 4 > 0) for k in range(8)]
    assert chance("accuracy", truths, rule) == 0.5
    best = constants(row, REPO / "nowhere", rule, truths)
    assert best.of == "test" and json.loads(best.answers[""]) == [1, 0]
    assert sum(rule.judge(one, best.answers[""]).score for one in truths) == 6


def test_the_best_constant_is_the_best_by_the_headline() -> None:
    row = task_row("pope")
    rule = SCORERS[row.rules["bunny"]]
    items = [item(str(k), "yes" if k % 5 < 2 else "no", group="random") for k in range(100)]
    assert constants(row, REPO / "nowhere", rule, items).answers == {"": "yes"}, "always no has no F1 at all"


def test_chance_of_an_f1_is_a_half_where_half_is_yes() -> None:
    items = [item(str(k), "yes" if k % 2 else "no", group="random") for k in range(400)]
    assert chance("F1, mean of parts", items, SCORERS["pope"]) == pytest.approx(0.5, abs=0.02)


def test_no_constant_without_known_answers(world: Path) -> None:
    row, items = task_row("shape"), load_items("shape", world)
    shown = SCORERS["gqa"]
    assert constants(row, world, shown, items).answers[""] == "square"
    silent = Scorer("r", shown.judge, lambda i: "", shown.summary)
    assert constants(TaskRow("x", "gqa", {}, ("no",), "", "", 1), world, silent, items).answers == {}


def test_tables_stand_beside_published_figures() -> None:
    def facts(rule: str, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "score": 0.5, "ci95": [0.4, 0.6], "n": 1000, "chance": None, "majority": 0.25, "majority_of": "test",
            "blind": None, "unparsable": 3, "headline": "accuracy", "rule": rule, "rule_says": "a_b & 5 %",
            "metrics": metrics, "split": "test", **more,
        }  # fmt: skip

    results = {
        "seconds": {"answer": 1.0},
        "tasks": {
            "pope": facts("bunny", {"average_f1": 0.8612}, n=8910),
            "gqa": facts("lmms_eval", {"accuracy": 61.23}),
            "mmbench": facts("x", {"Overall": 0.685}),
            "my_task": facts("own", {}),
        },
    }
    results["tasks"]["pope"]["n"] = 1000
    assert "| 61.2\u2020 | 86.1\u2020 |" in markdown(results), "a part of the questions is no like quantity"
    results["tasks"]["pope"]["n"] = 8910
    text = markdown(results)
    assert "| my_task | 0.500 | 0.400 - 0.600 | 1,000 | - | 0.250* | - | 3 |" in text
    bunny = text.partition("Beside Bunny")[2].partition("Beside LLaVA")[0]
    assert "| model | MMB-D | GQA | POPE |" in bunny and "| this model | 68.5\u2020 | 61.2\u2020 | 86.1 |" in bunny
    assert "| Bunny-v1.0-3B | 68.6 | 62.5 | 86.8 |" in bunny and "another rule" in bunny and "08273ac" in bunny
    assert "| Prism-CLIP-7B |" in text.partition("Beside Prismatic")[2]
    paper = latex(results)
    assert r"my\_task & 0.500 & 0.400--0.600" in paper and r"61.2$^\dagger$" in paper and "\u2020" not in paper
    assert paper.count(r"\begin{tabular}") == paper.count(r"\end{tabular}") == 5
    for table in re.findall(r"\\toprule\n(.*?)\\bottomrule", paper, re.DOTALL):
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert len({line.count(" & ") for line in rows}) == 1


def test_published_tables_are_whole() -> None:
    from leveret.evaluate.published import PUBLISHED

    for table in PUBLISHED:
        assert table.source and table.scored
        assert {len(figures) for figures in table.models.values()} == {len(table.columns)}
        assert all(column.task in SOURCES for column in table.columns)


@pytest.mark.goldens
def test_published_columns_name_figures_that_the_official_scripts_print(goldens: Path) -> None:
    from leveret.evaluate.published import PUBLISHED

    checked = 0
    for column in (column for table in PUBLISHED for column in table.columns):
        file = goldens / "eval" / column.task.removesuffix("_ocr") / "expected.json"
        told = json.loads(file.read_text("utf-8"))["scores"] if file.exists() else {}
        found = [told[rule]["metrics"] for rule in column.rules if rule in told]
        for key in column.metric.split("."):
            found = [value[key] for value in found if key in value]
        # POPE's own script prints its three parts and no mean.
        assert found or not set(column.rules) & set(told), column
        assert all(isinstance(value, int | float) for value in found)
        checked += len(found)
    assert checked > 10 or not any((goldens / "eval").iterdir())


def test_results_tell_what_they_are_of(world: Path, tmp_path: Path) -> None:
    one = evaluate(FakeModel(), world, "count", out=tmp_path / "a", engine=FakeEngine(), blind=False)
    facts = one["tasks"]["count"]
    assert one["model"] == "fake-1" and one["suite"] == "count" and one["root"] == str(world)
    for key in ("version", "prompts", "data"):
        assert re.fullmatch("[0-9a-f]{16}", facts[key])
    few = evaluate(FakeModel(), world, "count", out=tmp_path / "b", engine=FakeEngine(), blind=False, n=3)
    again = few["tasks"]["count"]
    assert again["data"] == facts["data"] and again["version"] == facts["version"]
    assert again["prompts"] != facts["prompts"]


def test_a_part_of_a_task_is_scored_by_the_name_it_has_in_a_suite(world: Path, tmp_path: Path) -> None:
    evaluate(FakeModel(), world, "count.train", out=tmp_path / "o", engine=FakeEngine(), blind=False)
    told = score("count.train", tmp_path / "o/answers/count.train.jsonl", world)
    assert told["task"] == "count.train" and told["n"] == 12
    with pytest.raises(DataError, match=r"answers to 'count.train', and 'relation.test' was to be scored"):
        score("relation.test", tmp_path / "o/answers/count.train.jsonl", world)
