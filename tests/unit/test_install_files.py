"""What `waggle install` writes: the unit lets the agent write where the settings say, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from waggle.config import AgentConfig
from waggle.install.files import directories, unit

LOG = Path("/var/log/waggle/flows.jsonl")


@pytest.mark.parametrize(("log", "writable"), [(None, []), (LOG, ["ReadWritePaths=-/var/log/waggle"])])
def test_the_flow_log_is_writable_where_there_is_one(log: Path | None, writable: list[str]):
    config = AgentConfig(flow_log=log)
    lines = unit(Path("/usr/bin/waggle"), config).splitlines()
    assert "ProtectSystem=strict" in lines
    assert [line for line in lines if line.startswith("ReadWritePaths")] == writable
    assert (LOG.parent in directories(config)) is (log is not None)
