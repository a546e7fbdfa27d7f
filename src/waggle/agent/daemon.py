"""Runs an agent as a process: logging, signals, exit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from waggle.agent.agent import Agent
from waggle.agent.api import Api
from waggle.agent.supervisor import notify
from waggle.config import AgentConfig
from waggle.errors import KernelError, WaggleError
from waggle.kernel import capabilities

log = logging.getLogger(__name__)


def run_agent(config: AgentConfig) -> None:
    """Runs until SIGTERM or SIGINT; the data path stays in place. Raises WaggleError when it cannot start."""
    logging.basicConfig(
        level=config.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    try:
        os.umask(0o077)  # whatever it was: what others are to read is said where it is written
        capabilities.drop_others()
        agent = Agent(config)
        agent.take_node()
        api = Api(agent)
        api.bind()
        asyncio.run(_serve(agent, api))
    except OSError as error:  # the machine refuses: no descriptors left, a disk that fails
        log.debug("ended by", exc_info=error)
        raise KernelError(str(error), error.errno or 0) from error


async def _serve(agent: Agent, api: Api) -> None:

    async def ready() -> None:
        await api.start()
        log.info("listening on %s%s", agent.config.api_socket, _and_metrics(agent.config))
        notify("READY=1")

    task = asyncio.create_task(agent.run(ready))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopping; the data path stays in place")
        notify("STOPPING=1")
    except BaseExceptionGroup as group:
        # one part failed and took the others down: the first cause is what a user needs
        for kind in (WaggleError, OSError):
            error: BaseException | None = group.subgroup(kind)
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            if error is not None:
                raise error from group
        raise
    finally:
        await api.stop()
        await agent.cni.close()


def _and_metrics(config: AgentConfig) -> str:
    return f" and {config.metrics_address}" if config.metrics_address else ""
