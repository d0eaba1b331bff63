"""Who chooses: agents, the study that drives them, workers, reports and the command line.

`tightrope.search(task, budget=...)` runs a search: the package itself can be called, as `session.search`.
"""

import sys
from types import ModuleType
from typing import Any


class _Search(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tightrope.search.session import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Search
