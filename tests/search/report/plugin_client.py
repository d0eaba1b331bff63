"""Asks the plug-in of a TensorBoard that is running."""

import json
import urllib.error
import urllib.request
from typing import Any


class Answer:
    """One answer of the plug-in."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def get(address: str, path: str, **headers: str) -> Answer:
    """GET a route of the plug-in."""
    request = urllib.request.Request(
        f"{address}data/plugin/pareto{path}", headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())
