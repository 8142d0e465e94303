"""Faults on a real Ray cluster of several nodes on this machine: kills and cut links. A part of ``solvus chaos``."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.chaos import SOLVUS, Tally, arguments, compare, count_waste, forget_some, wait_for_rows


def cluster_kills(
    reference: Path, root: Path, kills: int, shards: int, rows_each: int, seed: int, nodes: int = 2, heads: int = 1
) -> Tally:
    """Kill workers, nodes, the driver and the head of a real Ray cluster every few seconds during one study."""
    from orchestrator.adapters.ray_cluster import RayCluster

    tally, draw, began = Tally("Ray: workers, nodes, driver and head killed"), random.Random(seed), time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    trace = root / "trace"
    place = Path(f"/tmp/solvus-chaos-{os.getpid()}")
    cluster = RayCluster(place, num_cpus=1, environment={"SOLVUS_TRACE": str(trace)})
    for _ in range(nodes):
        cluster.add_node()
    ray = ["executor=ray", f"executor.address={cluster.address}", f"executor.workers={nodes}", "executor.silence_s=20"]
    ray += ["executor.max_losses=100"]
    argv = [*SOLVUS, *arguments(root, shards, rows_each, *ray)]
    log = open(root / "driver.log", "ab")
    driver = subprocess.Popen(argv, stdout=log, stderr=log, env=cluster.environment)
    needed = shards
    try:
        while time.monotonic() - began < 3600:
            if driver.poll() is not None:
                if tally.faults >= kills and driver.returncode == 0:
                    break
                if driver.returncode == 0:  # done too early: take some rows away, so that there is something to kill
                    needed += forget_some(root, draw)
                driver = subprocess.Popen(argv, stdout=log, stderr=log, env=cluster.environment)
            if tally.faults >= kills:
                driver.wait(900)
                continue
            time.sleep(draw.uniform(0.5, 1.5))
            dice = draw.random()
            workers = [(node, pid) for node in cluster.nodes for pid in node.workers()]
            if heads and tally.faults >= kills // 2:
                heads -= 1
                tally.killed_workers += len(workers)
                tally.faults += 1
                for node in list(cluster.nodes):
                    cluster.kill_node(node)
                driver.kill()
                driver.wait()
                cluster.start_head()
                for _ in range(nodes):
                    cluster.add_node()
            elif dice < 0.75 and workers:
                try:
                    os.kill(draw.choice(workers)[1], signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended by itself in between
                tally.killed_workers += 1
                tally.faults += 1
            elif 0.75 <= dice < 0.85 and len(cluster.nodes) > 1 and workers:
                node = draw.choice([n for n in cluster.nodes if n is not cluster.head])
                tally.killed_workers += len(node.workers())
                cluster.kill_node(node)
                cluster.add_node()
                tally.faults += 1
            elif 0.85 <= dice < 0.92 and trace.exists():
                tally.killed_workers += len(workers)
                tally.faults += 1
                driver.kill()
                driver.wait()
        if driver.poll() is None:
            driver.wait(900)
        if driver.returncode != 0:
            tally.notes.append(f"the driver ended with {driver.returncode}; see {root / 'driver.log'}")
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
        cluster.close()
        log.close()
    count_waste(tally, root, trace, needed)
    compare(tally, reference, root)
    tally.seconds = time.monotonic() - began
    return tally


class Link:
    """A network namespace of its own, joined to this one by a link that can be cut."""

    def __init__(self) -> None:
        number = os.getpid() % 250
        self.namespace, self.inside, self.outside = f"solvus{number}", f"sv{number}b", f"sv{number}a"
        self.host, self.guest = f"10.213.{number}.1", f"10.213.{number}.2"

    def make(self) -> None:
        """Make it; CalledProcessError or FileNotFoundError where this machine does not allow it."""
        self._ip("netns", "add", self.namespace)
        self._ip("link", "add", self.outside, "type", "veth", "peer", "name", self.inside)
        self._ip("link", "set", self.inside, "netns", self.namespace)
        self._ip("addr", "add", f"{self.host}/24", "dev", self.outside)
        self._ip("link", "set", self.outside, "up")
        self._ip("-n", self.namespace, "addr", "add", f"{self.guest}/24", "dev", self.inside)
        self._ip("-n", self.namespace, "link", "set", self.inside, "up")
        self._ip("-n", self.namespace, "link", "set", "lo", "up")

    def set(self, up: bool) -> None:
        """Mend or cut it."""
        self._ip("link", "set", self.outside, "up" if up else "down")

    def remove(self) -> None:
        """Take it away again."""
        subprocess.run(["ip", "link", "del", self.outside], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


def link_cuts(reference: Path, root: Path, shards: int, rows_each: int, short_s: float = 30.0) -> Tally:
    """Cut a node's link for half a minute, then for good: Ray alone would wait for ever."""
    from orchestrator.adapters.ray_cluster import RayCluster

    tally, began, link = Tally("a node's link cut for 30 s, then for good"), time.monotonic(), Link()
    try:
        link.make()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        link.remove()
        tally.name += " (left out: no network namespaces here)"
        print(f"network namespaces cannot be made here: {error}", file=sys.stderr)
        return tally
    root.mkdir(parents=True, exist_ok=True)
    cluster = driver = None
    try:
        cluster = RayCluster(Path(f"/tmp/solvus-link-{os.getpid()}"), num_cpus=1, host=link.host)
        cluster.add_node(namespace=link.namespace, ip=link.guest)
        ray = ["executor=ray", f"executor.address={cluster.address}", "executor.workers=2", "executor.silence_s=12"]
        argv = [*SOLVUS, *arguments(root, shards, rows_each, *ray)]
        with open(root / "driver.log", "ab") as log:
            driver = subprocess.Popen(argv, stdout=log, stderr=log, env=cluster.environment)
        wait_for_rows(root, 4)
        link.set(up=False)
        tally.faults += 1
        time.sleep(short_s)
        link.set(up=True)
        code = driver.wait(900)
        forget_some(root, random.Random(0))  # so that there is something to do when the link goes for good
        with open(root / "driver.log", "ab") as log:
            driver = subprocess.Popen(argv, stdout=log, stderr=log, env=cluster.environment)
        wait_for_rows(root, len(list(root.glob("store/rows/*/*/*.json"))) + 2, timeout_s=60)
        if driver.poll() is None:
            link.set(up=False)
            tally.faults += 1
        code = code or driver.wait(900)
        if code != 0:
            tally.notes.append(f"the driver ended with {code}; see {root / 'driver.log'}")
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
            driver.wait()
        if cluster is not None:
            cluster.close()
        link.remove()
    compare(tally, reference, root)
    tally.seconds = time.monotonic() - began
    return tally
