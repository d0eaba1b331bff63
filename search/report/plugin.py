"""The tab "Pareto" of TensorBoard: serves the runs below the log folder to the script of `static/`.

Routes, all below `/data/plugin/pareto`:
    /index.js, /pareto.css      the page
    /runs?tag=T                 the list of runs and how many records each has; only the tag where it is T still
    /trials?since=ID.EPOCH.N    the numbers of the records from N on, for several runs at once (binary, see `runs.pack`)
    /policies?run=ID&index=N    records with their policies layer by layer; several with commas between them
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from tightrope.search.report.module import script, style
from tightrope.search.report.runs import LogFolder, Run, pack
from tightrope.spaces.errors import TightropeError

log = logging.getLogger(__name__)
_MOST_BYTES = 24 << 20  # read from disk in one answer
_MOST_RECORDS = 50_000  # in one answer
_MOST_POLICIES = 100  # in one answer


class ParetoPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Shows all trials, the front and every policy of the searches below `--logdir` or the folders of `--logdir_spec`."""

    plugin_name = "pareto"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._folder = LogFolder(_roots(context))

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Iterable[bytes]]]:
        """The routes."""
        answers = {"/runs": self._runs, "/trials": self._trials, "/policies": self._policies}
        pages = {"/index.js": _page(script, "text/javascript"), "/pareto.css": _page(style, "text/css")}
        return pages | {path: _safe(answer) for path, answer in answers.items()}

    def is_active(self) -> bool:
        """Whether any run is there. The first call starts to read them, so that the tab opens on read ones."""
        runs = self._folder.runs()
        if any(not len(run) for run in runs):
            threading.Thread(target=_refresh, args=(runs,), name="pareto-reader", daemon=True).start()
        return bool(runs)

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Name of the tab and its module."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Pareto", disable_reload=True)

    def _runs(self, request: Request) -> Response:
        runs = self._folder.runs()
        left = _MOST_BYTES
        for run in runs:
            left -= _refresh([run], left) if left > 0 else 0
        listed = json.dumps([run.summary() for run in runs])
        tag = hashlib.sha256(listed.encode()).hexdigest()[:16]
        body = f'{{"tag": "{tag}"}}' if request.args.get("tag") == tag else f'{{"tag": "{tag}", "runs": {listed}}}'
        return _respond(request, body.encode(), "application/json")

    def _trials(self, request: Request) -> Response:
        parts = []
        left = _MOST_RECORDS
        for since in request.args.get("since", "").split(","):
            identifier, epoch, start, *_ = *since.split("."), "", ""
            run = self._folder.run(identifier)
            first = int(start) if epoch == run.epoch and start.isdecimal() else 0
            header, block = run.part(first, left)
            left -= header["count"]
            parts.append((header, block))
        return _respond(request, pack(parts), "application/octet-stream")

    def _policies(self, request: Request) -> Response:
        run = self._folder.run(request.args.get("run", ""))
        wanted = [int(text) for text in request.args.get("index", "").split(",") if text.isdecimal()][:_MOST_POLICIES]
        body = json.dumps({"run": run.id, "epoch": run.epoch, "policies": [run.detail(index) for index in wanted]})
        return _respond(request, body.encode(), "application/json")


def _roots(context: base_plugin.TBContext) -> list[tuple[str, Path]]:
    """Name and path of each log folder: `--logdir`, without a name, or the `name:path,path,...` of `--logdir_spec`.

    What is not on this machine (`gs://...`) is left out.
    """
    if context.logdir:
        named = [("", context.logdir)]
    else:
        parts = (getattr(context.flags, "logdir_spec", "") or "").split(",")
        named = [("", part) if part.startswith("/") or ":" not in part else tuple(part.split(":", 1)) for part in parts if part]
    return [(name, Path(path).expanduser()) for name, path in named if "://" not in f"{name}:{path}"]


def _refresh(runs: Iterable[Run], limit: int | None = None) -> int:
    """Read what is new in the runs; returns about how many bytes that was. One that cannot be read is left as it is."""
    read = 0
    for run in runs:
        before = run.end
        try:
            run.refresh(limit)
        except OSError as error:
            log.warning("run %s cannot be read: %s", run.name, error)
        read += max(0, run.end - before)
    return read


def _safe(answer: Callable[[Request], Response]) -> Callable[..., Iterable[bytes]]:
    """The route as a WSGI application; what cannot be served is answered with 404 and one line of why."""

    @Request.application
    def route(request: Request) -> Response:
        try:
            return answer(request)
        except (TightropeError, OSError) as error:
            body = json.dumps({"error": str(error) if isinstance(error, TightropeError) else "not to be read"})
            return _respond(request, body.encode(), "application/json", code=404)

    return route


def _page(text: Callable[[], str], kind: str) -> Callable[..., Iterable[bytes]]:
    @Request.application
    def route(request: Request) -> Response:
        return _respond(request, text().encode(), kind)

    return route


def _respond(request: Request, body: bytes, kind: str, **more: Any) -> Response:
    response: Response = http_util.Respond(request, body, kind, **more)
    return response
