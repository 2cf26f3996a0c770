"""Models that are not ours, by how a person names them: `openai:URL#NAME`, `hf:FOLDER`, or a folder of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leveret.runs import DataError, RecipeError

if TYPE_CHECKING:
    from leveret.generate.foreign import Foreign
    from leveret.generate.remote import Remote

FORM = "openai:http://HOST:PORT/v1#MODEL"


def open_other(given: str, *, key_env: str | None = None, parallel: int = 8) -> Remote | Foreign | None:
    """What answers for a model that is not ours; None where it is ours, or one that we read (`model.source`).

    given     `openai:URL#NAME`: a model behind an endpoint. `hf:FOLDER` or `hf:OWNER/NAME[@REVISION]`: with
              transformers' own classes. A folder that we cannot read and transformers can is taken so by itself.
    key_env   environment variable with the endpoint's key.
    parallel  requests at once; of a folder, the batch.

    Raises RecipeError, DataError and EnvironmentFault as `Endpoint`, `Foreign` and the hub do.
    """
    kind, colon, rest = given.partition(":")
    if colon and kind == "openai":
        from leveret.generate.endpoint import Endpoint
        from leveret.generate.remote import Remote

        url, mark, name = rest.partition("#")
        if not url or not mark or not name:
            raise RecipeError(f"{given}: name the endpoint and the model there, as in {FORM}")
        return Remote(Endpoint(url, name, key_env=key_env), parallel=parallel)
    if not is_foreign(given):
        return None
    from leveret.generate.foreign import Foreign

    return Foreign(_folder(rest) if colon and kind == "hf" else Path(given).expanduser(), batch=parallel)


def is_foreign(given: str) -> bool:
    """Whether transformers' own classes answer for a model, by what is on this machine; nothing is loaded."""
    if given.startswith("hf:"):
        return True
    path = Path(given).expanduser()
    if not path.is_dir():
        return False
    from leveret.generate import foreign
    from leveret.model.source import look

    try:
        look(path)
    except DataError:
        return foreign.is_known(path)
    return False


def look_ahead(given: str) -> bool:
    """The same; DataError where it is a folder of this machine and `open_other` would find no model there."""
    from leveret.model import hub

    rest = given.removeprefix("hf:")
    if rest != given and (Path(rest).expanduser().exists() or hub.as_id(rest) is None):
        _folder(rest)
    return is_foreign(given)


def _folder(given: str) -> Path:
    from leveret.model import hub

    path = Path(given).expanduser()
    if not path.exists() and (name := hub.as_id(given)) is not None:
        return hub.fetch(*name)
    if not (path / "config.json").is_file():
        raise DataError(
            f"hf:{given}: there is no config.json in {path}. Give a model's folder, or OWNER/NAME of the hub."
        )
    return path
