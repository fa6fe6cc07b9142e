"""Servers of several modes, started while tests run against the one before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from testbed.server import Server

# The stock server, the one under test, one that it is paired with, and the next one.
MAX_SERVERS = 4


class ServerPool:
    """Starts servers when they are asked for, and stops the oldest beyond a limit.

    Most of the time of a test is spent on waiting for servers to start. So the first ones are
    started at once, and the next one while tests run against the one before.

    Args:
        orders: Names in the order in which they are going to be asked for, if the first of
            the same list is.
        first: Names of those that certainly are, before all others.
    """

    def __init__(
        self,
        report: Callable[[str], None],
        orders: Sequence[Sequence[str]],
        first: Sequence[str] = (),
    ):
        self.report = report
        self.next_of = dict(pair for order in orders for pair in itertools.pairwise(order))
        self.servers: dict[str, Server] = {}
        self.ready: set[str] = set()
        for name in first:
            self.start(name)

    def get(self, name: str) -> Server:
        server = self.start(name)
        if name not in self.ready:
            self.report(f"waiting for the {name} server to be healthy")
            server.wait()
            self.ready.add(name)
            if name in self.next_of:
                self.start(self.next_of[name])
        return server

    def start(self, name: str) -> Server:
        if name not in self.servers:
            while len(self.servers) >= MAX_SERVERS:
                oldest = next(iter(self.servers))
                self.ready.discard(oldest)
                self.servers.pop(oldest).stop()
            self.servers[name] = Server(name)
        self.servers[name] = self.servers.pop(name)
        return self.servers[name]

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()
