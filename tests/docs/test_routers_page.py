"""docs/routers.md and `jmoe.routers` name the same routers."""

import re
from pathlib import Path

import jmoe

PAGE = (Path(__file__).parents[2] / "docs" / "routers.md").read_text()


def test_every_router_has_a_row_in_the_table_with_its_source():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `") and "| experts and" not in line]
    named = {name for row in rows for name in re.findall(r"`(?:jmoe\.)?(\w+)`", row.split("|")[1])}
    public = {name for name in jmoe.routers.__all__ if name.startswith(("route_", "split_")) or name.endswith("Router")}
    assert named == public - {"Router", "LogitsRouter", "LinearRouter"} | {"route_top_k"}
    assert all(re.search(r"arxiv\.org/abs/\d{4}\.\d{5}|MegaBlocks", row.split("|")[3]) for row in rows)
