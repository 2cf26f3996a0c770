"""`leveret doctor`: what is installed, what this machine has, and what fits on it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from leveret.runs import cores, environment

EXTRAS = {
    "serve": ("fastapi", "uvicorn"),
    "ray": ("ray",),
    "track": ("tensorboard", "wandb"),
    "quant": ("bitsandbytes",),
    "gguf": ("gguf",),
}

GIB = 1024**3
ROOM = 0.85  # of a device's memory; the rest goes to activations, the runtime and fragmentation


@dataclass(frozen=True)
class Way:
    """One way to use a language model, and the bytes it needs for every parameter."""

    name: str
    bytes_each: float
    why: str


WAYS = (
    Way("answer", 2.0, "weights in bf16"),
    Way(
        "tune with LoRA",
        2.7,
        "frozen weights in bf16; adapters of 4 %, with fp32 copies, gradients and Adam's two moments",
    ),
    Way("tune in full", 16.0, "fp32 weights, gradients and Adam's two moments"),
)

SIZES = (
    ("the drawn world's", 2.4e6), ("SmolLM2-135M", 135e6), ("Qwen2.5-0.5B", 494e6), ("TinyLlama-1.1B", 1.1e9),
    ("Phi-1.5", 1.4e9), ("Phi-2", 2.8e9), ("Bunny-v1.0-3B", 3.2e9), ("Phi-3-mini", 3.8e9), ("7B", 7e9), ("13B", 13e9),
)  # fmt: skip


def doctor() -> dict[str, Any]:
    """Facts about this machine, as plain data.

    memory, disk and device memory are in bytes; `fits` names, per device and way, the largest known model whose
    weights and optimiser state fit in 85 % of the memory. `problems` holds what should be mended, in words.
    """
    facts = environment()
    facts["memory"] = _memory()
    facts["disk_free"] = shutil.disk_usage(Path.cwd()).free
    facts["extras"] = {name: all(_installed(package) for package in packages) for name, packages in EXTRAS.items()}
    facts["devices"] = _devices(facts["memory"])
    facts["fits"] = {
        device["id"]: {way.name: _largest(device["memory"], way) for way in WAYS} for device in facts["devices"]
    }
    facts["cache"] = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    facts["problems"] = _problems(facts)
    return facts


def _installed(package: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


def _memory() -> int | None:
    """Bytes this process may use: the machine's, or the container's limit where that is less."""
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text()))
    return min(limits) if limits else None


def _devices(memory: int | None) -> list[dict[str, Any]]:
    """The CPU first, then accelerators. Empty without torch."""
    if not _installed("torch"):
        return []
    import torch

    devices: list[dict[str, Any]] = [
        {"id": "cpu", "name": _cpu_name(), "memory": memory, "bf16": _cpu_bf16(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        fast = properties.major >= 8
        devices.append(
            {
                "id": f"cuda:{index}",
                "name": properties.name,
                "memory": properties.total_memory,
                "bf16": "fast" if fast else "emulated: slow",
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        devices.append({"id": "mps", "name": "Apple GPU", "memory": memory, "bf16": "fast"})
    return devices


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_bf16() -> str:
    """How bf16 runs on this CPU: its own instructions, torch's emulation, or nothing known."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    if "amx_bf16" in flags:
        return "fast (AMX)"
    if "avx512_bf16" in flags or "bf16" in flags:
        return "fast"
    return "emulated: slow" if flags else "not known"


def _largest(memory: int | None, way: Way) -> str | None:
    if memory is None:
        return None
    fitting = [name for name, parameters in SIZES if parameters * way.bytes_each <= ROOM * memory]
    return fitting[-1] if fitting else None


def _problems(facts: dict[str, Any]) -> list[str]:
    problems = [
        f"{name} is not installed: pip install leveret"
        for name in ("torch", "transformers", "peft", "pillow", "pyarrow")
        if name not in facts["packages"]
    ]
    if facts["disk_free"] < 2 * GIB:
        problems.append(f"only {_gib(facts['disk_free'])} are free on this disk; the quickstart needs about 0.6 GiB")
    if facts["memory"] is not None and facts["memory"] < 4 * GIB:
        problems.append(f"only {_gib(facts['memory'])} of memory; the quickstart needs about 3 GiB")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) < cores():
        problems.append(f"OMP_NUM_THREADS={threads} keeps torch to {threads} of {cores()} cores")
    return problems


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / GIB:,.1f} GiB"


def show(facts: dict[str, Any]) -> None:
    """Print what `doctor` found, for a person."""
    from rich.console import Console
    from rich.table import Table

    def table(*columns: str) -> Table:
        made = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
        for column in columns:
            made.add_column(column)
        return made

    console = Console(highlight=False)

    def head(text: str) -> None:
        console.print(f"\n[bold]{text}[/]")

    head("This machine")
    machine = table("", "")
    machine.show_header = False
    machine.add_row("system", facts["platform"])
    machine.add_row("python", facts["python"])
    machine.add_row("cores", str(facts["cores"]))
    machine.add_row("memory", _gib(facts["memory"]))
    machine.add_row("free disk", f"{_gib(facts['disk_free'])} here")
    machine.add_row("model cache", facts["cache"])
    console.print(machine)

    head("Installed")
    packages: Sequence[tuple[str, str]] = list(facts["packages"].items())
    third = -(-len(packages) // 3)
    grid = table("", "", "", "", "", "")
    grid.show_header = False
    for row in range(third):
        cells = [packages[row + third * column] for column in range(3) if row + third * column < len(packages)]
        grid.add_row(*(word for name, version in cells for word in (name, f"[dim]{version}[/]")))
    console.print(grid)
    missing = [name for name, there in facts["extras"].items() if not there]
    if missing:
        console.print(f"[dim]extras not installed: {', '.join(missing)} (pip install 'leveret\\[{missing[0]}]')[/]")

    head("Devices, and the largest model that fits")
    devices = table("device", "name", "memory", "bf16", *(way.name for way in WAYS))
    for device in facts["devices"]:
        fits = facts["fits"][device["id"]]
        devices.add_row(
            device["id"],
            device["name"],
            _gib(device["memory"]),
            device["bf16"],
            *(fits[way.name] or "-" for way in WAYS),
        )
    console.print(devices)
    console.print(
        "[dim]counted as "
        + "; ".join(f"{way.name}: {way.bytes_each:g} bytes a parameter ({way.why})" for way in WAYS)
        + ". What fits is not always what is quick.[/]"
    )
    head("Problems" if facts["problems"] else "No problems found")
    for problem in facts["problems"]:
        console.print(f"  {problem}")
    console.print()
