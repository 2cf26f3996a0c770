"""Where tasks run: on threads of this process, or on a Ray cluster. Results come in the order of the items.

A task is a function of one item that reads and writes files; what it needs besides comes with it. So where it runs
changes no result, and on a cluster all machines must see the same folders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from leveret.condense.lloyd import Map
from leveret.runs import EnvironmentFault, Interrupted, RecipeError, closest, stop_requested

STOPPED = "stopped as asked; the same command goes on from there"


def executor(name: str, workers: int) -> AbstractContextManager[Map]:
    """The executor called `name`: `local`, `ray` (the cluster this machine belongs to, else one of its own with
    `workers` CPUs), or `ray:ADDRESS`. RecipeError for another name, EnvironmentFault where Ray is not installed."""
    kind, _, address = name.partition(":")
    if kind == "local" and not address:
        return _local(workers)
    if kind == "ray":
        _import_ray()  # told now, and not when there is work
        return _ray(address, workers)
    near = closest(kind, ("local", "ray"))
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(f"executor {name!r}: allowed are local, ray, and ray:ADDRESS (ray:10.0.0.5:6379).{hint}")


@contextmanager
def _local(workers: int) -> Generator[Map]:
    """Threads of this process, few tasks in flight; stops between two when asked to."""
    from leveret.model.threads import torch_threads

    def checked(function: Callable[[Any], Any], item: Any) -> Any:
        if stop_requested():
            raise Interrupted(STOPPED)
        return function(item)

    # One product per thread, each on one core: threads inside small products cost more than they bring.
    with torch_threads(1), ThreadPoolExecutor(workers) as pool:

        def execute(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            if workers == 1:
                yield from (checked(function, item) for item in items)
                return
            waiting: deque[Future[Any]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(checked, function, item))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

        yield execute


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as fault:
        raise EnvironmentFault(
            f"executor ray: Ray is not installed ({fault}); `pip install 'leveret[ray]'` brings it"
        ) from None
    return ray


@contextmanager
def _ray(address: str, workers: int) -> Generator[Map]:
    """Tasks of a Ray cluster, one CPU each. A machine that is lost has its tasks run again elsewhere."""
    ray = _import_ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, workers)
    task = ray.remote(num_cpus=1, max_retries=3)(_call)
    ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def execute(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        held = [ray.put(function)]  # in a list, so that a worker fetches it once and not for every task
        waiting: deque[Any] = deque()
        try:
            for item in items:
                if stop_requested():
                    raise Interrupted(STOPPED)
                waiting.append(task.remote(held, item))
                if len(waiting) > ahead:
                    yield _result(ray, waiting.popleft())
            while waiting:
                yield _result(ray, waiting.popleft())
        finally:
            for reference in waiting:
                ray.cancel(reference)

    try:
        yield execute
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str, workers: int) -> None:
    """Joins a cluster, or begins one of this machine alone, which nothing outside it can reach."""
    import os

    quiet = {"log_to_driver": False, "configure_logging": False, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    # Ray would call home and draw a dashboard, and would take this process's environment manager for its workers'.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address or None, **quiet)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as fault:
        where = f"the cluster at {address}" if address else "a cluster of this machine"
        raise EnvironmentFault(f"executor ray: {where} did not answer ({str(fault).splitlines()[0]})") from None


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as fault:
        cause = fault.cause  # what the task raised: its own class and words
        raise (cause if isinstance(cause, Exception) else fault) from None
    except ray.exceptions.RayError as fault:
        raise EnvironmentFault(
            f"executor ray: a task was lost ({str(fault).splitlines()[0]}); run the same command again to go on"
        ) from None


_functions: dict[str, Callable[[Any], Any]] = {}


def _call(held: list[Any], item: Any) -> Any:
    """In a worker of the cluster."""
    import ray
    import torch

    torch.set_num_threads(1)
    name = held[0].hex()
    if name not in _functions:
        while len(_functions) > 2:
            _functions.pop(next(iter(_functions)))
        _functions[name] = ray.get(held[0])
    return _functions[name](item)
