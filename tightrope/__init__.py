"""Give a latency budget on your device; get the compressed PyTorch model that meets it.

Names are loaded when they are first used, so that importing this is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightrope.compressors.compress import compress as compress_prepared
    from tightrope.compressors.export import export
    from tightrope.compressors.finetune import finetune
    from tightrope.compressors.prepare import prepare
    from tightrope.compressors.runtime.load import load
    from tightrope.compressors.trace import trace
    from tightrope.search.session import compress, resume, search
    from tightrope.search.study import Study
    from tightrope.search.task import Task
    from tightrope.spaces.budget import Budget
    from tightrope.spaces.errors import TightropeError
    from tightrope.spaces.network import Network
    from tightrope.spaces.policy import Policy
    from tightrope.spaces.space import Space

__version__ = "0.1.0"
__all__ = [
    "Budget", "Network", "Policy", "Space", "Study", "Task", "TightropeError", "compress", "compress_prepared", "export",
    "finetune", "load", "prepare", "resume", "search", "trace",
]  # fmt: skip

_WHERE = {
    "Budget": "spaces.budget", "Network": "spaces.network", "Policy": "spaces.policy", "Space": "spaces.space",
    "Study": "search.study", "Task": "search.task", "TightropeError": "spaces.errors", "compress": "search.session",
    "compress_prepared": "compressors.compress:compress", "export": "compressors.export", "finetune": "compressors.finetune",
    "load": "compressors.runtime.load", "prepare": "compressors.prepare", "resume": "search.session",
    "trace": "compressors.trace",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "search":  # the package, which can be called
        return importlib.import_module("tightrope.search")
    if name not in _WHERE:
        raise AttributeError(f"module 'tightrope' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(importlib.import_module(f"tightrope.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
