"""The Ray that Meiosis starts listens on loopback only, and answers nobody without the token."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packages import ROOT
from worker_bodies import job, plan

from cluster.pool import RayPool

if TYPE_CHECKING:
    from cluster.local_ray import Session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
LISTENS = "0A"


def session_processes() -> dict[int, str]:
    """This process and all that descend from it: process id -> its command."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")[:200]
        except OSError:  # gone meanwhile
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: commands.get(pid, "") for pid in found}


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process listens, of IPv4 and IPv6."""
    inodes, found = set(), set()
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # what listed them, if this is our own process
                target = os.readlink(f"/proc/{pid}/fd/{number}")
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        for family, file in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
            for line in Path(f"/proc/{pid}/net/{file}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == LISTENS and inode in inodes:
                    address, _, port = local.partition(":")
                    words = bytes.fromhex(address)  # in words of 4 bytes, each in the order of this machine
                    packed = b"".join(
                        words[at : at + 4][:: 1 if sys.byteorder == "big" else -1] for at in range(0, len(words), 4)
                    )
                    found.add((socket.inet_ntop(family, packed), int(port, 16)))
    except OSError:  # gone meanwhile
        return set()
    return found


def on_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="sockets are read from /proc")
def test_every_port_of_a_ray_of_our_own_is_on_loopback_while_a_trial_runs(ray_session: Session, tmp_path: Path) -> None:
    assert ray_session.own
    with RayPool(plan(tmp_path), workers=1, body="worker_bodies:Scripted", working_folder=tmp_path) as pool:
        pool.ready()
        pool.submit(job(0, "sleep", seconds=2))
        while not (tmp_path / "pid-0").exists():
            pool.wait(0.0)
        worker = int((tmp_path / "pid-0").read_text())
        commands = session_processes()
        found = {pid: listening(pid) for pid in commands}
        assert pool.wait(60)
    ports = {(pid, address, port) for pid, sockets in found.items() for address, port in sockets}
    elsewhere = [(commands[pid], address, port) for pid, address, port in ports if not on_loopback(address)]
    assert elsewhere == []
    assert {os.getpid(), worker} <= {pid for pid, *_ in ports}, "the driver and the worker listen as well"
    for part in ("gcs_server", "raylet/raylet"):
        assert any(part in commands[pid] for pid, *_ in ports), part


def test_no_port_answers_on_the_address_of_the_machine(ray_session: Session) -> None:
    port = int(ray_session.address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells by which address the machine would
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = probe.getsockname()[0]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((own, port), timeout=10)


ASK = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=20) is not None)
"""


def test_who_has_no_token_or_another_one_gets_no_answer(ray_session: Session) -> None:
    def ask(**changed: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **changed}
        command = [sys.executable, "-c", ASK, ray_session.address]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    assert ask(RAY_AUTH_MODE="token").stdout.strip() == "True"
    for changed in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = ask(**changed)
        assert refused.returncode != 0
        assert "oken" in refused.stderr or "nauth" in refused.stderr, refused.stderr[-2000:]


def test_another_process_of_this_machine_joins_a_ray_of_our_own(ray_session: Session) -> None:
    code = (
        "import sys; from cluster.local_ray import open_session; session = open_session(sys.argv[1])\n"
        "import ray; print(sum(node['Alive'] for node in ray.nodes())); session.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ray_session.address],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
