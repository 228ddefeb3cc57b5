"""The report's page and picture: they open anywhere, show everything, and need nothing else."""

from __future__ import annotations

import base64
import html.parser
import io
import warnings

import matplotlib.image
import numpy as np
import pytest
from synthetic_runs import curve, read, write_run, write_three

from helix_megatron.training.report_html import html_report
from helix_megatron.training.report_picture import DARK, LIGHT, draw_losses
from helix_megatron.training.report_runs import Comparison
from helix_megatron.training.report_table import settings_rows, table_rows


class Page(html.parser.HTMLParser):
    """Checks nesting while it reads, and keeps every address and the text."""

    VOID = ("meta", "img", "source", "link", "br", "hr", "input")
    ADDRESSES = ("src", "srcset", "href", "action", "data", "poster", "background", "cite")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in self.ADDRESSES]
        assert not [name for name, _ in attributes if name.startswith("on")], (
            "a script in an attribute"
        )
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def page_of(comparison: Comparison, command: str = "python -m report") -> Page:
    return Page(
        html_report(comparison, draw_losses(comparison), draw_losses(comparison, DARK), command)
    )


def test_the_page_needs_nothing_but_itself(tmp_path):
    """It is sent by mail and opened on machines without a network: no address, no script."""
    comparison = read(*write_three(tmp_path))
    text = html_report(comparison, b"light", b"dark", "python -m report")
    page = Page(text)
    pictures = [
        f"data:image/png;base64,{base64.b64encode(p).decode()}" for p in (b"dark", b"light")
    ]
    assert page.addresses == pictures
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_what_was_found_and_how_to_repeat_it(tmp_path):
    """A reader who has never seen the project gets the finding, its limits, and the commands."""
    page = page_of(read(*write_three(tmp_path)), "python -m report runs --out here")
    words = " ".join(page.text.split())
    assert (
        "“helix” and “stock” train the same model: over 50 iterations their losses differ by at most "
        "3e-07 nats per token (iteration 37)."
    ) in words
    assert "say nothing about GPUs" in words
    assert "# stock python -m train --label stock # helix torchrun -m train # this report" in words
    assert "python -m report runs --out here" in words
    assert "model.hidden_size 128" in words
    for heading, cells in table_rows(read(*map(tmp_path.joinpath, ("stock", "helix", "mixture")))):
        assert heading in words
        assert all(cell in words for cell in cells)


def test_everything_from_the_runs_is_escaped(tmp_path):
    """A label is the user's text: it must show as it is, and never become a tag or a formula."""
    label = """<script>alert("1")</script> & 'two' $x_$"""
    evil = {"label": label, "model": {"<b>": "<img src=x>"}, "command": "train --label '<i>'"}
    comparison = read(
        write_run(tmp_path / "a", curve(4), **evil, layout={"attention": "<u>", "m": 2}),
        write_run(tmp_path / "b", curve(4), **(evil | {"label": "_hidden"})),
    )
    page = page_of(comparison)
    assert not page.tags & {"script", "b", "i", "u"}
    assert len(page.addresses) == 2
    assert page.text.count(label) >= 3
    assert "<img src=x>" in page.text
    assert "train --label '<i>'" in page.text


def test_settings_stand_in_groups_and_differences_are_marked(tmp_path):
    """What two runs do not share is the first thing to look at when their losses differ."""
    comparison = read(*write_three(tmp_path)[:2])
    names = [name for name, _ in settings_rows(comparison)]
    layout = [name for name in names if name.startswith("layout.")]
    assert layout == names[1:9], "what only the second run has left its group"
    assert ("layout.exchange", ["–", "all-to-all"]) in settings_rows(comparison)
    text = html_report(comparison, b"", b"", "")
    assert '<tr class="differs"><th scope="row">layout.tp</th><td>1</td><td>4</td></tr>' in text
    assert '<tr><th scope="row">layout.pp</th><td>1</td><td>1</td></tr>' in text


def test_a_label_with_an_underscore_has_its_place_in_the_legend(tmp_path):
    """matplotlib leaves such labels out."""
    pictures = [
        draw_losses(read(write_run(tmp_path / label, curve(4), label=label)))
        for label in ("_run", "run")
    ]
    assert pictures[0] == pictures[1]


def corner(png: bytes) -> list[int]:
    pixels = matplotlib.image.imread(io.BytesIO(png), format="png")
    return [round(255 * channel) for channel in pixels[0, 0, :3]]


def test_the_picture_opens_and_has_a_panel_for_differences(tmp_path):
    """Losses of exact runs coincide in the upper panel: only the lower one shows that they differ."""
    runs = write_three(tmp_path)
    one, three = draw_losses(read(runs[0])), draw_losses(read(*runs))
    heights = [matplotlib.image.imread(io.BytesIO(p), format="png").shape[0] for p in (one, three)]
    assert heights[1] > 1.3 * heights[0]
    pixels = matplotlib.image.imread(io.BytesIO(three), format="png")
    colours = np.unique((255 * pixels[..., :3]).round().astype(int).reshape(-1, 3), axis=0).tolist()
    for colour in ([0x56, 0xB4, 0xE9], [0xD5, 0x5E, 0x00], [0x00, 0x9E, 0x73]):
        assert colour in colours, "a run's curve is not to be seen"


def test_the_picture_follows_the_theme(tmp_path):
    """A white picture on a dark page hurts the eye."""
    comparison = read(*write_three(tmp_path))
    assert corner(draw_losses(comparison, LIGHT)) == [255, 255, 255]
    assert corner(draw_losses(comparison, DARK)) == [0x16, 0x1B, 0x22]


@pytest.mark.parametrize("losses", [[3.0], [None], [3.0, 3.0], [None, None]])
def test_short_equal_and_broken_runs_can_be_drawn(tmp_path, losses):
    """A logarithmic axis has no place for zero, and none at all for a run without a finite loss."""
    comparison = read(write_run(tmp_path / "a", losses), write_run(tmp_path / "b", losses))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_losses(comparison).startswith(b"\x89PNG")
