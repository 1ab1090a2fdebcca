"""By which address the ranks of other hosts reach this one.

A host need not know its own name, and the name may lead to loopback, as Debian's installer has it. So an address is
taken from the way to a host that is known by one: to that of rank 0, or, on that host, to another one.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from minidist.errors import BackendUnavailableError
from minidist.launch import own_address

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Names the interface to use, as for Gloo itself; of several, divided by commas, the first."""
LOOPBACK = "127.0.0.1"
GET_ADDRESS = 0x8915  # SIOCGIFADDR
LINK_LOCAL = "fe80"


def chosen() -> str | None:
    """Return the address of the interface that the user names, if one is named.

    Raises:
        BackendUnavailableError: there is no such interface, or it has no address.
    """
    name = os.environ.get(VARIABLE, "").split(",")[0].strip()
    if not name:
        return None
    known = by_interface()
    if not known.get(name):
        raise BackendUnavailableError(
            f"{VARIABLE} is {name!r}, but host {socket.gethostname()} has no address on an interface of that name; "
            f"it has {', '.join(known) or 'none at all'}: set it to one of them, or leave it out"
        )
    return known[name][0]


def towards(host: str) -> str:
    """Return the address that the user chose, or that by which this host reaches ``host``; both may be loopback."""
    return chosen() or own_address(host)


def reachable(mine: str, host_ids: Sequence[str], addresses: Sequence[str], rank: int) -> str:
    """Return the address of this rank that those of other hosts reach.

    Args:
        mine: what `towards` gave for rank 0's.
        host_ids: of all ranks, see `minidist.launch.host_id`.
        addresses: what `towards` gave to all ranks.
        rank: this one.
    """
    if chosen() or not is_loopback(mine):
        return mine
    others = (address for host, address in zip(host_ids, addresses, strict=True) if host != host_ids[rank])
    elsewhere = next((address for address in others if not is_loopback(address)), None)
    return mine if elsewhere is None else own_address(elsewhere)


def is_loopback(address: str) -> bool:
    """Whether an address leads nowhere but to the host that uses it."""
    return ipaddress.ip_address(address).is_loopback


def all_of_host() -> list[str]:
    """Return the addresses by which others may reach this host: the one that the user chose, or all but loopback."""
    if address := chosen():
        return [address]
    found = [address for some in by_interface().values() for address in some]
    return [address for address in found if not is_loopback(address)] or [LOOPBACK]


def by_interface() -> dict[str, list[str]]:
    """Return the addresses of each interface that has any, IPv4's first; link-local ones need more than an address."""
    found = dict[str, list[str]]()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # it has none of IPv4
                continue
            found[name] = [socket.inet_ntoa(answer[20:24])]
    for line in _lines("/proc/net/if_inet6"):
        digits, *_, name = line.split()
        if not digits.startswith(LINK_LOCAL):
            found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
