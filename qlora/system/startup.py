"""The start of a process: how threads wait, and heavy imports made lighter."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial, wraps
from typing import Any


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon when they wait for one another, unless the environment says otherwise.

    By default they spin for a millisecond. Where another program uses a core, they keep it from the thread that
    they wait for: training took 25 times as long. libgomp reads this when torch is imported, so call it first.

    Entry points call it (cli/exits.py). `import qlora` does not, since it must not change the environment of a
    notebook: call it there before torch is imported, or set GOMP_SPINCOUNT=3000.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection while a run imports its modules: the million objects they make all stay.

    Nor are they looked at in later collections (gc.freeze). Where torch is imported already nothing is paused: the
    process is not at its start, and freezing would keep its garbage, too.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def packages_hidden(*names: str) -> Iterator[None]:
    """Let optional packages look absent to what is imported meanwhile, those that are imported already too."""
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: find_spec finds nothing
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


@contextmanager
def importing_transformers() -> Iterator[None]:
    """Hide scipy: transformers (5.23) imports scipy.optimize, 0.4 s, for the loss of object detectors.

    Where transformers is imported already it has looked for scipy, and would miss it: nothing is hidden.
    """
    with nullcontext() if "transformers" in sys.modules else packages_hidden("scipy"):
        yield


@contextmanager
def importing_bitsandbytes() -> Iterator[None]:
    """Hold back two things that importing bitsandbytes sets off.

    The compiler: it decorates fallbacks that are rarely called with torch.compile (backends/default/ops.py,
    0.50.2), which loads inductor, a third of all that a run imports. They are compiled when they are called.

    Code from the hub: where the optional package `kernels` is installed, it fetches native code and runs it.
    This is not needed, so the package is hidden. Its absence is logged, which no user can act on.
    """
    import torch

    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.addFilter(lambda record: "kernels" not in record.getMessage())
    compile_now = torch.compile
    torch.compile = partial(compile_later, compile_now)  # type: ignore[assignment]
    try:
        with packages_hidden("kernels"):
            yield
    finally:
        torch.compile = compile_now


def compile_later(compile_now: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    """torch.compile as a decorator, with or without options, put off to the first call of the function."""
    if function is None:
        return partial(compile_later, compile_now, **options)

    @cache
    def compiled() -> Callable[..., Any]:
        return compile_now(function, **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
