"""A real Ray cluster of several nodes on this machine: own ports, token authentication, ended by process group.

For tests and for ``solvus chaos``. It kills only what it started. Nodes may live in network namespaces of their own,
so that a link between two of them can be cut.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(count: int) -> list[int]:
    """Consecutive free ports of loopback, outside the range that Ray's workers take."""
    for _ in range(200):
        first = random.SystemRandom().randrange(21000, 31000)
        probes: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                probe = socket.socket()
                probes.append(probe)
                probe.bind(("127.0.0.1", port))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise RuntimeError(f"no {count} free ports between 21000 and 31000")


@dataclass
class Node:
    """One node: the process group of its ``ray start --block``."""

    process: subprocess.Popen[bytes]
    namespace: str | None = None

    def workers(self) -> list[int]:
        """Process ids of the actors that run on it."""
        import psutil

        found = []
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if child.name().startswith("ray::") and "Actor" in child.name():
                        found.append(child.pid)
                except psutil.Error:
                    continue
        except psutil.Error:
            pass
        return found


class RayCluster:
    """A head and any number of further nodes.

    Args:
        folder: where sessions and logs lie; short, because Unix sockets lie below it.
        num_cpus: CPUs of the head.
        dashboard: whether the job server runs.
        host: address of the head; a bridge's when nodes live in namespaces.
        environment: further variables for every node.
    """

    def __init__(
        self,
        folder: Path,
        num_cpus: int = 1,
        dashboard: bool = False,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.host, self._count, self._dashboard = folder, host, 0, dashboard
        folder.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(16)
        token_file = folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)
        self.port, self.dashboard_port, *self._agent_ports = free_ports(64)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_TMPDIR": str(folder / "t"),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        } | dict(environment or {})
        self.address, self.jobs = f"{host}:{self.port}", f"http://127.0.0.1:{self.dashboard_port}"
        self.num_cpus = num_cpus
        self.nodes: list[Node] = []
        self.start_head()

    def start_head(self) -> None:
        """The head, at first or again after it was killed."""
        self.head = self._start(
            None, self.host, "--head", f"--port={self.port}", f"--num-cpus={self.num_cpus}",
            "--dashboard-host=127.0.0.1", f"--include-dashboard={str(self._dashboard).lower()}",
            f"--dashboard-port={self.dashboard_port}",
        )  # fmt: skip
        self._wait_for_head()

    def _start(self, namespace: str | None, ip: str, *arguments: str) -> Node:
        port = self._agent_ports[self._count % len(self._agent_ports)]
        self._count += 1
        prefix = ["ip", "netns", "exec", namespace] if namespace else []
        with open(self.folder / f"node{self._count}.log", "wb") as log:
            process = subprocess.Popen(
                [*prefix, *RAY, "start", *arguments, f"--node-ip-address={ip}", "--block", "--disable-usage-stats",
                 f"--dashboard-agent-listen-port={port}"],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        node = Node(process, namespace)
        self.nodes.append(node)
        return node

    def add_node(self, num_cpus: int = 1, namespace: str | None = None, ip: str | None = None) -> Node:
        """One more node; returns when it has joined, for two that start at once can time each other out."""
        for _ in range(3):
            node = self._start(namespace, ip or self.host, f"--address={self.address}", f"--num-cpus={num_cpus}")
            log = self.folder / f"node{self._count}.log"
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and node.process.poll() is None:
                if "block" in log.read_text(errors="replace"):
                    return node
                time.sleep(0.2)
            self.kill_node(node)
        raise RuntimeError(f"a Ray node did not join; see {log}")

    def get(self, path: str, token: str | None) -> tuple[int, bytes]:
        """Status and body of a GET of the job server, with or without a token."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urlopen(Request(self.jobs + path, headers=headers), timeout=10) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    def _answers(self) -> bool:
        if self.head.process.poll() is not None:
            raise RuntimeError((self.folder / f"node{self._count}.log").read_text()[-2000:])
        if not self._dashboard:
            with socket.socket() as probe:
                probe.settimeout(1)
                return probe.connect_ex((self.host, self.port)) == 0
        try:
            status, body = self.get("/api/jobs/", self.token)
            return status == 200 and isinstance(json.loads(body), list)
        except (URLError, OSError, ValueError):
            return False

    def _wait_for_head(self, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(0.5)
        raise RuntimeError(f"Ray's head did not start within {timeout_s:.0f} s; see {self.folder}")

    def kill_node(self, node: Node) -> None:
        """SIGKILL a whole node: every process below its ``ray start``."""
        import psutil

        try:
            family = [psutil.Process(node.process.pid), *psutil.Process(node.process.pid).children(recursive=True)]
        except psutil.Error:
            family = []
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue
        try:
            os.killpg(node.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        node.process.wait(20)
        if node in self.nodes:
            self.nodes.remove(node)

    def close(self) -> None:
        """End what was started here, and nothing else."""
        for node in list(self.nodes):
            self.kill_node(node)
        shutil.rmtree(self.folder, ignore_errors=True)
