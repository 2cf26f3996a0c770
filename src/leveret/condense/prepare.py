"""What a coreset is to be made from, opened and checked before a folder is begun: the same for a run and a dry run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leveret import recipe as recipes
from leveret.condense import engine
from leveret.condense.against import Eyes, Side, eyes_of, look_at
from leveret.condense.given import Given, is_given, open_given
from leveret.condense.steps import Cluster, CondenseRecipe, ImageCluster, check_columns, decontaminated, read
from leveret.pool import Source, open_source
from leveret.runs import DataError, sha256_of

RULES = 2
"""Version of the rules in docs/condense.md. A change of any kept id raises it, so that old folders are not gone on."""


@dataclass(frozen=True)
class Prepared:
    """recipe: with the encoder that it comes to. rows: the pool, or the embeddings that were given. sides: benchmarks,
    and eyes: what makes the vectors that they are compared with. mark: what tells this run from others beside its
    recipe."""

    recipe: CondenseRecipe
    rows: Source | Given
    sides: Sequence[Side]
    eyes: Eyes
    mark: Mapping[str, Any]

    def bound(self) -> dict[str, Any]:
        """What the run's folder holds it to."""
        return {**recipes.dump(self.recipe), **self.mark, "rules": RULES}


def prepare(
    source: Source | str | Path,
    recipe: str | Path | CondenseRecipe = "bunny",
    overrides: Sequence[str] = (),
    *,
    images: str | Path | None = None,
    encoder: str | None = None,
    against: str | Path | Sequence[str | Path] = (),
    device: str = "cpu",
    precision: str = "auto",
    like: Mapping[str, Any] | None = None,
) -> Prepared:
    """Open and check what `condense` is given; the arguments are its own. Nothing is written, no vector made.

    Raises RecipeError (also where a step needs scores and there are none) and DataError.
    """
    against = [against] if isinstance(against, str | Path) else against
    if isinstance(recipe, CondenseRecipe):
        chosen = decontaminated(recipe, against=bool(against))
    else:
        chosen = read(recipe, overrides, against=bool(against))
    pool: Source | None = None
    if isinstance(source, Source):
        pool = source
    elif not is_given(source):
        pool = open_source(source, images)
    sides = look_at(against)
    rows: Source | Given
    if pool is not None:
        from leveret.model.encoders import load_encoder, precision_of

        chosen = chosen.model_copy(update={"encoder": encoder or chosen.encoder})
        computed = precision_of(chosen.encoder, device, precision)
        loaded = load_encoder(chosen.encoder, device, computed)
        check_columns(chosen, ("score",) if loaded.has_texts else (), f"the encoder {chosen.encoder!r}")
        mark: dict[str, Any] = {"source": pool.fingerprint(), "weights": loaded.fingerprint}
        mark |= {} if computed == "fp32" else {"precision": computed}
        rows, width = pool, loaded.width
        eyes = Eyes(chosen.encoder, loaded.fingerprint, loaded.width, f"the pool {pool.path}")
    else:
        given = open_given(str(source))
        check_columns(chosen, ("score",) if given.has_scores else (), f"the embeddings {given.path}")
        chosen = chosen.model_copy(update={"encoder": _made_by(given)})
        mark = {"source": given.fingerprint(), "weights": "as given"}
        rows, width = given, max((shard.width for shard in given.shards), default=0)
        eyes = eyes_of(given, encoder, sides, device)
    for side in sides:
        side.check(eyes)
    if files := _files(chosen, width):
        mark["files"] = files
    if sides:
        mark["against"] = [side.mark(eyes) for side in sides]
    if like is not None:
        _unchanged(like, mark)
    return Prepared(chosen, rows, sides, eyes, mark)


def _unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """DataError where the rows, the encoder, a benchmark or a file of the recipe is not what finished steps saw."""
    names = {"source": "the pool or embeddings", "weights": "the encoder", "against": "a benchmark"}
    now = json.loads(json.dumps(now))
    changed = [what for name, what in names.items() if before.get(name) != now.get(name)]
    old, new = before.get("files", {}), now.get("files", {})
    changed += [f"the file of steps.{label}" for label in old.keys() & new.keys() if old[label] != new[label]]
    if changed:
        raise DataError(
            f"{' and '.join(changed)} changed since that coreset was made, so its steps cannot be taken over; condense "
            "anew"
        )


def _files(chosen: CondenseRecipe, width: int) -> dict[str, str]:
    """Digests of what the recipe reads besides the rows: they are part of what a run is. DataError, before a folder is
    begun, where centroids do not fit rows of `width`."""
    found = {}
    for label, config in chosen.steps.items():
        if isinstance(config, Cluster) and config.centroids is not None:
            if not Path(config.centroids).is_file():
                raise DataError(f"steps.{label}.centroids: there is no file {config.centroids}")
            if width:
                engine.given_centroids(config.centroids, width)
            found[label] = sha256_of(Path(config.centroids))
        elif isinstance(config, ImageCluster) and config.targets is not None:
            found[label] = open_given(config.targets).fingerprint()
    return found


def _made_by(given: Given) -> str:
    """Which encoder made the embeddings, where they say so."""
    return given.made_by().get("encoder", "made elsewhere")
