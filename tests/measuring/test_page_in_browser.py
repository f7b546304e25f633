"""The report's page as a real browser shows it: headless Chromium, where one is installed.

The page stands in a frame as wide as a screen, and a script beside it writes down what it sees.
`.ci/run` installs Chromium where it can.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from measuring.test_report import MEASUREMENTS, variant

from quantize.measuring.page import page
from quantize.measuring.report import build_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = "--headless --no-sandbox --disable-gpu --virtual-time-budget=5000 --dump-dom".split()
PHONE, DESK = 390, 1100

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")

FRAME = """<!doctype html><body><iframe width=%d height=900 srcdoc="%s"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inside = frame.contentDocument, style = frame.contentWindow.getComputedStyle(inside.body);
  const circle = inside.querySelector("circle"), row = inside.getElementById(circle.dataset.row);
  circle.dispatchEvent(new Event("pointerenter"));
  const root = inside.documentElement;
  const seen = {overflow: root.scrollWidth - root.clientWidth, ink: style.color,
    paper: style.backgroundColor, told: inside.querySelector("output").textContent,
    words: circle.dataset.words, lit: row.classList.contains("lit"),
    plots: [...inside.querySelectorAll("svg")].map((plot) => plot.getBoundingClientRect().width)};
  circle.dispatchEvent(new Event("pointerleave"));
  seen.dimmed = !row.classList.contains("lit");
  document.querySelector("pre").textContent = JSON.stringify(seen);
};
</script>"""


def seen(folder: Path, width: int, *flags: str) -> dict[str, Any]:
    """What the script saw of a report with long names in a frame of this width."""
    name = "pruned_by_layer+low_rank_by_layer+int8+0123456789abcdef0123456789abcdef"
    data: dict[str, Any] = {"chosen": f"{name}.safetensors", "reason": f"{name} keeps the budget"}
    layers = ", ".join(f"model.encoder.layers.0.attention.projection{i}" for i in range(4))
    data["layers"] = [{"name": layers, "got": "int8", "why": "saves 1 of 2 ms; " * 5}]
    chosen = variant(name, file=data["chosen"])
    text = page(build_report([*MEASUREMENTS, chosen], data=data))
    file = folder / "frame.html"
    file.write_text(FRAME % (width, escape(text)))
    command = [str(BROWSER), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.findall(r"<pre>({.*})</pre>", done.stdout)
    return json.loads(unescape(found[-1]))


def brightness(color: str) -> float:
    """Of "rgb(r, g, b)", 0 to 255."""
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "flags"), [(PHONE, ()), (DESK, ("--force-dark-mode",))], ids=["phone", "dark desk"]
)
def test_the_page_fits_and_answers(width, flags, tmp_path):
    """Nothing is wider than the screen, plots fill a phone, colours follow the system's, and a
    point under the pointer tells its row.
    """
    found = seen(tmp_path, width, *flags)
    assert found["overflow"] <= 0
    assert all(0.3 * width < plot <= width for plot in found["plots"]) and len(found["plots"]) == 2
    assert found["told"] == found["words"] and found["lit"] and found["dimmed"]
    paper, ink = brightness(found["paper"]), brightness(found["ink"])
    assert ink - paper > 150 if flags else paper - ink > 150
