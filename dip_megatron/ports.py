"""A port on which a process that is still starting will listen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A free TCP port of this machine that nobody else gets within the block, as ``MASTER_PORT`` of ranks that start in
    it: the first of them listens seconds from now, and a port that was only looked at may be anybody's by then.

    The port is bound here, and not listened on. A server that sets SO_REUSEADDR (torch's stores do) may listen on such
    a port; neither outgoing connections nor another caller, who binds before allowing that, can take it. Raises OSError
    where no port is free.
    """
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]
