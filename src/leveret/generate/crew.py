"""Several processes that answer together: the engine of this process, and helpers beside it.

A small model keeps one core busy however many there are (see `model.threads`), so on a CPU the other cores answer too.
In float32 an answer does not depend on its company in a batch, so who answers what changes no answer.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue

from leveret.generate.engine import Engine, Request
from leveret.generate.helpers import Helpers
from leveret.generate.memory import Plan
from leveret.processes import Worker, serve
from leveret.records import ImageRef, Prediction, Turn
from leveret.runs import UserError

MOST, LEAST = 512, 64
"""Questions handed out at once: enough for even batches, few enough that all processes end at about the same time."""

OnPrediction = Callable[[Prediction], None]


class Crew:
    """An engine and helpers that answer with the same model; to its caller it is one engine.

    engine  of this process, in float32.
    folder  of the engine's model, which the helpers load.
    """

    def __init__(self, engine: Engine, folder: str | Path, helpers: Helpers) -> None:
        self.engine, self.folder, self.helpers = engine, str(Path(folder).resolve()), helpers
        self.memory, self.processes = engine.memory, 1

    @property
    def plan(self) -> Plan | None:
        """What each of the processes was allowed to hold in the last call."""
        return self.engine.plan

    def answer(self, requests: Sequence[Request], on_prediction: OnPrediction | None = None) -> list[Prediction]:
        """What `Engine.answer` gives. `on_prediction` is called in this thread only.

        A helper that is lost, or that refuses a question, hands its questions back to this process, which says why.
        """
        workers = self.helpers.ready(len(requests))
        self.processes = 1 + len(workers)
        self.engine.memory = None if self.memory is None else self.memory // self.processes
        shares = _Shares(requests, 1 + len(workers))
        found: dict[int, Prediction] = {}
        came: SimpleQueue[Prediction | None] = SimpleQueue()  # from the helpers; None: one of them has ended its work
        threads = [threading.Thread(target=self._help, args=(worker, shares, came), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        helping = len(threads)

        def accept(prediction: Prediction) -> None:
            place = shares.places[prediction.question_id]
            found[place] = replace(prediction, question_id=requests[place].question_id)
            if on_prediction is not None:
                on_prediction(found[place])

        def drain(wait: bool = False) -> None:
            nonlocal helping
            while wait or not came.empty():
                prediction, wait = came.get(), False
                if prediction is None:
                    helping -= 1
                else:
                    accept(prediction)

        def here(prediction: Prediction) -> None:
            accept(prediction)
            drain()

        try:
            while True:
                if share := shares.take():
                    self.engine.answer(share, here)
                elif helping:
                    drain(wait=True)
                else:
                    break
        finally:
            shares.stop()
            for thread in threads:  # each waits for the share its helper is at: nothing of it may meet the next call
                thread.join()
        return [found[place] for place in range(len(requests))]

    def _help(self, worker: Worker, shares: _Shares, came: SimpleQueue[Prediction | None]) -> None:
        """Keeps one helper at work until nothing is left to hand out."""
        while share := shares.take():
            answer = None
            with suppress(OSError):  # it has ended
                worker.send(_pack(self.folder, share, self.engine.memory))
                answer = worker.receive()
            predictions = _unpack_answers(answer) if answer else []
            if not predictions:
                shares.back(share)
                if answer is None:
                    self.helpers.lose(worker)
                break
            for prediction in predictions:
                came.put(prediction)
        came.put(None)


class _Shares:
    """What is still to be answered in one call; threads share it.

    places  name -> place in the call's requests. A name that another request bears too is changed here.
    """

    def __init__(self, requests: Sequence[Request], processes: int) -> None:
        met: dict[tuple[ImageRef, ...], int] = {}
        self.places: dict[str, int] = {}
        named = []
        for place, request in enumerate(requests):
            name = request.question_id
            while name in self.places:
                name = f"{name} ({place})"
            self.places[name] = place
            named.append(replace(request, question_id=name))
        # Questions about one image stay together: it goes through the tower once.
        self._left = deque(sorted(named, key=lambda request: met.setdefault(request.images, len(met))))
        self._processes = processes
        self._lock = threading.Lock()

    def take(self) -> list[Request]:
        """The next requests to answer; the shares get smaller towards the end."""
        with self._lock:
            size = max(LEAST, min(MOST, len(self._left) // (2 * self._processes)))
            return [self._left.popleft() for _ in range(min(size, len(self._left)))]

    def back(self, share: Sequence[Request]) -> None:
        with self._lock:
            self._left.extendleft(reversed(share))

    def stop(self) -> None:
        with self._lock:
            self._left.clear()


# --- as bytes --------------------------------------------------------------------------------------------------------


def _pack(folder: str, share: Sequence[Request], memory: int | None = None) -> bytes:
    return json.dumps([folder, [asdict(request) for request in share], memory]).encode()


def _unpack(frame: bytes) -> tuple[str, list[Request], int | None]:
    folder, share, memory = json.loads(frame)
    requests = [
        Request(
            row["question_id"],
            tuple(ImageRef(**ref) for ref in row["images"]),
            tuple(Turn(**turn) for turn in row["turns"]),
            None if row["choices"] is None else tuple(row["choices"]),
            row["max_new_tokens"],
        )
        for row in share
    ]
    return folder, requests, memory


def _pack_answers(predictions: Sequence[Prediction]) -> bytes:
    return json.dumps([asdict(prediction) for prediction in predictions]).encode()


def _unpack_answers(frame: bytes) -> list[Prediction]:
    return [Prediction(**row) for row in json.loads(frame)]


def main() -> None:
    """A helper: answers shares, with the model of the folder each of them names."""

    def start() -> Callable[[bytes], bytes]:
        from leveret.generate.model import load

        engines: dict[str, Engine] = {}

        def answer(frame: bytes) -> bytes:
            folder, share, memory = _unpack(frame)
            if folder not in engines:
                engines.clear()  # one model at a time
                engines[folder] = Engine(load(folder, "cpu").vlm, precision="fp32", threads=1)
            engines[folder].memory = memory
            try:
                return _pack_answers(engines[folder].answer(share))
            except UserError:  # none of them then: the process that asked meets the same fault and tells it
                return _pack_answers([])

        return answer

    serve(start)
