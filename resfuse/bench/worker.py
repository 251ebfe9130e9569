"""A process for each variant of a network, so that none runs in what another left in the allocator; see Worker."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

from resfuse.bench.memory import model_tensors, peak_resident_bytes, saved_memory
from resfuse.bench.peers import import_torchvision
from resfuse.bench.workload import Task, Workload, workload

SHOWN = 4
"""How many images' outputs a worker tells: enough to know its network by."""


class Worker:
    """A fresh process that holds one task and runs its workload once for each call.

    It is a context manager: at the end the process ends. It ignores the terminal's Ctrl-C, which is its parent's to
    answer.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        command = [sys.executable, "-W", "ignore", "-m", "resfuse.bench.worker", json.dumps(task)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, word: str) -> Any:
        """Send a word and wait for the answer, a line of JSON.

        Raises:
            RuntimeError: the process has ended; it has printed why.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(word, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.task))}: its process ended with {self.process.wait()}")
        return json.loads(answer)

    def __call__(self) -> None:
        self.ask("run")

    def prepare(self) -> None:
        """What a run of backward needs ahead of it."""
        self.ask("prepare")

    def outputs(self) -> Tensor:
        """The network's outputs on the first SHOWN images of the batch: (SHOWN, classes), float64."""
        return torch.tensor(self.ask("outputs"), dtype=torch.float64)

    def memory(self) -> dict[str, int]:
        """Its memory after the import and at most, a GPU's at most, and the bytes kept for backward."""
        return self.ask("memory")


def _memory(task: Task, load: Workload, imported: int) -> dict[str, int]:
    found = {"imported_rss_bytes": imported, "peak_rss_bytes": peak_resident_bytes()}
    if task.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if load.loss is not None and load.model is not None:
        found["saved_bytes"] = saved_memory(load.loss, model_tensors(load.model)).bytes
    return found


def _answer(word: str, task: Task, load: Workload, imported: int) -> Any:
    if word == "memory":
        return _memory(task, load, imported)
    if word == "outputs":
        assert load.outputs is not None
        return load.outputs()[:SHOWN].double().tolist()
    if word == "prepare":
        if load.prepare is not None:
            load.prepare()
    else:
        load.run()
        if task.device == "cuda":
            torch.cuda.synchronize()
    return word


def serve(task: Task) -> NoReturn:
    """The other side of :class:`Worker`: answer each line until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    if task.threads:
        torch.set_num_threads(task.threads)
    with contextlib.suppress(ImportError):  # resfuse.models has its networks
        import_torchvision()
    imported = peak_resident_bytes()
    load = workload(task)
    for line in sys.stdin:
        print(json.dumps(_answer(line.strip(), task, load, imported)), file=answers, flush=True)
    raise SystemExit(0)


if __name__ == "__main__":
    serve(Task(*json.loads(sys.argv[1])))
