"""The command line: quick, honest about what went wrong, and readable by machines."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leveret import cli, doctor
from leveret.runs import DataError, EnvironmentFault, Interrupted, RecipeError


def leveret(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "leveret.cli", *args], capture_output=True, text=True, **more)


@pytest.mark.parametrize(
    "args", [("--help",), ("train", "--help"), ("condense", "-h"), ("--version",), ("pool", "check", "-h")]
)
def test_help_imports_nothing_heavy(args: tuple[str, ...]) -> None:
    code = """
        import sys
        from leveret import cli
        code = cli.run(sys.argv[1:])
        heavy = {"torch", "transformers", "peft", "numpy", "scipy", "pyarrow", "PIL", "yaml", "jinja2"}
        # Newer typers build a verb's own parameters with pydantic; the help everybody sees first needs none.
        heavy |= {"pydantic"} if sys.argv[1:] in (["--help"], ["--version"]) else set()
        light = ("leveret.cli", "leveret.runs")
        rooms = [name for name in sys.modules if name.startswith("leveret.") and not name.startswith(light)]
        print("LOADED", *sorted(heavy & set(sys.modules)), *sorted(rooms))
        sys.exit(code)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "LOADED"
    assert len(done.stdout) > 20


def test_the_verbs_of_the_stations_that_are_here_are_listed() -> None:
    listed = leveret("--help").stdout
    for verb in (
        "quickstart",
        "embed",
        "condense",
        "train",
        "eval",
        "score",
        "chat",
        "serve",
        "show",
        "doctor",
        "pool",
        "world",
    ):
        assert f" {verb} " in listed


@pytest.fixture
def station(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of the station behind `leveret doctor`."""

    def put(function: Callable[..., Any]) -> None:
        monkeypatch.setattr(doctor, "doctor", function)

    return put


def raising(error: BaseException) -> Callable[..., Any]:
    def function() -> None:
        raise error

    return function


class HubError(OSError):
    """Stands for the hub library's own errors, which are known by the module they come from."""


HubError.__module__ = "huggingface_hub.errors"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("no recipe 'x'"), 2, "no recipe 'x'"),
        (DataError("a.json is torn"), 3, "a.json is torn"),
        (Interrupted("saved at step 3"), 4, "saved at step 3"),
        (EnvironmentFault("no room"), 5, "no room"),
        (KeyboardInterrupt(), 4, "the same command goes on"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 5, "the disk is full: /data/x"),
        (OSError(errno.EFBIG, "File too large", "/data/x"), 5, "larger than may be written here: /data/x. `ulimit -f`"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"),
            3,
            "no such file or directory: a.json",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 5, "not allowed: /data/x"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), 5, "pip install 'leveret[track]'"),
        (ModuleNotFoundError("No module named 'peft'", name="peft.utils"), 5, "'peft' is not installed"),
        (HubError("offline mode\nmore"), 5, "model hub"),
        (ConnectionRefusedError(111, "Connection refused"), 5, "no connection"),
        (FileExistsError(errno.EEXIST, "File exists", "/data/x"), 3, "a file of that name is there: /data/x"),
        (OSError("x is no local folder"), 5, "x is no local folder"),
        (MemoryError("7 GiB"), 5, "out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_person_can_mend_is_one_clear_line(
    error: BaseException, code: int, said: str, station: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    station(raising(error))
    assert cli.run(["doctor", "--json"]) == code
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("oops"),
        ValueError("oops"),
        ModuleNotFoundError("oops", name="leveret.gone"),
        AssertionError("oops"),
    ],
)
def test_our_own_faults_ask_to_be_reported(error: Exception, station: Any, capsys: pytest.CaptureFixture[str]) -> None:
    station(raising(error))
    assert cli.run(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "oops" in err and "report" in err and "leveret doctor" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["doctor", "--jsn"], "No such option"),
        (["embed"], "Missing argument"),
        (["embed", "x", "-o", "y", "--limit-share", "7"], "--limit-share"),
    ],
)
def test_usage_errors_are_2(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 2
    out, err = capsys.readouterr()
    assert not out and said in err


def test_mistakes_end_with_their_code_in_a_real_process(tmp_path: Path) -> None:
    data = leveret("pool", "check", str(tmp_path / "nothing.json"), "-o", str(tmp_path / "out"))
    assert data.returncode == 3 and "nothing.json" in data.stderr and "Traceback" not in data.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "r.yaml").write_text("nmae: x\n")
    recipe = leveret("train", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run"))
    assert recipe.returncode == 2 and "did you mean 'name'" in recipe.stderr and "Traceback" not in recipe.stderr


def test_json_is_alone_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake: Any = types.ModuleType("leveret.quickstart")

    def run(out: Path, **_: Any) -> Path:
        print("a chatty station")
        return out

    fake.run = run
    monkeypatch.setitem(sys.modules, "leveret.quickstart", fake)
    import leveret as package

    monkeypatch.setattr(package, "quickstart", fake, raising=False)
    assert cli.run(["quickstart", "-o", "here", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"out": "here"} and "a chatty station" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_4(number: int) -> None:
    code = """
        import sys, time
        from leveret import cli, doctor
        def wait():
            print("up", file=sys.stderr, flush=True)
            time.sleep(60)
        doctor.doctor = wait
        sys.argv = ["leveret", "doctor"]
        cli.main()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stderr.readline() == "up\n"
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 4 and "the same command goes on" in err and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_drama() -> None:
    code = """
        import sys
        from leveret import cli, doctor
        doctor.doctor = lambda: {str(i): "x" * 100 for i in range(100_000)}
        sys.argv = ["leveret", "doctor", "--json"]
        cli.main()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.wait(timeout=60) == 4


def test_doctor_tells_what_is_here() -> None:
    done = leveret("doctor", "--json", env={**os.environ, "OMP_NUM_THREADS": "1"})
    facts = json.loads(done.stdout)
    assert facts["devices"][0]["id"] == "cpu" and facts["packages"]["torch"] and facts["cores"] >= 1
    assert set(facts["fits"]["cpu"]) == {way.name for way in doctor.WAYS}
    assert facts["devices"][0]["bf16"] in ("fast", "emulated: slow") and facts["devices"][0]["int8"] in (
        "fast",
        "not used",
    )
    told = leveret("doctor")
    assert told.returncode == 0 and "This machine" in told.stdout and "Devices" in told.stdout


def test_the_public_api_is_lazy_and_rooms_are_callable() -> None:
    code = """
        import sys, leveret
        assert not any(name.startswith("leveret.") for name in sys.modules), sys.modules
        from leveret import Sample
        assert Sample.__module__ == "leveret.records" and "torch" not in sys.modules
        import leveret.train                # the room first, the verb after
        assert callable(leveret.train) and leveret.train.__path__
        leveret.train.train = lambda *a, **k: (a, k)
        print(leveret.train("x", out="y"), sorted(dir(leveret)))
        try: leveret.nothing
        except AttributeError as error: print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(('x',), {'out': 'y'})" in done.stdout and "no attribute 'nothing'" in done.stdout
