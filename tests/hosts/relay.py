"""The wire between hosts: carries IP packets from card to card with a delay, a jitter and losses, and can be cut.

A process of its own, of the standard library alone: ``relay.py SETTINGS``, a JSON object of ``cards`` (address: open
file of the TUN device that is that host's card), ``delay`` and ``jitter`` in seconds, ``loss`` as a share of all
packets, and ``seed``. It answers every line on its input, ``count`` or ``cut ADDRESS``, by ``{"carried": N, "lost":
N}`` on its output; after a cut nothing of that host comes or goes. It ends with its input.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import socket
import sys
import time
from dataclasses import dataclass, field

LONGEST = 65536  # bytes of a packet


@dataclass
class Relay:
    """A packet is lost, or comes ``delay`` and up to ``jitter`` seconds later; those of two hosts in their order."""

    cards: dict[str, int]
    delay: float
    jitter: float
    loss: float
    seed: int
    carried: int = 0
    lost: int = 0
    _cut: set[str] = field(default_factory=set)
    _under_way: list[tuple[float, int, str, bytes]] = field(default_factory=list)
    _last: dict[tuple[str, str], float] = field(default_factory=dict)
    _taken: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def run(self, commands: int) -> None:
        """Until ``commands``, an open file, ends."""
        sources = {file: address for address, file in self.cards.items()}
        while True:
            wait = max(self._under_way[0][0] - time.monotonic(), 0.0) if self._under_way else None
            for file in select.select([commands, *sources], [], [], wait)[0]:
                if file != commands:
                    self._take(sources[file], os.read(file, LONGEST))
                elif not self._obey(os.read(commands, 4096).decode()):
                    return
            while self._under_way and self._under_way[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._under_way)
                self._hand_over(target, packet)

    def _take(self, source: str, packet: bytes) -> None:
        if packet[0] >> 4 != 4:
            return  # what a card says of itself when it comes up; nobody here speaks IPv6
        target = socket.inet_ntoa(packet[16:20])
        if target not in self.cards:
            return
        if source in self._cut or target in self._cut or self._random.random() < self.loss:
            self.lost += 1
            return
        due = time.monotonic() + self.delay + self.jitter * self._random.random()
        due = self._last[source, target] = max(due, self._last.get((source, target), due))
        self._taken += 1
        heapq.heappush(self._under_way, (due, self._taken, target, packet))

    def _hand_over(self, target: str, packet: bytes) -> None:
        if target in self._cut:
            self.lost += 1
            return
        os.write(self.cards[target], packet)
        self.carried += 1

    def _obey(self, lines: str) -> bool:
        for line in lines.splitlines():
            verb, *address = line.split()
            if verb == "cut":
                self._cut.update(address)
            print(json.dumps({"carried": self.carried, "lost": self.lost}), flush=True)
        return bool(lines)


if __name__ == "__main__":
    Relay(**json.loads(sys.argv[1])).run(sys.stdin.fileno())
