"""Run folders and files: nothing is ever half written, nothing is silently mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret import runs
from leveret.runs import DataError, EnvironmentFault, Interrupted, Progress, RecipeError, RunFolder
from leveret.world.write import WorldSize, draw


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.txt"
    runs.atomic_write(path, "old")

    def full(_: Any, __: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        runs.atomic_write(path, b"new")
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_a_killed_writer_never_leaves_a_part(tmp_path: Path) -> None:
    script = f"""
        import itertools
        from leveret.runs import atomic_write
        print("go", flush=True)
        for letter in itertools.cycle("ab"):
            atomic_write({str(tmp_path / "x")!r}, letter * 300_000)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    while not (tmp_path / "x").exists():
        assert process.poll() is None
    for _ in range(20):
        text = (tmp_path / "x").read_text()
        assert len(text) == 300_000 and len(set(text)) == 1
    process.kill()
    process.wait()
    text = (tmp_path / "x").read_text()
    assert len(text) == 300_000 and len(set(text)) == 1


rows = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.booleans()), max_size=5)


@given(rows=rows, cut=st.integers(0, 400))
def test_a_log_cut_anywhere_loses_at_most_its_last_line(
    rows: list[dict[str, Any]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    path.touch()
    for row in rows:
        runs.append_jsonl(path, row)
    data = path.read_bytes()
    kept = data[: max(0, len(data) - cut)]
    path.write_bytes(kept)
    whole = kept.count(b"\n")
    # A line that lost only its end is a whole record still.
    survivors = rows[: whole + (1 if data[len(kept) : len(kept) + 1] == b"\n" else 0)]
    assert runs.read_jsonl(path) == survivors
    runs.repair_jsonl(path)
    runs.append_jsonl(path, {"more": 1})
    assert runs.read_jsonl(path) == [*survivors, {"more": 1}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        runs.read_jsonl(path)
    with pytest.raises(DataError, match="no such file"):
        runs.read_jsonl(tmp_path / "b.jsonl")
    (tmp_path / "c.json").write_text('{"a": 1,}')
    with pytest.raises(DataError, match="line 1, column"):
        runs.read_json(tmp_path / "c.json")


def test_what_json_cannot_hold_is_written_plainly(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    runs.write_json(
        tmp_path / "a.json",
        {
            "nan": float("nan"),
            "np": np.float32(0.5),
            "array": np.arange(3),
            "path": Path("x"),
            "t": (1, 2),
            "s": {"b", "a"},
        },
    )
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "nan": None, "np": 0.5, "array": [0, 1, 2], "path": "x", "t": [1, 2], "s": ["a", "b"],
    }  # fmt: skip


def test_hashes_follow_content(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_text("1")
    first = runs.sha256_of(tmp_path / "d")
    assert runs.sha256_of(tmp_path / "d/a") == runs.sha256_of(b"1") != runs.sha256_of("1")
    (tmp_path / "d/a").write_text("2")
    assert runs.sha256_of(tmp_path / "d") != first
    assert runs.sha256_of({"a": 1, "b": (2,)}) == runs.sha256_of({"b": [2], "a": 1})


def test_a_run_folder_is_opened_again_only_with_its_own_recipe(tmp_path: Path) -> None:
    recipe = {"name": "x", "stages": {"align": {"lr": 2e-5, "betas": (0.9, 0.95)}}, "seed": 0}
    run = RunFolder.open(tmp_path / "run", "train", recipe)
    run.log(step=1, loss=float("inf"))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run.done("align", steps=10)

    again = RunFolder.open(tmp_path / "run", "train", recipe)
    again.log(step=2)
    assert runs.read_jsonl(again.path / "metrics.jsonl") == [{"step": 1, "loss": None}, {"step": 2}]
    assert (
        again.is_done("align") and again.facts("align") == {"step": "align", "steps": 10} and not again.is_done("tune")
    )
    record = runs.read_json(run.path / "environment.json")
    assert record["kind"] == "train" and record["resumed"] == [] and record["packages"]["leveret"]

    with pytest.raises(RecipeError) as fault:
        RunFolder.open(tmp_path / "run", "train", {**recipe, "stages": {"align": {"lr": 1e-3}}, "new": 1})
    text = str(fault.value)
    assert "stages.align.lr: 2e-05 there, 0.001 now" in text and "new: nothing there, 1 now" in text
    assert "stages.align.betas.0: 0.9 there, nothing now" in text and "seed" not in text and "-o" in text
    with pytest.raises(RecipeError, match="`train` run, not `condense`"):
        RunFolder.open(tmp_path / "run", "condense", recipe)


def test_folders_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"holds thesis\.tex"):
        RunFolder.open(tmp_path, "train", {})
    with pytest.raises(RecipeError, match="is a file"):
        RunFolder.open(tmp_path / "thesis.tex", "train", {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_resume_elsewhere_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder.open(tmp_path / "run", "train", {"a": 1})
    there = {**runs.environment(), "cores": 64}
    monkeypatch.setattr("leveret.runs.folders.environment", lambda: there)
    for _ in range(2):
        RunFolder.open(tmp_path / "run", "train", {"a": 1})
    assert [old["cores"] for old in runs.read_json(tmp_path / "run/environment.json")["resumed"]] == [64]


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    script = f"""
        import sys
        from leveret.runs import RunFolder
        RunFolder.open({str(tmp_path / "run")!r}, "train", {{}})
        print("open", flush=True)
        sys.stdin.readline()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    with pytest.raises(EnvironmentFault, match="another process"):
        RunFolder.open(tmp_path / "run", "train", {})
    with pytest.raises(EnvironmentFault, match="another process"):
        draw(tmp_path / "run", size=WorldSize(web=2, tune=4, test=5, harder=0, captions=0))
    process.kill()  # kill -9 frees the folder
    process.communicate()
    RunFolder.open(tmp_path / "run", "train", {})


def test_a_folder_that_may_not_be_written_is_not_called_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root may write everywhere, so the system's refusal is played
        patch.setattr("builtins.open", refused)
        with pytest.raises(EnvironmentFault, match="no right to write in this folder"):
            RunFolder.open(tmp_path / "run", "train", {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        with pytest.raises(EnvironmentFault, match="no right to write in this folder"):
            RunFolder.open(tmp_path / "other", "train", {})


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (b"name: [x\n", "not YAML at line 2, column 1"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"", "it holds no fields"),
        (b"- 1\n", "it holds no fields"),
        (b"a: \x00", "not YAML"),
    ],
)
def test_a_damaged_recipe_is_named(tmp_path: Path, held: bytes, why: str) -> None:
    recipe = {"seed": 0}
    RunFolder.open(tmp_path, "train", recipe)
    (tmp_path / "recipe.yaml").write_bytes(held)
    for use in (RunFolder.open, RunFolder.peek, RunFolder.adopt):
        with pytest.raises(DataError, match=f"recipe.yaml is damaged: {why}.*-o"):
            use(tmp_path, "train", recipe)
    assert (tmp_path / "recipe.yaml").read_bytes() == held


def test_a_file_that_may_not_grow_is_named(tmp_path: Path) -> None:
    """The system's own fault tells no name. In a process of its own: the bound holds for all its files."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from leveret.runs import append_jsonl, atomic_write

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for write, given in ((atomic_write, "x" * 5000), (append_jsonl, ["x" * 5000])):
            path = Path(sys.argv[1], write.__name__)
            try:
                write(path, given)
            except OSError as fault:
                assert fault.filename == str(path), fault
            else:
                raise SystemExit("nothing was raised")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True)
    assert [item.name for item in tmp_path.iterdir()] == ["append_jsonl"]


def test_a_look_at_a_run_changes_nothing_and_refuses_what_opening_would(tmp_path: Path) -> None:
    assert RunFolder.peek(tmp_path / "run", "train", {"a": 1}) == []
    assert not (tmp_path / "run").exists()
    RunFolder.open(tmp_path / "run", "train", {"a": 1}).done("draw")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert RunFolder.peek(tmp_path / "run", "train", {"a": 1}) == ["draw"]
    with pytest.raises(RecipeError, match="a: 1 there, 2 now"):
        RunFolder.peek(tmp_path / "run", "train", {"a": 2})
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_stop_is_asked_once_softly(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="saved at 3") as stopped:
        with runs.graceful_stop(), runs.graceful_stop():
            for step in range(10):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                if runs.stop_requested():
                    raise Interrupted(f"saved at {step}")
    assert stopped.value.exit_code == 4 and not runs.stop_requested()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Interrupted):  # a request nobody polled is not lost
        with runs.graceful_stop():
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with runs.graceful_stop():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert "stopping as soon as the work is saved" in capsys.readouterr().err


def test_progress_without_a_terminal_is_lines_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("leveret.runs.progress.time.monotonic", lambda: now[0])
    with Progress(100, "embedding", "images") as progress:
        for _ in range(10):
            now[0] += 6.0
            progress.advance(10, loss=0.25)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == 6
    assert lines[0] == "embedding: 20 of 100 images  1.667 images/s  loss 0.25  0:48 left"
    assert lines[-1].endswith("done in 1:00")


@pytest.mark.parametrize(
    ("name", "near"),
    [("siglp", ["siglip"]), ("bunny", ["bunny/v1.0-3b"]), ("SIGLIP", ["siglip"]), ("zzzz", []), ("", [])],
)
def test_closest_names(name: str, near: list[str]) -> None:
    assert runs.closest(name, ["siglip", "clip-l", "bunny/v1.0-3b"])[:1] == near


def test_the_environment_is_read_without_importing_what_it_names() -> None:
    code = (
        "import sys; from leveret.runs import environment as e; print(sorted(set(sys.modules) & set(e()['packages'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['leveret']"


@pytest.mark.parametrize(
    ("text", "number"), [("3GB", 3 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("77", 77), ("2 kib", 2048)]
)
def test_memory_is_read_as_people_write_it(text: str, number: int) -> None:
    assert runs.bytes_of(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "3 apples", "1e9"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="write it as 3GB"):
        runs.bytes_of(text)
