"""What every command that makes something needs: errors with exit codes, atomic files, run folders, progress,
a soft stop.

Nothing here knows what is being made. Nothing heavy is imported.
"""

from leveret.runs.errors import (
    DataError,
    EnvironmentFault,
    Interrupted,
    OtherRecipe,
    RecipeError,
    UserError,
    bytes_of,
    closest,
    in_bytes,
    in_words,
)
from leveret.runs.files import (
    append_jsonl,
    atomic_file,
    atomic_write,
    disk_faults,
    each_jsonl,
    link_folder,
    read_json,
    read_jsonl,
    repair_jsonl,
    sha256_of,
    sync_folder,
    write_json,
)
from leveret.runs.folders import RunFolder, check_parents, claim, differences, fixed, is_held, kept_recipe
from leveret.runs.machine import cores, environment
from leveret.runs.progress import Progress
from leveret.runs.stopping import graceful_stop, stop_requested

__all__ = [
    "DataError",
    "EnvironmentFault",
    "Interrupted",
    "OtherRecipe",
    "Progress",
    "RecipeError",
    "RunFolder",
    "UserError",
    "append_jsonl",
    "atomic_file",
    "atomic_write",
    "bytes_of",
    "check_parents",
    "claim",
    "closest",
    "cores",
    "differences",
    "disk_faults",
    "each_jsonl",
    "environment",
    "fixed",
    "graceful_stop",
    "in_bytes",
    "in_words",
    "is_held",
    "kept_recipe",
    "link_folder",
    "read_json",
    "read_jsonl",
    "repair_jsonl",
    "sha256_of",
    "stop_requested",
    "sync_folder",
    "write_json",
]
