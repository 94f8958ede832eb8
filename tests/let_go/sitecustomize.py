"""Gives the threads of gloo groups time before a process of the tests destroys them, or ends.

A thread lets go of a collective's tensors a little after it has told of the result, and needs the
interpreter's lock for it. If by then the main thread destroys the group with the lock held (as a
DistributedDataParallel that dies last does) both wait for ever; if the interpreter is ending, the
thread aborts the process (torch 2.13, pytorch#190489).
"""

import atexit
import time

import torch.distributed as dist

ENOUGH_S = 0.3

if dist.is_available():
    _destroy = dist.destroy_process_group

    def _destroy_late(*args: object, **kwargs: object) -> None:
        time.sleep(ENOUGH_S)
        _destroy(*args, **kwargs)

    dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = _destroy_late

    atexit.register(time.sleep, ENOUGH_S)
