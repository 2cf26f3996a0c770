"""`leveret world backbones -o OUT`: trains the tiny backbones from nothing and writes what the package ships.

    OUT/vision.safetensors    the vision tower
    OUT/scorer.safetensors    the dual encoder that judges web pairs
    OUT/language/             the causal language model and its tokenizer
    OUT/towers/               the other vision towers (world/towers.py), with a card of their own
    OUT/languages/            the other language models (world/languages.py), with a card of their own
    OUT/CARD.md, card.json    recipe, seed, every supervision used, scores, hashes
    OUT/state/                what a stopped run continues from; not shipped

Two processes, one thread each: the language models, and the towers, one after the other. A good hour on two cores, and
half an hour each for the other towers and the other language models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leveret.runs import (
    RecipeError,
    RunFolder,
    closest,
    graceful_stop,
    read_json,
    write_json,
)
from leveret.world import cards
from leveret.world.languages import LANGUAGES
from leveret.world.languages import write_card as write_languages_card
from leveret.world.towers import STEPS as TOWER_STEPS
from leveret.world.towers import TOWERS
from leveret.world.towers import write_card as write_towers_card

STEPS = {"vision": 6500, "scorer": 4000, "language": 12000}
SUPERVISION = {
    "vision": "416,000 pictures. SigLIP loss on clean captions that leave attributes out at random (weight 0.5; its "
    "text tower is not kept), and a dense grounded loss: for each cell of the 8 x 8 grid whether it holds the"
    " centre of a shape that has a name or of a letter; there the colour, shape or letter, the four box coordinates "
    "and a thing's look (red, green, blue, and its coverage at 8 x 8 points of its box). A centre"
    " on a border may be claimed by either cell, not by both. Fresh clean scenes, some with larger or smaller"
    " things, clutter behind them or nothing in them; in two fifths a fifth of the things are polygons without a name "
    "and half of them have a colour without a name; a quarter are bent, blurred and badly exposed; half go "
    "through JPEG.",
    "scorer": "SigLIP loss alone, on 512,000 pairs of a noisy draw of the web (the rates of wrong, dull and duplicated "
    "captions are the usual ones of world/captions.py). Never the pool it judges, never a label of what is "
    "noise.",
    "language": "Next tokens of conversations about told scenes, 192,000 rows. Three quarters are compound "
    "rows: a scene "
    "is 16 (or, from step 6,000 on, in a quarter of the batches, 64) positions, one a thing or a letter, each"
    " the sum of the model's own word embeddings of its colour, shape or letter and of learned coordinate "
    "embeddings, from step 6,000 on with noise; an eighth are scenes told in words, 7 % text-only. A further "
    "7 % have no scene, but the coordinates at the very words that name the things; so has a quarter of the "
    "other rows' relations. What is asked, and in which words, is the READER of world/questions.py: of the "
    "examined kinds it reads `existence`, `shape` and `box` in the examination's words, `count` in other "
    "words, `relation` in other words and with other answers, `choice` in other words (of colours never) with"
    " its options at first under random letters and later under A to D as they are examined, `colour` and "
    "`word` not at all (though naming everything, which it reads, names the word too). No picture. Phases: "
    "world/reading.py. Loss weights: first answer token 3, the rest of an answer 1, end of turn 0.2, all else 0.1.",
}
WITHHELD = (
    "Eight colour-shape pairs are in no picture that any of this saw; the language model has read their names, as it "
    "has read those of all others. A tenth of all words is in no row and in no picture."
)


def _job(name: str, out: str, seed: int, steps: int) -> None:
    """One backbone, in a process of its own; its figures go to OUT/state/NAME/figures.json."""
    import torch

    from leveret.world import language, teachers, tokens, vision

    started = Path(out, "state")
    others: dict[str, Callable[..., dict[str, Any]]] = {
        other: partial(
            language.train_language,
            place=f"languages/{other}",
            after=started / kind.after if kind.after else None,
            **kind.options,
        )
        for other, kind in LANGUAGES.items()
    }
    towers = {tower: partial(teachers.train_tower, tower) for tower in TOWERS}
    torch.set_num_threads(1)
    folder = Path(out, "state", name)
    own: dict[str, Callable[..., dict[str, Any]]] = {
        "vision": vision.train_vision,
        "scorer": vision.train_scorer,
        "language": language.train_language,
    }
    train = (own | others | towers)[name]
    lines = folder / "metrics.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    file = lines.open("a", encoding="utf-8")
    began: tuple[float, int] | None = None  # of this call: a run that continues starts at a later step

    def log(step: int, steps: int, **figures: float) -> None:
        nonlocal began
        began = began or (time.time(), step - 1)
        if step % 50 == 0 or step == steps or "existence" in figures:
            rate = (time.time() - began[0]) / (step - began[1])
            shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
            file.write(f"{step}/{steps} {shown}\n")
            file.flush()
            print(f"{name}: step {step:,} of {steps:,}, {shown}, at most {rate * (steps - step) / 60:.0f} min left")

    with graceful_stop():
        figures = train(Path(out), folder, tokens.build(), seed=seed, steps=steps, log=log)
    file.close()
    write_json(folder / "figures.json", figures)


def _jobs(names: tuple[str, ...], out: str, seed: int, steps: dict[str, int]) -> None:
    for name in names:
        if not Path(out, "state", name, "figures.json").exists():
            _job(name, out, seed, steps[name])


def wanted(only: Sequence[str]) -> tuple[str, ...]:
    """The backbones of these names, `world/` before them or not, and those that they go on from; all for none.

    RecipeError naming those there are."""
    every = (*STEPS, *LANGUAGES, *TOWERS)
    names = [name.removeprefix("world/") for name in only]
    for name in names:
        if name not in every:
            near = closest(name, every)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RecipeError(f"--only {name}: no such backbone; there are {', '.join(every)}.{hint}")
    names += [LANGUAGES[name].after for name in names if name in LANGUAGES]
    return tuple(name for name in every if name in names or not names)


def build(out: str | Path, *, seed: int = 0, steps: dict[str, int] | None = None, only: Sequence[str] = ()) -> Path:
    """Trains the backbones into `out`, or continues; returns the folder.

    steps  instead of STEPS, towers.STEPS and those of LANGUAGES, for trying things out.
    only   these alone, in this call. A card is written when all that it tells of is there.
    """
    chosen = wanted(only)
    lengths = {name: kind.steps for name, kind in LANGUAGES.items()}
    steps = {**STEPS, **lengths, **dict.fromkeys(TOWERS, TOWER_STEPS), **(steps or {})}
    folder = RunFolder.open(out, "backbones", {"seed": seed, "steps": steps})
    context = get_context("spawn")
    split = (("language", *LANGUAGES), ("vision", "scorer", *TOWERS))
    groups = [names for group in split if (names := tuple(name for name in group if name in chosen))]
    workers = [context.Process(target=_jobs, args=(names, str(out), seed, steps), daemon=True) for names in groups]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [names for names, worker in zip(groups, workers, strict=True) if worker.exitcode]
    if failed:
        from leveret.runs import Interrupted

        raise Interrupted(f"training of {', '.join(failed[0])} stopped; the same command continues from {out}/state")
    if all((folder.path / "state" / name / "figures.json").exists() for name in STEPS):
        write_card(folder.path, seed, {name: steps[name] for name in STEPS})
    if set(chosen) & set(LANGUAGES):
        write_languages_card(folder.path, seed, steps)
    if set(chosen) & set(TOWERS):
        write_towers_card(folder.path, seed, steps)
    return folder.path


def shipped(folder: Path) -> list[Path]:
    """The files of a backbones folder that belong into the package."""
    files = [folder / f"{name}.safetensors" for name in ("vision", "scorer")]
    return files + sorted(path for path in (folder / "language").iterdir() if path.is_file())


def write_card(folder: Path, seed: int, steps: dict[str, int]) -> None:
    """CARD.md and card.json of the three that ship with leveret."""
    figures: dict[str, dict[str, Any]] = {name: read_json(folder / "state" / name / "figures.json") for name in STEPS}
    files = shipped(folder)
    total = sum(path.stat().st_size for path in files)
    lines = []
    for name, found in figures.items():
        groups = found if name == "language" else {"": found}
        for group, values in groups.items():
            shown = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
            lines.append(f"- **{name}**{' (' + group + ')' if group else ''}: {shown}")
    cards.write_card(
        folder,
        files,
        {"seed": seed, "steps": steps, "supervision": SUPERVISION, "withheld": WITHHELD, "figures": figures},
        title="The drawn world's tiny backbones",
        about=(
            f"Trained from nothing by `leveret world backbones -o OUT` (seed {seed}); bfloat16 safetensors, "
            f"{total / 1e6:.2f} MB in all. They exist so that the whole loop (choose data, align, tune, examine, "
            "chat) runs on a laptop in minutes; they know no world but the drawn one."
        ),
        taught=[*(f"**{name}** ({steps[name]:,} steps): {text}" for name, text in SUPERVISION.items()), WITHHELD],
        found="How good they are, on fresh scenes",
        figures=lines,
    )
