"""What a run ran on."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = (
    "leveret", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "pillow", "pyarrow",
    "numpy", "scipy", "pydantic", "PyYAML", "typer", "rich", "jinja2", "fastapi", "uvicorn", "ray", "tensorboard",
    "wandb", "bitsandbytes", "gguf",
)  # fmt: skip


def cores() -> int:
    """Cores this process may use, which in a container or under taskset is fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Python, platform, versions of the packages that matter (none is imported), cores, the checkout's git state."""
    import platform

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cores(),
        "packages": dict(_versions()),
        "git": _git_state(),
    }


@cache
def _versions() -> dict[str, str]:
    """Of the packages that are installed. Once a process: what it imported does not change under it."""
    from importlib import metadata

    from leveret import __version__

    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions["leveret"] = __version__  # a source tree on the path has no metadata, or another version's
    return versions


def _git_state() -> dict[str, Any] | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    import subprocess

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
