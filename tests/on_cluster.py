"""Run by test_distributed.py in a network of its own: a Ray cluster of three nodes of one core,
whose actors explain the photographs of a folder while one of them dies, or with the word "machine"
the node that it is on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from commandline import command

# Takes the weights of tiny_network. Photographs are in 0..1, what it is tried with is not.
DEADLY = """
import os
import signal
from pathlib import Path
import ray
import tiny_network
from torch import nn

HERE = Path(__file__).parent

class Deadly(nn.Module):
    seen = 0

    def forward(self, x):
        if x.min() < 0 or x.max() == 0:
            return x
        if (x.amin(dim=(1, 2, 3)) == 1).any():
            raise RuntimeError("white is too bright")
        node = ray.get_runtime_context().get_node_id()
        (HERE / "seen" / f"{node} {os.getpid()}").touch()
        self.seen += len(x)
        if self.seen > 8 and not (HERE / "machine").exists():
            try:
                (HERE / "killed").touch(exist_ok=False)
            except FileExistsError:
                return x
            os.kill(os.getpid(), signal.SIGKILL)
        return x

def make():
    loaded = tiny_network.make()
    loaded.model[0] = nn.Sequential(loaded.model[0], Deadly())
    return loaded
"""


def bring_up_loopback() -> None:
    """What `ip link set lo up` does, which is not everywhere."""
    set_flags, up_and_running = 0x8914, 0x1 | 0x40
    with socket.socket() as anything:
        fcntl.ioctl(anything, set_flags, struct.pack("16sh", b"lo", up_and_running))


def lose_a_machine(cluster: Any, folder: Path) -> None:
    """Ends the node of an actor, without notice, once two nodes have seen images."""
    others = {node.node_id: node for node in cluster.worker_nodes}
    while True:
        time.sleep(0.05)
        nodes = {path.name.split()[0] for path in (folder / "seen").iterdir()}
        if len(nodes) > 1:
            victim = min(nodes & others.keys())
            cluster.remove_node(others[victim], allow_graceful=False)
            (folder / "killed").touch()
            return


def main(folder: Path, *, machine: bool) -> None:
    """Writes the datasets python.parquet/ and cli/maps.parquet/, and what was seen as JSON."""
    bring_up_loopback()
    if machine:
        (folder / "machine").touch()
    (folder / "deadly_network.py").write_text(DEADLY)
    (folder / "seen").mkdir()

    import ray
    from ray.cluster_utils import Cluster

    from diffcam_fast.distributed import explain

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        if machine:
            threading.Thread(target=lose_a_machine, args=(cluster, folder), daemon=True).start()
        # Two actors of the three cores: one is left to read with.
        images = ray.data.read_binary_files(str(folder / "photos"), include_paths=True)
        explain(images, model="deadly_network:make", batch_size=2, concurrency=2).write_parquet(
            str(folder / "python.parquet")
        )
        arguments = ["photos", "-m", "tiny_network:make", "--topk", "2", "--format", "parquet"]
        where = ["-o", f"file://{folder / 'cli'}", "--json", "--engine", "ray", "--ray-address"]
        told = subprocess.run(
            command("explain", *arguments, *where, cluster.address, "--actors", "1"),
            capture_output=True,
            text=True,
        )
        seen = [path.name.split() for path in (folder / "seen").iterdir()]
        facts = {
            "nodes": sorted({node for node, _ in seen}),
            "processes": sorted({process for _, process in seen}),
            "status": told.returncode,
            "summary": json.loads(told.stdout or "null"),
            "said": told.stderr,
        }
        (folder / "facts.json").write_text(json.dumps(facts))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path.cwd(), machine="machine" in sys.argv)
