"""Several processes, one gradient: a leader, its followers, and one all-reduce per step.

    leader (this process)                        follower (python -m leveret.train.ranks)
    open: starts the followers    ------------>  imports, connects, waits for a job
    tell(job)                     ------------>  does the same job on its own rows
    all_reduce(buffer)            <----------->  all_reduce(buffer)
    close                         ------------>  ends

Two processes of one thread each train a small model 1.3 times as fast as one process of two threads: between its
small kernels a second thread mostly waits. A follower holds the read end of a pipe that only the leader's life keeps
open, so it ends with the leader, however that ended. Under torchrun the processes are there already: rank 0 leads.

What is small, or lies on the CPU, goes through a gloo group of our own. GPUs and FSDP2 need torch's default group too,
which is made when they first ask (`join`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from leveret import own
from leveret.runs import EnvironmentFault, cores

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""In the environment of every process that torchrun started."""
_LONG = timedelta(days=30)
"""The leader may save and validate for as long as it likes; a peer that dies is noticed by its closed connection."""


def resolve(ranks: int | str, device: str) -> int:
    """How many processes `ranks: auto` means: 2 on a CPU with two cores or more, else 1; torchrun's under torchrun.

    EnvironmentFault when they are to have a GPU each and there are not as many.
    """
    if _TORCHRUN in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if isinstance(ranks, int):
        if device != "cpu":
            import torch

            if ranks > (found := torch.cuda.device_count()):
                raise EnvironmentFault(f"ranks is {ranks}, a GPU for each, but {found} are here; set ranks={found}")
        return ranks
    return 2 if device == "cpu" and cores() >= 2 else 1


class Ranks:
    """One member of the group. `rank` 0 leads; `world` members in all. Alone (world 1) everything is a no-op."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._store: Any = None
        self._group: Any = None
        self._jobs = 0
        self._joined = False
        self._followers: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    @classmethod
    def lead(cls, world: int) -> Ranks:
        """Start `world - 1` followers; they import while the leader prepares the data."""
        import torch.distributed as dist

        ranks = cls(0, world)
        if world == 1:
            return ranks
        if _TORCHRUN in os.environ:
            ranks._store = next(iter(dist.rendezvous("env://")))[0]
            return ranks
        ranks._store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=_LONG, wait_for_workers=False)
        path = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, **own.environment(), "PYTHONPATH": path}
        for rank in range(1, world):
            log = tempfile.TemporaryFile()
            command = [sys.executable, "-m", "leveret.train.ranks", str(ranks._store.port), str(rank), str(world)]
            follower = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            ranks._followers.append((follower, log))
        return ranks

    def _connect(self) -> None:
        """Build the gloo group. On one machine it listens on the loopback address only."""
        import torch.distributed as dist

        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs leave it out
        options._timeout = _LONG
        if _TORCHRUN in os.environ:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        else:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        store = dist.PrefixStore("leveret", self._store)
        self._group = dist.ProcessGroupGloo(store, self.rank, self.world, options)

    def tell(self, job: Mapping[str, Any]) -> None:
        """Leader: give all followers the same job. EnvironmentFault when one is gone."""
        if self.world == 1:
            return
        if self._group is None:
            waiting = [f"ready/{rank}" for rank in range(1, self.world)]
            while not self._store.check(waiting):
                self._check()
                time.sleep(0.05)
            self._connect()
        self._store.set(f"job/{self._jobs}", json.dumps(job))
        self._jobs += 1

    def all_reduce(self, buffer: Any) -> None:
        """Sum `buffer` over all ranks, in place; the same bits everywhere. EnvironmentFault when a rank is gone."""
        if self.world == 1:
            return
        try:
            if buffer.is_cuda:
                import torch.distributed as dist

                self.join(str(buffer.device))
                dist.all_reduce(buffer)
            else:
                self._group.allreduce([buffer]).wait()
        except RuntimeError as error:
            time.sleep(0.5)  # a dead process needs a moment before it can be asked how it ended
            self._check()
            raise EnvironmentFault(f"rank {self.rank} lost the others: {error}") from error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What fails inside because another rank is gone is an EnvironmentFault that says so."""
        try:
            yield
        except RuntimeError as error:
            time.sleep(0.5)
            self._check()
            if "onnection" in str(
                error
            ):  # gloo: "Connection closed by peer [127.0.0.1]:40123", "Connection reset by .."
                raise EnvironmentFault(f"rank {self.rank} lost the others: {error}") from error
            raise

    def device(self, device: str) -> str:
        """The device of this rank, where `device` is the leader's: with GPUs each has one of its own."""
        if not device.startswith("cuda"):
            return device
        return f"cuda:{os.environ['LOCAL_RANK'] if _TORCHRUN in os.environ else self.rank}"

    def join(self, device: str) -> None:
        """Make the ranks torch's default group, once: NCCL between GPUs, gloo between CPUs. All ranks call it."""
        import torch
        import torch.distributed as dist

        if self._joined:
            return
        if dist.is_initialized():
            raise EnvironmentFault(
                "torch.distributed is in use in this process already, and training needs it for itself; "
                "call destroy_process_group() before, or train in a process of its own"
            )
        self.all_reduce(torch.zeros(1))  # a rank that died meanwhile is noticed here; the store would wait for it
        gpu = device.startswith("cuda")
        if gpu:
            torch.cuda.set_device(device)
        if _TORCHRUN not in os.environ and (name := _loopback()) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        store = dist.HashStore() if self._store is None else dist.PrefixStore("default", self._store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=self.rank, world_size=self.world, timeout=_LONG
        )
        self._joined = True

    def mesh(self, device: str, shard: int) -> DeviceMesh:
        """The ranks in copies of `shard` each that hold a model together: 1-D, or 2-D with more copies than one.
        Neighbours share: with torchrun those of one machine come one after another."""
        from torch.distributed.device_mesh import init_device_mesh

        self.join(device)
        kind = device.partition(":")[0]
        if shard == self.world:
            return init_device_mesh(kind, (shard,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (self.world // shard, shard), mesh_dim_names=("replicate", "shard"))

    def _check(self) -> None:
        for rank, (follower, log) in enumerate(self._followers, start=1):
            code = follower.poll()
            if code is not None:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()[-15:]
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                raise EnvironmentFault(
                    f"worker process {rank} {how}; run the same command again to go on from the last saved state, "
                    f"or with ranks=1 in a new folder to do without workers. It said: "
                    + ("\n  ".join(["", *said]) or "-")
                )

    def close(self) -> None:
        """Let the followers end; those that do not within a few seconds are killed."""
        if self._joined:
            import torch.distributed as dist

            with contextlib.suppress(RuntimeError):  # the others may be gone
                dist.destroy_process_group()
            self._joined = False
        if self.rank == 0 and self.world > 1:
            if self._followers:
                for follower, _ in self._followers:
                    assert follower.stdin is not None
                    follower.stdin.close()
                for follower, log in self._followers:
                    try:
                        follower.wait(5)
                    except subprocess.TimeoutExpired:
                        follower.kill()
                        follower.wait()
                    log.close()
                self._followers = []
            else:
                self._store.set(f"job/{self._jobs}", "null")
        self._group = self._store = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def follow(self, store: Any) -> None:
        """Follower: connect to the leader's store and do its jobs until there are no more."""
        from leveret.train import loop

        self._store = store
        store.set(f"ready/{self.rank}", "1")
        self._connect()
        for number in range(1_000_000):
            store.wait([f"job/{number}"], _LONG)
            job = json.loads(store.get(f"job/{number}"))
            if job is None:
                return
            loop.follow(loop.Job(**job), self)


def _loopback() -> str | None:
    """The interface that only this machine reaches, by its name on Linux and macOS."""
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def _leave_signals_to_the_leader() -> None:
    """A terminal sends Ctrl-C to all of its processes, torchrun and a scheduler send SIGTERM to all of theirs; whether
    to stop, and after which step, the leader decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def under_torchrun() -> bool:
    """Whether this process is a follower that torchrun started."""
    return _TORCHRUN in os.environ and int(os.environ["RANK"]) > 0


def follow_torchrun() -> None:
    """Do the leader's jobs until the run is over."""
    import torch.distributed as dist

    _leave_signals_to_the_leader()
    store, rank, world = next(iter(dist.rendezvous("env://")))
    Ranks(rank, world).follow(store)


def _main() -> None:
    port, rank, world = (int(word) for word in sys.argv[1:4])
    _leave_signals_to_the_leader()

    def end_with_leader() -> None:
        os.read(0, 1)  # returns at the end of the pipe; a buffered read would hold a lock at shutdown
        os._exit(0)

    threading.Thread(target=end_with_leader, daemon=True).start()
    import torch.distributed as dist

    Ranks(rank, world).follow(dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_LONG))


if __name__ == "__main__":
    _main()
