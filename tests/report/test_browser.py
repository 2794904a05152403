"""The page in a real browser: it loads with no request, nothing is refused or fails, every number
of report.json is on it, and no part is wider than a phone.

Hermetic: headless Chromium (Debian's package `chromium`) on files. Alone: pytest -m slow
tests/report/test_browser.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_cli.report import report
from tests.report import written
from tests.report.test_page import list_numbers

pytestmark = pytest.mark.slow


class Seen(HTMLParser):
    """The values of `data` elements in what the browser made of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "data":
            self.values.add(str(dict(attrs)["value"]))


def browse(page: Path, folder: Path) -> tuple[str, str, list[str]]:
    """The page's DOM, what the browser logged, and the addresses that it asked for."""
    browser = shutil.which("chromium")
    assert browser, "make test-slow needs chromium: apt-get install chromium"
    log = folder / "net.json"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [
        "--enable-logging=stderr",
        "--v=0",
        f"--log-net-log={log}",
        "--net-log-capture-mode=Everything",
    ]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--disable-component-update",
        "--no-first-run",
    ]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked = [str(each) for each in list_urls(json.loads(log.read_text())["events"])]
    return done.stdout, done.stderr, asked


def list_urls(events: list[dict[str, Any]]) -> list[str]:
    """The addresses of requests, but for the browser's own to its maker."""
    urls = [each.get("params", {}).get("url") for each in events if "params" in each]
    own = ("google", "gvt1", "chrome", "devtools")
    return [url for url in urls if url and not any(part in url for part in own)]


def test_the_page_asks_for_nothing_and_shows_every_number(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "one")
    bad = "<script>document.title = 'ran'</script><img src='http://127.0.0.1:9/x.png'>"
    written.write_samples(run, (0, bad, bad), (100, bad, bad))
    written.write_evaluation(run)
    written.write_gguf(written.write_merged(run / "merged") / "m-Q4_K_M.gguf")
    page = report.write_report([run], None)
    dom, logged, asked = browse(page, tmp_path)
    assert "CONSOLE" not in logged
    assert [url for url in asked if "127.0.0.1" in url or url.startswith("http")] == []
    said = json.loads(page.with_suffix(".json").read_text())
    numbers = {json.dumps(number) for number in list_numbers(said)}
    assert len(numbers) > 50
    assert numbers <= Seen(dom).values
    assert "<title>one · lora report</title>" in dom


def test_a_page_that_asked_would_be_seen(tmp_path: Path) -> None:
    """The two tests of `browse` are not vacuous."""
    page = tmp_path / "asks.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>throw Error('no')</script>")
    _, logged, asked = browse(page, tmp_path)
    assert "CONSOLE" in logged
    assert "http://127.0.0.1:9/x.png" in asked


MEASURE = """<script>
addEventListener('load', () => {
  const page = document.querySelector('iframe').contentDocument
  document.title = JSON.stringify([page.documentElement.scrollWidth, page.documentElement.clientWidth])
})</script><iframe src="%s" style="width:390px;height:800px;border:0"></iframe>"""


def test_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    runs = [written.write_run(tmp_path / f"run-{'x' * 60}-{at}", id=f"{at}") for at in range(6)]
    written.write_evaluation(runs[0])
    written.write_gguf(written.write_merged(runs[0] / "merged") / f"{'m' * 90}.gguf", run_id="0")
    written.write_samples(runs[0], (0, "q" * 300, "a" * 1000), (100, "q" * 300, "b" * 1000))
    page = report.write_report(runs, tmp_path / "all.html")
    # scripts of the outer page measure the inner one, which the browser counts as of one place
    (tmp_path / "outer.html").write_text(MEASURE % page.name)
    browser = str(shutil.which("chromium"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", f"file://{tmp_path / 'outer.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = dom.partition("<title>")[2].partition("</title>")[0]
    wide, there = json.loads(title)
    assert 360 < there <= 390  # a scroll bar may take some
    assert wide == there
