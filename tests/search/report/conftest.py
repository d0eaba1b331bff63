"""A real TensorBoard and, where one is installed, a real headless Chromium."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def launch(logdir: Path | str, *, option: str = "--logdir") -> str:
    """Start TensorBoard with the plug-in; its address. The server ends with the process."""
    from tensorboard import default, program

    from tightrope.search.report.plugin import ParetoPlugin

    board = program.TensorBoard(plugins=[*default.get_static_plugins(), ParetoPlugin])
    board.configure(argv=["tensorboard", option, str(logdir), "--port", "0", "--host", "127.0.0.1", "--load_fast", "false"])
    address: str = board.launch()
    return address


@pytest.fixture
def tensorboard() -> Callable[..., str]:
    """Starts a TensorBoard on a log folder."""
    return launch


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium; the tests that need one are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs a browser to drive: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens the tab "Pareto" of a TensorBoard and gives its frame; no error may come from the page."""
    errors: list[str] = []
    with _page(chromium, errors) as page:

        def open_tab(address: str, *, wait: bool = True) -> Any:
            page.goto(f"{address}#pareto")
            page.wait_for_function("() => document.querySelector('iframe[src*=plugin_entry]')", timeout=30_000)
            frame = page.query_selector("iframe[src*=plugin_entry]").content_frame()
            if wait:
                frame.wait_for_selector(".scatter[data-ready]", timeout=30_000)
            return frame

        yield open_tab
    assert errors == []


@contextmanager
def _page(browser: Any, errors: list[str]) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1440, "height": 1200})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
