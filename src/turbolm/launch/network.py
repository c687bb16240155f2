"""Addresses, interfaces and ports, as the launchers of several nodes need them. Torch-free."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from turbolm.errors import UserError

_PORTS = (10_000, 30_000)  # below the range from which Linux takes ports for outgoing connections
_PROBES = 64
PORTS_PART = "TURBOLM_PORTS_PART"  # k/n: take ports of the k-th of n parts, so that jobs that start together differ
_CONNECT_TIMEOUT_SEC = 3
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_SIOCGIFADDR = 0x8915  # ioctl(2): the IPv4 address of an interface


def own_address(node: int, hosts: Sequence[str]) -> str:
    """The address under which the other nodes reach this one; the loopback only when there are no others.

    What the own name means in /etc/hosts is often the loopback, so the address is taken from the route to another node:
    to the head, or from there to the second node.
    """
    if len(hosts) == 1:
        return "127.0.0.1"
    peer = hosts[1] if node == 0 else hosts[0]
    target = resolve(peer)
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))  # sends nothing: it only chooses the route
        address = str(probe.getsockname()[0])
    if ipaddress.ip_address(address).is_loopback:
        raise UserError(f"the way from {hosts[node]} to {peer} ({target}) does not leave this machine")
    return address


def resolve(host: str) -> str:
    """The address of another node. Raises UserError; never falls back to this machine."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"{host} has no address here: {error}") from None
    addresses = [str(entry[4][0]) for entry in found]
    others = [address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    if not others:
        raise UserError(f"{host} resolves to {addresses[0]}, which is this machine; correct the cluster's name service")
    # A link-local address holds on one link only, and torch refuses the name of the interface in it.
    wide = [address for address in others if not ipaddress.ip_address(address.partition("%")[0]).is_link_local]
    if not wide:
        raise UserError(f"{host} has only the link-local address {others[0]}; give it one that holds on the network")
    return next((address for address in wide if ":" not in address), wide[0])


def free_port(address: str = "") -> int:
    """A port that nothing on this machine has bound; random, so that neighboring jobs and later starts differ."""
    part, _, parts = os.environ.get(PORTS_PART, "0/1").partition("/")
    for port in random.sample(range(_PORTS[0] + int(part), _PORTS[1], int(parts)), _PROBES):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe, suppress(OSError):
            probe.bind(("", port))  # on every interface, as the rendezvous will
            return port
    raise UserError(f"no free port on this machine: tried {_PROBES} of {_PORTS[0]} to {_PORTS[1]}")


def probe(address: str, port: int) -> str:
    """`open`; `closed`: the machine answers, but nothing listens there; `silent`: no answer, or no way there."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_SEC):
            return "open"
    except ConnectionRefusedError:
        return "closed"
    except OSError:
        return "silent"


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address."""
    import fcntl

    if ":" in address:
        wanted = ipaddress.IPv6Address(address).packed.hex()
        rows = [line.split() for line in _IPV6_ADDRESSES.read_text().splitlines()] if _IPV6_ADDRESSES.exists() else []
        return next((row[-1] for row in rows if row[0] == wanted), None)
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
