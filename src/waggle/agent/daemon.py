"""Runs an agent as a process: logging, signals, exit."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from waggle.agent.agent import Agent
from waggle.agent.api import Api
from waggle.config import AgentConfig
from waggle.errors import WaggleError

log = logging.getLogger(__name__)


def run_agent(config: AgentConfig) -> None:
    """Runs until SIGTERM or SIGINT; the data path stays in place. Raises WaggleError when it cannot start."""
    logging.basicConfig(
        level=config.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    agent = Agent(config)
    agent.take_node()
    asyncio.run(_serve(agent))


async def _serve(agent: Agent) -> None:
    api = Api(agent)

    async def ready() -> None:
        await api.start()
        log.info("listening on %s%s", agent.config.api_socket, _and_metrics(agent.config))

    task = asyncio.create_task(agent.run(ready))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopping; the data path stays in place")
    except BaseExceptionGroup as group:
        # one part failed and took the others down: the first cause is what a user needs
        errors = group.subgroup(WaggleError)
        if errors is not None and isinstance(errors.exceptions[0], WaggleError):
            raise errors.exceptions[0] from group
        raise
    finally:
        await api.stop()
        await agent.cni.close()


def _and_metrics(config: AgentConfig) -> str:
    return f" and {config.metrics_address}" if config.metrics_address else ""
