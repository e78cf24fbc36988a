"""FSDP2 over two gloo processes, a batch each, against one process with both: losses' gradients, and the head
put together.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("swift")
pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
PROGRAM = """
import os

import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from test_varlen import batches, loss_and_gradients
from helpers.tiny import tiny_model

from fastmtp.swift_plugin import head_of

dist.init_process_group("gloo")
mine = [batches()[name] for name in ("packed", "right")]
net = tiny_model(3, torch.float64, spread=0.15)
whole = head_of(net)
both = [loss_and_gradients(net, batch)[1:] for batch in mine]
net.head.requires_grad_(True)
mesh = init_device_mesh("cpu", (2,))
for module in (*net.model.layers, net):
    fully_shard(module, mesh=mesh)
net(**mine[dist.get_rank()]).loss.backward()
for parameter, *wanted in zip(net.head.parameters(), *both, strict=True):
    assert isinstance(parameter, DTensor)
    torch.testing.assert_close(parameter.grad.full_tensor(), sum(wanted) / 2)
assert all(parameter.grad is None for parameter in net.model.layers.parameters())
found = head_of(net)
assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
print("equal", flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # at the interpreter's end one of gloo's threads may still be alive, which can abort the process
"""


def test_sharded_gradients_are_the_whole_ones():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={port}",
            "--no-python",
        ]
        + [sys.executable, "-c", PROGRAM],
        env={
            "PYTHONPATH": f"{TESTS}:{TESTS / 'head'}:{TESTS.parent}",
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0 and result.stdout.count("equal") == 2, (
        result.stdout[-2000:] + result.stderr[-4000:]
    )
