"""What every test stands on: no network, one thread per worker, test data that may be absent, a browser for pages."""

# ruff: noqa: E402  (threads and offline switches must be set before anything else is imported)
from __future__ import annotations

import os
import signal

# Before anything imports torch: each xdist worker keeps to one thread, and nothing asks a hub for anything.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ipaddress
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from leveret.runs import machine

if TYPE_CHECKING:
    from browser_pipe import Browser
    from page_hands import Hands

REPO = Path(__file__).resolve().parents[1]

# The machine decides how long an example takes, not the property; the same examples every time, here and in CI.
settings.register_profile("leveret", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("leveret")

# A shell lets what it starts in the background ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _shared(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, REPO.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set {variable} to the folder that holds the {default}")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Answers with the official scripts' scores; LEVERET_GOLDENS names another place."""
    return _shared("LEVERET_GOLDENS", "goldens")


@pytest.fixture(scope="session")
def parity() -> Path:
    """Small checkpoints written by the three systems, with their outputs; LEVERET_PARITY names another place."""
    return _shared("LEVERET_PARITY", "parity")


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of real photographs; LEVERET_PHOTOS names another place."""
    return _shared("LEVERET_PHOTOS", "photos")


@pytest.fixture(scope="session", autouse=True)
def _one_look_at_git() -> None:
    """The checkout's state is asked of git for every run folder; of one test run it is the same."""
    machine._git_state = cache(machine._git_state)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _is_here(host: Any) -> bool:
    if host in (None, "", b"", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
        return address.is_loopback or address.is_unspecified  # 0.0.0.0: all addresses of this machine
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that reaches for the network, also when the code under test swallows the error."""
    reached: list[str] = []

    def refuse(where: Any) -> None:
        reached.append(str(where))
        raise OSError(f"tests may not use the network: {where}")

    def guarded(original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(args[position][0]):
                refuse(args[position])
            return original(self, *args, **kwargs)

        return call

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        return real_lookup(host, *args, **kwargs) if _is_here(host) else refuse(host)

    real_lookup = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect, 0))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex, 0))
    monkeypatch.setattr(socket.socket, "sendto", guarded(socket.socket.sendto, -1))
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    yield
    if reached:
        pytest.fail(f"this test reached for the network: {', '.join(reached)}")


Screenshot = Callable[..., Path]


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of a Chromium.

    Skips where there is no browser; with CI=true on Linux a missing one fails, so that the check cannot vanish.
    """
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        message = "no Chromium on PATH: pages are not looked at (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true" and sys.platform == "linux":
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def chromium(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Screenshot:
    """`chromium(page, name, width=1100, height=1400, dark=False) -> Path` of a PNG, by headless Chromium."""
    folder = tmp_path_factory.mktemp("screenshots")

    def screenshot(page: Path, name: str, width: int = 1100, height: int = 1400, dark: bool = False) -> Path:
        picture = folder / f"{name}.png"
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", f"--screenshot={picture}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []), page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert picture.exists(), f"Chromium made no picture: {done.stderr[-2000:]}"
        return picture

    return screenshot


@pytest.fixture(scope="module")
def chrome(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that tests drive."""
    from browser_pipe import Browser

    started = Browser(browser, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def page(chrome: Browser) -> Iterator[Hands]:
    """The chat page in that browser, in front of a server of its own (`page_hands.opened`)."""
    from page_hands import opened

    with opened(chrome) as hands:
        yield hands
