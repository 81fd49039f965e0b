"""The report in a real browser: at two widths, dark and in print, no text box is on another."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from scalabl_ref.evaluation.report import document

from .test_charts import model, ood
from .test_report import NAMES, full, rows

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

# Each text with its box in px; then the pairs of boxes that meet, the texts that are cut off, and
# those with too little contrast. A frame shares its page's origin, and its own policy stays.
MEASURE = """
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, boxes = [], faults = [];
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const paper = light(view.getComputedStyle(page.body).backgroundColor);
  const walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const of = node.parentElement, drawn = of.closest("svg"), scrolls = of.closest(".scroll");
    if (!node.data.trim() || of.closest("caption, title, desc, style") ||
        !of.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true})) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const parts = drawn ? [of.getBoundingClientRect()] : [...range.getClientRects()];
    const style = view.getComputedStyle(of), ink = light(drawn ? style.fill : style.color);
    const [high, low] = [Math.max(paper, ink) + .05, Math.min(paper, ink) + .05];
    if (high / low < 4.5) faults.push(`little contrast: ${node.data}`);
    for (const b of parts) if (b.width && b.height) {
      boxes.push([node.data.trim().slice(0, 40), b]);
      const edge = drawn ? drawn.getBoundingClientRect() : {left: 0, right: view.innerWidth};
      if ((drawn || !scrolls || getComputedStyle(scrolls).overflowX == "visible") &&
          (b.left < edge.left - 1 || b.right > edge.right + 1))
        faults.push(`cut off: ${node.data}`);
      if (drawn && (b.top < edge.top - 1 || b.bottom > edge.bottom + 1))
        faults.push(`cut off: ${node.data}`);
    }
  }
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([two, b]) => {
    const across = a.left < b.right - 1 && b.left < a.right - 1;
    if (across && a.top < b.bottom - 1 && b.top < a.bottom - 1)
      faults.push(`${one} is on ${two}`);
  }));
  return {width: view.innerWidth, texts: boxes.map(([text]) => text), faults};
}
onload = () => { out.textContent = JSON.stringify(measure(document.querySelector("iframe"))) };
"""
MODES = {
    "screen": [],
    "dark": [("@media screen and (prefers-color-scheme: dark)", "@media all")],
    "print": [("@media print", "@media all")],
}


def seen(tmp_path, page: str, width: int, mode: str) -> dict:
    """What the browser shows of a page: its texts, and the faults of their places."""
    for old, new in MODES[mode]:
        assert old in page
        page = page.replace(old, new)
    frame = f'<iframe style="width:{width}px;height:4000px;border:0" srcdoc="{html.escape(page)}">'
    path = tmp_path / "host.html"
    path.write_text(
        f"<!DOCTYPE html>{frame}</iframe><pre id=out></pre><script>{MEASURE}</script>",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--window-size=1400,1000", "--virtual-time-budget=10000", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HOME": str(tmp_path)})  # fmt: skip
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def report() -> str:
    """Three models with a long name, a best value, foreign text, rows, a plot and a table."""
    results = full()
    results["models"] += [model("a name of many words, " * 3, seed=5, ood=ood("far away"))]
    results["rows"] = rows(results["models"][0]["labels"], NAMES, "a question of some length")
    series = [(m["name"], [(i, i * 0.1), (i + 1, 0.2)]) for i, m in enumerate(results["models"])]
    results["plots"] = [{"title": "p", "x": "layer", "y": "sigma", "series": series}]
    lines = [("mle", ["-0.123 (-0.234 to -0.012; p 0.012): not told apart"] * 4)]
    results["tables"] = [{"title": "Verdicts", "heads": list("abcd"), "rows": lines, "words": "w"}]
    return document(results)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)}")
@pytest.mark.parametrize(
    "width, mode",
    [(1280, "screen"), (400, "screen"), (1280, "dark"), (400, "dark"), (718, "print")],
)
def test_no_text_box_is_on_another(tmp_path, width, mode):
    """718 px: the width of A4 between its margins."""
    found = seen(tmp_path, report(), width, mode)
    assert found["width"] == width and len(found["texts"]) > 300
    assert found["faults"] == []
    assert ("Mean confidence" in found["texts"]) == (mode == "print")  # folded numbers are printed


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)}")
def test_the_browser_finds_faults(tmp_path):
    page = report().replace("</main>", (
        '<p style="position:absolute;top:0;left:0">over</p><h1 style="color:#eee">pale</h1>'
        '<svg viewBox="0 0 50 20"><text x="45" y="10">outside</text></svg></main>'
    ))  # fmt: skip
    faults = " ".join(seen(tmp_path, page, 1280, "screen")["faults"])
    assert "cut off: outside" in faults and "little contrast: pale" in faults
    page = page.replace("h1 {", "h1 { position: absolute; top: 60px;")
    assert " is on " in " ".join(seen(tmp_path, page, 1280, "screen")["faults"])
