"""What the agent tells a supervisor that started it and asks to be told: systemd's notification protocol."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Sends a state such as "READY=1" (sd_notify(3)); without a supervisor that listens, nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address)
    except OSError as error:
        log.warning("cannot tell %s that %s: %s", address.replace("\0", "@"), state, error.strerror)
