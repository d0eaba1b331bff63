"""The plug-in's view of one run as a single page that needs no server, to send to somebody."""

import base64
import gzip
import hashlib
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from tightrope.search import pareto
from tightrope.search.report.module import script, style
from tightrope.search.report.runs import COSTS, KINDS, Run, open_run, pack
from tightrope.spaces.policy import write_atomically

MOST_POLICIES = 1000  # policies that a page holds; the fronts and controls come first
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="Tightrope">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<script type="application/octet-stream" id="tightrope-data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def write_html(run: Path, file: Path) -> None:
    """Write the page. It holds all trials, the policies of every front and of the controls, and others up to a thousand."""
    read = open_run(run)
    data = gzip.compress(json.dumps(_data(read), allow_nan=False).encode(), mtime=0)
    code = f"{script()}\nrender();\n"
    page = _PAGE.format(
        digest=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
        title=html.escape(f"{read.study['name'] or read.name}: trials and front"),
        style=style(),
        data=base64.b64encode(data).decode(),
        script=code,
    )
    write_atomically(file, page)


def _data(run: Run) -> dict[str, Any]:
    summary = run.summary()
    return {
        "runs": [summary],
        "trials": base64.b64encode(pack([run.part(0, len(run))])).decode(),
        "policies": {run.id: {index: run.detail(index) for index in _wanted(run)}},
    }


def _wanted(run: Run) -> list[int]:
    """Records whose policies are kept: controls, the front over every cost, then the first trials."""
    kinds, scores = np.array(run.columns["kind"]), np.array(run.columns["score"])
    trials = np.flatnonzero((kinds == KINDS.index("trial")) & np.isfinite(scores))
    fronts = [
        trials[np.isfinite(cost)][pareto.non_dominated(cost[np.isfinite(cost)], scores[trials][np.isfinite(cost)])]
        for cost in (np.array(run.columns[name])[trials] for name in COSTS)
    ]
    others = np.flatnonzero(kinds != KINDS.index("trial"))
    found = dict.fromkeys(int(i) for part in (others, *fronts, np.arange(len(run))) for i in part)
    return list(found)[:MOST_POLICIES]
