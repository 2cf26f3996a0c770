"""`leveret doctor`: what is installed, what this machine has, and what fits on it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import cores, environment, in_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from leveret.model.vlm import VLM

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


CONTEXT = 2048
"""Positions that answering and tuning are counted for: one conversation at a time."""
RANK = 128
"""Of the adapters that are counted: Bunny's."""
HALF, FULL = 2, 4
"""Bytes of a weight in bf16 and in float32."""


def doctor(model: str | None = None) -> dict[str, Any]:
    """Facts about this machine, as plain data; and about a model, if one is named (see `examine`).

    memory, disk and device memory are in bytes; `fits` names, per device and way, the largest known model whose
    weights and optimiser state fit in 85 % of the memory. `problems` holds what should be mended, in words.
    """
    examined = examine(model) if model is not None else None
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
    if examined is not None:
        facts["model"] = examined | {"fits": {device["id"]: _fits(device, examined) for device in facts["devices"]}}
    return facts


def examine(model: str) -> dict[str, Any]:
    """What a model needs, from its configuration alone: it is built on torch's meta device and no weight is read.

    model  a recipe's name or file, a model's or run's folder, another tool's, or an id of the hub. What lies on this
           machine, a recipe of this package too, wins over an id.

    Returns {"name", "tool", "chat", "image_tokens", "parameters", "parts", "kv_cache", "ways", "notes", "adapters"},
    in bytes:
    parts     part -> {"what", "parameters", "dtype", "stored", "bf16", "float32"}; `dtype` and `stored` are None for a
              recipe, which has no weights yet.
    kv_cache  of 1,000 positions, {"bf16", "float32"}; at most that, where layers look at a window only.
    ways      way of WAYS -> {"bf16", "float32"}: with frozen weights in that type. Answering: weights and a cache of
              CONTEXT positions. Tuning: what `train` counts for one sample of CONTEXT tokens, connector and language
              model learning, with adapters of rank RANK or in full.
    adapters  where a folder of adapters was named, what they are (sketch.told_adapters); the rest is of the whole.
    Raises RecipeError, DataError and EnvironmentFault where there is no such model.
    """
    from leveret.model import parts

    vlm, tool, stored, notes, adapters = _sketched(model)
    rows = parts.parts_table(vlm, {})
    cache = kv_bytes(vlm.language.config)
    held = {"vision": "towers."} | {row.part: f"{row.part}." for row in rows if row.part != "vision"}
    told: dict[str, Any] = {}
    for row in rows:
        own = {name: x for name, x in vlm.state_dict().items() if name.startswith(held[row.part]) and name in stored}
        kinds = sorted({str(stored[name]).removeprefix("torch.") for name, x in own.items() if x.is_floating_point()})
        told[row.part] = {
            "what": row.note,
            "parameters": row.parameters,
            "dtype": ", ".join(kinds) or None,
            "stored": sum(x.numel() * stored[name].itemsize for name, x in own.items()) if stored else None,
            "bf16": row.parameters * HALF,
            "float32": row.parameters * FULL,
        }
    count = parts.count(vlm)
    answer = {kind: (count + cache * CONTEXT) * size for kind, size in (("bf16", HALF), ("float32", FULL))}
    return {
        "name": model,
        "tool": tool,
        "chat": vlm.chat,
        "image_tokens": vlm.spec.tokens,
        "parameters": count,
        "parts": told,
        "kv_cache": {"bf16": 1000 * cache * HALF, "float32": 1000 * cache * FULL},
        "ways": dict(zip((way.name for way in WAYS), (answer, _tuning(vlm, RANK), _tuning(vlm, None)), strict=True)),
        "notes": notes,
        "adapters": adapters,
    }


def _sketched(model: str) -> tuple[VLM, str, dict[str, Any], list[str], dict[str, Any] | None]:
    """(the model on the meta device, whose it is, tensor -> type in its files, notes, adapters)."""
    from leveret.model.sketch import sketch
    from leveret.recipe import names

    path = Path(model).expanduser()
    whole = path / "model" / "config.json"
    unfinished = (path / "recipe.yaml").is_file() and not (path / "config.json").is_file() and not whole.is_file()
    file = path / "recipe.yaml" if unfinished else path
    if not unfinished and (path.is_dir() or not (path.is_file() or model in names("models") or "/" not in model)):
        found = sketch(model)
        return found.vlm, found.tool, found.stored, found.notes, found.adapters
    from leveret.model.build import build_meta
    from leveret.recipe import load
    from leveret.train.stages import TrainRecipe

    recipe = load(file if path.exists() else model, TrainRecipe, "models")
    notes = [f"{model} is a run that is not finished: this is what its recipe builds"] if unfinished else []
    return build_meta(recipe.model), "recipe", {}, notes, None


def kv_bytes(config: Any) -> int:
    """Numbers that a language model keeps for one position: a key and a value of every head that has its own, in every
    layer. config: transformers', of the language model."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width)


def _tuning(vlm: VLM, rank: int | None) -> dict[str, int]:
    """Bytes that tuning connector and language model takes, as `train --dry-run` counts them."""
    from leveret.model.parts import parts_table
    from leveret.train.plan import estimate
    from leveret.train.stages import StageRecipe

    learn: dict[str, Any] = {"language": {"lr": 1e-4, "lora": {"rank": rank} if rank else None}}
    if any(True for _ in vlm.connector.parameters()):
        learn["connector"] = {"lr": 1e-4}
    stage = StageRecipe.model_validate({"data": "", "learn": learn, "steps": 1, "batch": 1})
    rows = parts_table(vlm, {str(part): how for part, how in stage.learn.items()})
    return {
        kind: estimate(vlm, rows, stage, CONTEXT, frozen=size).total
        for kind, size in (("bf16", HALF), ("float32", FULL))
    }


def _fits(device: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Way -> {"precision", "needs", "fits"} on a device; `fits` is None where its memory is not known.

    Answering takes the weights as they are stored (float16 becomes float32 on a CPU). Where there are none yet, and for
    tuning, they count as bf16 where the device computes it natively, else as float32.
    """
    precision = "bf16" if str(device["bf16"]).startswith("fast") else "float32"
    room = None if device["memory"] is None else ROOM * device["memory"]
    found = {}
    for way, needs in model["ways"].items():
        # a CPU keeps frozen weights in float32 while it tunes
        kind = "float32" if device["id"] == "cpu" and way != WAYS[0].name else precision
        need = needs[kind]
        stored = [part["stored"] for part in model["parts"].values()]
        said = model["parts"]["language"]["dtype"]
        if way == WAYS[0].name and None not in stored:
            kind = "bf16" if said == "bfloat16" else said
            need = sum(stored) + CONTEXT * model["kv_cache"][precision] // 1000
            if device["id"] == "cpu" and said == "float16":
                kind, need = "float32", needs["float32"]
        found[way] = {"precision": kind, "needs": need, "fits": None if room is None else need <= room}
    return found


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

    from leveret.condense.screen import has_int8
    from leveret.model.precision import native_bf16

    devices: list[dict[str, Any]] = [
        {
            "id": "cpu",
            "name": _cpu_name(),
            "memory": memory,
            "bf16": "fast" if native_bf16("cpu") else "emulated: slow",
            "int8": "fast" if has_int8() else "not used",
            "threads": torch.get_num_threads(),
        }
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
        devices.append({"id": "mps", "name": "Apple GPU", "memory": memory, "bf16": "not used: float32"})
    return devices


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def _table(*columns: str) -> Table:
    from rich.table import Table

    made = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        made.add_column(column)
    return made


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    # Where nobody watches (a log, a pipe) lines need not fit 80 columns.
    return console if console.is_terminal else Console(highlight=False, width=140)


def show_model(facts: dict[str, Any]) -> None:
    """Print what `doctor` found about a model, for a person."""
    from rich.markup import escape

    model, console = facts["model"], _console()
    console.print(f"\n[bold]{escape(model['name'])}[/] ({model['tool']})")
    parts = _table("part", "parameters", "stored", "bf16", "float32", "what")
    for name, part in model["parts"].items():
        stored = "-" if part["stored"] is None else f"{in_bytes(part['stored'])} {part['dtype'] or ''}".strip()
        sizes = (in_bytes(part["bf16"]), in_bytes(part["float32"]))
        parts.add_row(name, f"{part['parameters']:,}", stored, *sizes, escape(part["what"]))
    whole = [part["stored"] for part in model["parts"].values()]
    total = "-" if None in whole else in_bytes(sum(whole))
    parts.add_row(
        "all", f"{model['parameters']:,}", total, *(in_bytes(model["parameters"] * n) for n in (HALF, FULL)), ""
    )
    console.print(parts)
    cache = model["kv_cache"]
    console.print(f"{model['image_tokens']:,} tokens an image; chat format {model['chat']}")
    console.print(
        f"KV cache of 1,000 positions: {in_bytes(cache['bf16'])} in bf16, {in_bytes(cache['float32'])} in float32"
    )
    for note in model["notes"]:
        console.print(f"note: {escape(note)}")

    console.print("\n[bold]What fits on this machine[/]")
    fits = _table("device", "memory", *(way.name for way in WAYS))
    for device in facts["devices"]:
        cells = []
        for found in model["fits"][device["id"]].values():
            word = {True: "fits", False: "[red]does not fit[/]", None: "needs"}[found["fits"]]
            cells.append(f"{word}: {in_bytes(found['needs'])} ({found['precision']})")
        fits.add_row(device["id"], _gib(device["memory"]), *cells)
    console.print(fits)
    console.print(
        f"[dim]fits: within {ROOM:.0%} of the memory. Answering: weights as stored, and a cache of {CONTEXT:,} "
        f"positions. Tuning (connector and language model): one sample of {CONTEXT:,} tokens at a time; adapters of "
        f"rank {RANK}.[/]\n"
    )


def show(facts: dict[str, Any]) -> None:
    """Print what `doctor` found, for a person."""
    if "model" in facts:
        return show_model(facts)
    table, console = _table, _console()

    def head(text: str) -> None:
        console.print(f"\n[bold]{text}[/]")

    head("This machine")
    machine = table("", "")
    machine.show_header = False
    machine.add_row("system", facts["platform"])
    machine.add_row("python", facts["python"])
    machine.add_row("cores", str(facts["cores"]))
    for device in facts["devices"][:1]:  # the CPU
        fast = device["int8"] == "fast"
        machine.add_row("condense in", "8-bit products" if fast else "float32 (8-bit products are not faster here)")
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
