"""Script and style of the Pareto tab; the ES modules of `static/` are joined to the one that is served."""

import re
from functools import cache
from pathlib import Path

STATIC = Path(__file__).with_name("static")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.MULTILINE)


@cache
def script() -> str:
    """`index.js` after all that it imports, each module once; their names share one scope, so none is defined twice."""
    parts: dict[str, str] = {}

    def take(name: str, *, entry: bool = False) -> None:
        text = (STATIC / f"{name}.js").read_text(encoding="utf-8")
        for needed in _IMPORT.findall(text):
            if needed not in parts:
                take(needed)
        text = _IMPORT.sub("", text)
        parts[name] = text if entry else re.sub(r"^export ", "", text, flags=re.MULTILINE)

    take("index", entry=True)
    return "\n".join(parts.values())


@cache
def style() -> str:
    """The style sheet."""
    return (STATIC / "pareto.css").read_text(encoding="utf-8")
