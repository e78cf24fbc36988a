"""The process that trains: it imports ms-swift while fastmtp.train still reads the rows, then runs a recipe.

Importing takes as long as reading 30,000 rows. So `launch` starts the process first (with torchrun one for
each GPU), and it waits until recipe.yaml lies in a folder that both know.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastmtp import checkout
from fastmtp.data.start_up import StartUp
from fastmtp.data.training_run import RECORD
from fastmtp.leftovers import is_running

RECIPE = "recipe.yaml"
TORCHRUN = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def launch(recipe: dict, folder: Path) -> Iterator[subprocess.Popen]:
    """The process, which waits for `folder`/recipe.yaml. It has ended when the block is left."""
    environment = {
        **{name: str(value) for name, value in (recipe.get("ENV") or {}).items()},
        **os.environ,
        "PYTHONPATH": checkout.python_path(),  # the plugin imports the package
        "FASTMTP_PARENT": str(os.getpid()),
        "FASTMTP_RECORD": str((Path(recipe["output_dir"]) / RECORD).absolute()),
    }
    told = {name: os.environ[name] for name in TORCHRUN if os.environ.get(name)}
    options = [f"--{name.lower()}={value}" for name, value in told.items()]
    torchrun = "NPROC_PER_NODE" in told or "NNODES" in told
    command = ["torch.distributed.run", *options, "-m"] if torchrun else []
    command = [sys.executable, "-m", *command, "fastmtp.swift_process", str(folder)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        stop(process, (folder / RECIPE).exists())


def stop(process: subprocess.Popen, begun: bool) -> None:
    """End the process and all that it started; a no-op if it has ended. One that only waits is killed at
    once: torchrun would show a traceback.
    """
    signals = ((signal.SIGTERM, 10), (signal.SIGKILL, None))
    for number, seconds in signals if begun else signals[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def wait(folder: Path) -> None:
    """Return once the recipe lies in `folder`. SystemExit if nobody is left to write it."""
    parent = os.getppid()
    while not (folder / RECIPE).exists():
        # fastmtp.train was killed, or with torchrun between the two, torchrun after a refusal
        if os.getppid() != parent or not is_running(int(os.environ["FASTMTP_PARENT"])):
            raise SystemExit(1)
        time.sleep(0.05)


def main(folder: Path) -> None:
    """Import what a training needs, wait for the recipe, and be `swift sft` with it."""
    logging.disable(logging.INFO)  # ms-swift logs a line when it is imported: not yet
    from swift.cli.main import parse_yaml_args
    from swift.cli.utils import try_use_single_device_mode
    from swift.pipelines import sft_main
    from swift.ray_utils import try_init_ray

    logging.disable(logging.NOTSET)
    wait(folder)
    start_up = StartUp.read(folder)
    start_up.lap("imports")
    start_up.hand_on()
    arguments = [str(folder / RECIPE)]
    parse_yaml_args(arguments)
    sys.argv[1:] = arguments  # from here on as swift/cli/sft.py
    try_use_single_device_mode()
    try_init_ray()
    sft_main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
