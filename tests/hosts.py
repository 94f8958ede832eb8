"""Two hosts of two ranks on one machine, joined by a network that can be made a bad one.

    process = start(directory, log)
    process.wait(timeout)
    process.stdin.close()

[Note: two hosts]
A host is a network, a UTS and a mount namespace of its own: another address and another host name.
The directory is shared; `slow` in it is a bad network file system, see tests/slow_fs.py, where FUSE
is there. Ranks are forked from a process that has imported all that they need.

The two networks are joined by a TUN device in each and a process that carries the packets from one
to the other: unlike a veth pair and `tc netem` this needs neither iproute2 nor a kernel with netem.
While the file `bad_network` exists, each packet is late and one in a hundred is dropped.

All of it lives in a PID namespace. Its first process ends when its standard input does, and with it
end all others, the networks and the mounts, however the test is killed.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import heapq
import importlib
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922
IFF_UP_RUNNING = 0x41
MTU = 9000
ADDRESSES = ("10.78.0.1", "10.78.0.2")
RANKS_PER_HOST = 2
NUM_RANKS = RANKS_PER_HOST * len(ADDRESSES)
DELAY_S, LOSS = 0.02, 0.01
LATE_S = 0.4
ROOT = Path(__file__).parents[1]
_UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str | None:
    """Why two hosts cannot be had here, or None."""
    script = "from tests import hosts; hosts.network('t', '10.78.0.1')"
    command = [*_UNSHARE, "--net", "--uts", sys.executable, "-c", script]
    try:
        tried = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except OSError as error:
        return f"unshare: {error}"
    return None if tried.returncode == 0 else f"no namespaces or TUN: {tried.stderr[-300:]}"


def why_no_fuse() -> str | None:
    """Why tests/slow_fs.py cannot be mounted here, or None."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
        importlib.import_module("mfusepy")
    except (OSError, ImportError) as error:
        return f"{error} (wanted: libfuse3, in Debian libfuse3-3, and the package mfusepy)"
    return None


def start(directory: Path, log: Path) -> subprocess.Popen[bytes]:
    """Run tests/hosts_rank.py on all ranks. Close its standard input to end everything."""
    for name in ("slow", "behind_slow", "shared"):
        (directory / name).mkdir()
    command = [*_UNSHARE, sys.executable, "-m", "tests.hosts", str(directory)]
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=out, stderr=out)


def main(directory: Path) -> None:
    """The first process of the PID namespace: makes the hosts and carries their packets."""
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    importlib.import_module("tests.hosts_rank")
    devices, children = [], []
    for number, address in enumerate(ADDRESSES):
        _unshare(CLONE_NEWNET)
        devices.append(network("link", address))
        children.append(child := os.fork())
        if child == 0:
            _run_host(number, directory)
    os._exit(max(_carry(devices, children, directory)))


def network(device: str, address: str) -> int:
    """Bring this network namespace's loopback and a new TUN device up. Returns its descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, _request(device, struct.pack("H", IFF_TUN | IFF_NO_PI)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in (
            (SIOCSIFADDR, struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(address))),
            (SIOCSIFNETMASK, struct.pack("HH4s", socket.AF_INET, 0, b"\xff\xff\xff\x00")),
            (SIOCSIFMTU, struct.pack("i", MTU)),
            (SIOCSIFFLAGS, struct.pack("H", IFF_UP_RUNNING)),
        ):
            fcntl.ioctl(control, request, _request(device, value))
        fcntl.ioctl(control, SIOCSIFFLAGS, _request("lo", struct.pack("H", IFF_UP_RUNNING)))
    return fd


def _request(device: str, value: bytes) -> bytes:
    return struct.pack("16s24s", device.encode(), value)


def _unshare(flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _end_with_standard_input() -> NoReturn:
    while os.read(0, 1):
        pass
    os._exit(1)


def _run_host(number: int, directory: Path) -> NoReturn:
    """One host: its name, its mount, its ranks."""
    status, ranks = 1, []
    try:
        _unshare(CLONE_NEWNS | CLONE_NEWUTS)
        socket.sethostname(f"host{number}")
        if why_no_fuse() is None:
            _mount_slow_fs(directory)
        for rank in range(number * RANKS_PER_HOST, (number + 1) * RANKS_PER_HOST):
            ranks.append(pid := os.fork())
            if pid == 0:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), MASTER_PORT="29517")
                os.environ.update(MASTER_ADDR=ADDRESSES[0], GLOO_SOCKET_IFNAME="link")
                importlib.import_module("tests.hosts_rank").main(directory)
                os._exit(0)
        status = max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF for pid in ranks)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _mount_slow_fs(directory: Path) -> None:
    arguments = [directory / "behind_slow", directory / "slow", str(LATE_S), directory / "faults"]
    subprocess.Popen([sys.executable, "-m", "tests.slow_fs", *map(str, arguments)])
    deadline = time.monotonic() + 20
    while not os.path.ismount(directory / "slow"):
        if time.monotonic() > deadline:
            raise TimeoutError("the slow file system is not mounted")
        time.sleep(0.05)


def _carry(devices: list[int], children: list[int], directory: Path) -> list[int]:
    """Carry packets both ways until both hosts have ended. Returns how they ended."""
    chance = random.Random(0)
    on_the_way: list[tuple[float, int, int, bytes]] = []  # when, a number, to which device, what
    count: collections.Counter[str] = collections.Counter()
    ended: list[int] = []
    is_bad, look_again = False, 0.0
    while len(ended) < len(children):
        now = time.monotonic()
        if now > look_again:
            look_again = now + 0.1
            is_bad = (directory / "bad_network").exists()
            part = directory / "packets.part"
            part.write_text(json.dumps(count))
            part.rename(directory / "packets.json")  # this process may be killed at any time
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in children:
                ended.append(os.waitstatus_to_exitcode(status) & 0xFF)
        while on_the_way and on_the_way[0][0] <= now:
            _, _, device, packet = heapq.heappop(on_the_way)
            _put(device, packet)
        until = on_the_way[0][0] if on_the_way else look_again
        ready, _, _ = select.select(devices, [], [], max(0.0, until - now))
        for device in ready:
            other = devices[1 - devices.index(device)]
            packet = os.read(device, MTU + 100)
            count["all"] += 1
            if not is_bad:
                _put(other, packet)
            elif chance.random() < LOSS:
                count["dropped"] += 1
            else:
                count["delayed"] += 1
                due = time.monotonic() + DELAY_S
                heapq.heappush(on_the_way, (due, count["all"], other, packet))
    return ended


def _put(device: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # its host has ended, or its queue is full: it is lost
        os.write(device, packet)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
