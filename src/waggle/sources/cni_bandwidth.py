"""Limits on what a pod sends and receives: a token bucket with a queue (sch_tbf) on each end of its veth pair.

Whoever sends to the pod queues on the host side, and the programs deliver through that queue (WAG_ENDPOINT_QUEUED);
what the pod sends queues on its own side, where the queue pushes back on its sockets. So hardly anything is lost, which
a policer could not say. A pod that may change its own interface (NET_ADMIN) can lift the second limit.
"""

from __future__ import annotations

from waggle.kernel.netlink import Batch, Netlink
from waggle.kernel.netns import call_in_netns_fd
from waggle.model.interface import Limit
from waggle.sources.cni_records import Attachment

#: A packet waits no longer than that.
_QUEUE_SECONDS = 0.05
_LEAST_QUEUE = 64 << 10


def limit_interface(host: Netlink, record: Attachment, host_index: int, netns_fd: int) -> None:
    """Both ends, as the record says. Raises KernelError. The limits go with the interface."""
    if record.bandwidth.to_pod:
        _limit(host, host_index, record.bandwidth.to_pod)
    if record.bandwidth.from_pod:
        limit = record.bandwidth.from_pod

        def of_the_pod() -> None:
            with Netlink() as pod:
                _limit(pod, pod.link_by_name(record.ifname).index, limit)

        call_in_netns_fd(netns_fd, of_the_pod, name=record.netns)


def _limit(netlink: Netlink, index: int, limit: Limit) -> None:
    batch = Batch()
    queue = limit.burst + max(int(limit.rate * _QUEUE_SECONDS), _LEAST_QUEUE)
    batch.limit_rate(index, rate=limit.rate, burst=limit.burst, queue=queue)
    netlink.run(batch)
