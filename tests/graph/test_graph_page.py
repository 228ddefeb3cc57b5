"""The graph's page in a real browser: Chromium opens the file, clicks through it, and complains of nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from graph_runs import BASELINE, HELIX, traced
from waiting import PROGRAM_LIMIT

from helix_megatron.graph.build import attention_view, mlp_view
from helix_megatron.graph.checks import run_checks
from helix_megatron.graph.html import to_html

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLAYWRIGHT = Path.home() / ".cache" / "ms-playwright"


def find_browser() -> str | None:
    """A Chromium on the path, or one that `playwright install chromium` fetched."""
    found = [path for path in map(shutil.which, NAMES) if path]
    found += map(str, sorted(PLAYWRIGHT.glob("chromium-*/chrome-linux*/chrome"), reverse=True))
    return next(iter(found), None)


BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium is installed (apt-get install chromium, or playwright install chromium)",
)

FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0
--virtual-time-budget=5000
"""

# Uses everything that a person can, and leaves what it saw on the body.
CLICK_THROUGH = """
<script>
{
  const seen = [], press = (id) => at(id).dispatchEvent(new MouseEvent("click", { bubbles: true }));
  const area = at("canvas").getBoundingClientRect();
  for (const button of [...at("views").children]) {
    button.click();
    for (const ranks of ["folded", "all", "1"]) {
      at("ranks").value = ranks;
      at("ranks").dispatchEvent(new Event("change"));
      const closed = drawn.lanes[0].items.length;
      press("expand");
      const open = drawn.lanes[0].items.length;
      press("collapse");
      seen.push([document.body.dataset.ready, closed, open, drawn.lanes[0].items.length].join(" "));
      const boxes = [...document.querySelectorAll(".box")].slice(0, 5);
      for (const kind of ["click", "mouseenter", "mousemove", "mouseleave"])
        boxes.forEach((box) => box.dispatchEvent(new MouseEvent(kind)));
      document.querySelectorAll(".bar").forEach((bar) => bar.dispatchEvent(new MouseEvent("click")));
      const panel = at("panel").textContent;
      seen.push(`panel ${panel.includes("sent together")}`);
    }
  }
  at("search").value = "linear_fc1";
  at("search").dispatchEvent(new Event("input"));
  at("search").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  seen.push(`search ${at("hits").textContent}`);
  const before = state.scale;
  press("plus");
  seen.push(`zoomed ${state.scale > before}`);
  press("minus"); press("fit"); press("checks");
  seen.push(`checks ${at("checks").textContent}`);
  document.querySelector(".handle").dispatchEvent(new MouseEvent("click"));
  document.body.dataset.seen = seen.join("; ");
}
</script>
"""


def browse(page: Path, profile: Path, *arguments: str) -> tuple[str, list[str]]:
    """What the browser prints, and its console messages about the page."""
    assert BROWSER is not None
    run = subprocess.run(
        [BROWSER, *FLAGS.split(), f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("run", [HELIX, BASELINE], ids=["helix", "baseline"])
def test_everything_can_be_clicked_without_an_error(tmp_path, run):
    """A page that throws shows nothing; clicking through all views, ranks and details must throw nowhere."""
    graph = traced(run, backward=False)
    # So small a model's last stage has more to do: its output layer.
    checks = run_checks(graph, balance=2)
    page = to_html([graph, attention_view(graph), mlp_view(graph)], checks)
    file = tmp_path / "graph.html"
    file.write_text(page.replace("</body>", CLICK_THROUGH + "</body>"))
    document, console = browse(file, tmp_path / "profile", "--dump-dom", file.as_uri())
    assert console == []
    seen = document.split('data-seen="')[1].split('"')[0].split("; ")
    views = [entry for entry in seen if "lanes" in entry]
    assert len(views) == 9
    lanes = [int(entry.split(" lanes")[0].split()[-1]) for entry in views]
    layers = 4 if run == HELIX else 2  # ranks that have layer 0
    folded = 1 if run == HELIX else 2
    assert lanes == [folded, 4, 1, 1, layers, 1, 1, layers, 1]
    for entry in views:
        closed, opened, again = map(int, entry.split()[-3:])
        assert closed == again < opened
        assert int(entry.split(" lanes ")[1].split()[0]) > 0, "no collective is drawn"
    assert seen.count("panel true") == 9
    assert "zoomed true" in seen and "checks 8 checks passed" in seen
    found = next(entry for entry in seen if entry.startswith("search"))
    assert int(found.split()[1]) > 0, found


def test_the_page_can_be_seen(tmp_path):
    """Without errors it could still be blank: the picture has the colours of its boxes."""
    graph = traced(HELIX)
    file, picture = tmp_path / "graph.html", tmp_path / "graph.png"
    file.write_text(to_html([graph, attention_view(graph), mlp_view(graph)]))
    address = f"{file.as_uri()}#mha_layer_0_partitioned/all"
    arguments = ("--window-size=1400,900", f"--screenshot={picture}", address)
    _, console = browse(file, tmp_path / "profile", *arguments)
    assert console == []
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (900, 1400)
    attention, collective, exchange = (0xD8, 0xE6, 0xF7), (0xFF, 0xE2, 0xA8), (0xF6, 0xC7, 0xB0)
    colors = {"attention": attention, "collective": collective, "exchange": exchange}
    for name, color in colors.items():
        share = (np.abs(pixels - color).max(axis=-1) <= 2).mean()
        assert share > 0.004, f"{name}: {share:.4f} of the picture"
