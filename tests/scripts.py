"""Runs a script on several ranks as torchrun does, in processes that have torch imported already.

torchrun and each of its workers spend seconds on imports; a script's own steps take less. Workers
come from the tests' fork server instead. They get the same variables, meet at a store of this
process's as torchrun's meet at its agent's.

`run` starts a launcher's own command instead, for the few tests that are about launching.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.pool import ENVIRONMENT, fork_server, leave_out_what_is_slow, redirect_output

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ACCELERATE = [str(BIN / "accelerate"), "launch", "--config_file"]
CPU = {"ACCELERATE_USE_CPU": "true"}  # DeepSpeed's launcher takes no part in the variable
TIMEOUT_S = 300.0
LET_GO = ROOT / "tests" / "let_go"


def run_on(
    num_ranks: int, script: str, *arguments: object, cwd: Path = ROOT, **variables: str
) -> str:
    """Run a script to its end on every rank and return what all printed.

    One rank is a process that no launcher started.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, **ENVIRONMENT, **variables}
    command = [str(ROOT / script), *map(str, arguments)]
    workers = []
    with tempfile.NamedTemporaryFile("r", errors="replace") as log, fork_server() as context:
        try:
            for rank in range(num_ranks):
                own = dict(environment)
                if num_ranks > 1:
                    own |= _as_torchrun(rank, num_ranks, store.port)
                arguments = (command, own, str(cwd), log.name)
                worker = context.Process(target=_run_here, args=arguments)
                worker.start()
                workers.append(worker)
            deadline = time.monotonic() + TIMEOUT_S
            running = {worker.sentinel: worker for worker in workers}
            while running:
                ended = wait(list(running), deadline - time.monotonic())
                assert ended, f"not done after {TIMEOUT_S:.0f} s:\n{log.read()[-4000:]}"
                for worker in [running.pop(sentinel) for sentinel in ended]:
                    worker.join()
                    printed = f"rank ended with {worker.exitcode}:\n"
                    assert worker.exitcode == 0, printed + log.read()[-4000:]
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        return log.read()


def under_accelerate(
    config: str, script: str, *arguments: object, cwd: Path = ROOT, **variables: str
) -> str:
    """As `run_on`, with the ranks and variables that accelerate's launcher takes from a file."""
    command = [*ACCELERATE[2:], str(ROOT / f"launch/accelerate/{config}.yaml"), script]
    args, read, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(read.deepspeed_config)
        _, launcher = prepare_deepspeed_cmd_env(args)
    else:
        launcher = prepare_multi_gpu_env(args)
    only = {k: v for k, v in launcher.items() if k.startswith("ACCELERATE_")}
    return run_on(args.num_processes, script, *arguments, cwd=cwd, **{**only, **variables})


def run(command: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def _as_torchrun(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run_here(command: list[str], environment: dict[str, str], cwd: str, log: str) -> None:
    """One rank: become the script."""
    redirect_output(log)
    leave_out_what_is_slow()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    runpy.run_path(str(LET_GO / "sitecustomize.py"))
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
