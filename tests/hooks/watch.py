"""Seen by every Python process of a run under test: notes each forward pass, and may kill at one.

FORWARD_LOG    file that gets a line "stage output" at the start of each forward pass of a loaded model
LOAD_LOG       file that gets a line "stage" for each model that is loaded
KILL           "stage:n,...": SIGKILL to a stage's process at the start of its n-th pass; with
               "stage:n:all" to the whole process group, which is Snakemake's
KILL_WRITE     "stage:n": SIGKILL to a stage's process when its n-th file is about to be put in place
SLOW           seconds that each pass takes longer
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any


class _Watch:
    """Forward pre-hook of every model that is loaded."""

    def __init__(self, stage: str, output: str) -> None:
        self.stage = stage
        self.output = output
        self.passes = 0

    def __call__(self, *_: Any) -> None:
        self.passes += 1
        with open(os.environ["FORWARD_LOG"], "a") as log:
            log.write(f"{self.stage} {self.output}\n")
        for order in filter(None, os.environ.get("KILL", "").split(",")):
            stage, number, *whom = order.split(":")
            if stage == self.stage and int(number) == self.passes:
                os.kill(0 if whom else os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("SLOW", "0")))


def _kill_at_write(number: int) -> None:
    """Die before the `number`-th rename, which is how every file of the results is put in place."""
    rename = os.replace
    count = 0

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*arguments, **options)

    os.replace = counted


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps `sparsity_atlas.loading.pretrained.load` when that module is first imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != "sparsity_atlas.loading.pretrained":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            load = module.load

            def watched(*arguments: Any, **options: Any) -> Any:
                model = load(*arguments, **options)
                if "LOAD_LOG" in os.environ:
                    with open(os.environ["LOAD_LOG"], "a") as log:
                        log.write(f"{stage}\n")
                model.register_forward_pre_hook(_Watch(stage, output))
                return model

            module.load = watched

        spec.loader.exec_module = exec_module
        return spec


_words = sys.orig_argv
if "-m" in _words and ("--output" in _words or "--serve" in _words):
    stage = _words[_words.index("-m") + 2]  # behind the package's name
    output = ""  # a worker is told with each request
    if "--output" in _words:
        output = _words[_words.index("--output") + 1].removeprefix("results/")
    if stage == "node":  # a worker, or a job that does the work itself
        stage = "evaluate" if output else "worker"
    sys.meta_path.insert(0, _Finder())
    _victim, _, _number = os.environ.get("KILL_WRITE", "").partition(":")
    if _victim == stage:
        _kill_at_write(int(_number))
