"""Fixtures of the CNI tests: a built plugin and a node with an agent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cni_node import DUAL, Node, build_plugin


@pytest.fixture(name="plugin", scope="session")
def built_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plugin(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(name="node")
async def running_node(tmp_path: Path, plugin: Path) -> AsyncIterator[Node]:
    """A node with an agent and both ranges."""
    node = Node(tmp_path, plugin)
    try:
        node.open(DUAL)
        await node.start_agent()
        yield node
    finally:
        await node.close()
