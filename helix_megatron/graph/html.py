"""One self-contained HTML page with all views of a graph: works from the file, with no network."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

from helix_megatron.graph.checks import Result
from helix_megatron.graph.dot import summary
from helix_megatron.graph.fold import Block, rank_classes, tree
from helix_megatron.graph.model import COLLECTIVE, Graph, Node
from helix_megatron.graph.picture import expansion

SCRIPTS = ("page.js", "page_actions.js")


def to_html(views: Sequence[Graph], checks: Sequence[Result] = ()) -> str:
    """The page of some graphs of one run, the first of which is shown first, and of its checks, if they ran."""
    strings = _Strings()
    first = views[0]
    data = {
        "summary": summary(first),
        "settings": {key: value for key, value in first.settings.items() if key != "model"},
        "ranks": first.ranks,
        "checks": [{"passed": check.passed, "text": str(check)[8:]} for check in checks],
        "views": [_view(graph, strings) for graph in views],
        "strings": list(strings),
    }
    page = _file("page.html")
    for name, content in (
        ("TITLE", html.escape(f"Helix operator graph: {summary(first)}")),
        ("STYLE", _file("page.css")),
        ("SCRIPT", "\n".join(_file(name) for name in SCRIPTS)),
        # "</script>" in a string must not end the element.
        ("DATA", json.dumps(data, separators=(",", ":")).replace("</", "<\\/")),
    ):
        page = page.replace(f"@{name}@", content, 1)
    return page


class _Strings(dict[str, int]):
    """Text → its number among different texts."""

    def __call__(self, text: object) -> int:
        return self.setdefault(str(text), len(self))


def _file(name: str) -> str:
    return resources.files("helix_megatron.graph.page").joinpath(name).read_text()


def _view(graph: Graph, strings: _Strings) -> dict[str, Any]:
    """What the page needs of a graph: the program of one rank of each class, and all collectives."""
    classes = rank_classes(graph)
    trees = [tree(one.nodes) for one in classes]
    opened = {path for root in trees for path in _opened(root, expansion(graph, "modules"))}
    programs = graph.programs.values()
    place = {node.id: index for one in programs for index, node in enumerate(one)}
    at: dict[int, dict[int, int]] = {rank: {} for one in classes for rank in one.ranks}
    for number, one in enumerate(graph.collectives):
        for name in one.members:
            at[graph.node[name].rank][place[name]] = number
    return {
        "name": graph.name,
        "open": sorted(opened),
        "classes": [
            {
                "ranks": one.ranks,
                "nodes": [_node(node, strings) for node in one.nodes],
                "edges": [edge[:3] for edge in one.edges],
                "tree": _tree(root),
            }
            for one, root in zip(classes, trees, strict=True)
        ],
        "collectives": [
            {
                "kind": strings(one.kind),
                "group": strings(one.group),
                "purpose": strings(one.purpose),
                "ranks": list(one.ranks),
                "members": [place[name] for name in one.members],
                "bytes": one.sent_bytes,
            }
            for one in graph.collectives
        ],
        "at": at,
    }


def _node(node: Node, strings: _Strings) -> list[Any]:
    """In the order of the constants KIND, OP, … of page.js."""
    return [
        node.kind,
        strings(node.op),
        strings(node.module),
        strings(node.phase),
        [strings(spec) for spec in node.inputs],
        [strings(spec) for spec in node.outputs],
        node.flops,
        node.bytes,
        node.sent_bytes if node.kind == COLLECTIVE else 0,
        int(node.view),
    ]


def _tree(block: Block) -> list[Any]:
    children = [_tree(child) if isinstance(child, Block) else child for child in block.children]
    return [block.label, block.path, children]


def _opened(block: Block, expanded: Callable[[Block, int], bool], depth: int = 0) -> Iterator[str]:
    """Paths of the blocks that are open at first."""
    if expanded(block, depth):
        yield block.path
        for child in block.children:
            if isinstance(child, Block):
                yield from _opened(child, expanded, depth + 1)
