"""Push the average to an inference engine, tensor by tensor, between steps of training under FSDP2.

    torchrun --standalone --nproc_per_node 2 examples/push_to_inference.py

`gather_tensors(dtype=torch.bfloat16)` gives rank 0 whole tensors, one at a time. Rank 0 broadcasts
them in a second process group, which it shares with the engine: as vLLM takes them (all names and
shapes first, then each tensor in that order) or as SGLang does (buckets: what is in it, then one
flat tensor). Here a process stands in for the engine, a store for its HTTP server, and gloo for its
NCCL group.
"""

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dist_ema import HalfLife, ShardedEMA

BUCKET_BYTES = 4096


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 1)
    )


def digest(state: dict[str, Tensor]) -> str:
    raw = (state[name].view(torch.uint8).numpy().tobytes() for name in sorted(state))
    return hashlib.sha256(b"".join(raw)).hexdigest()[:16]


class Link:
    """The trainer's or the engine's end: numbered messages, and a process group for tensors."""

    def __init__(self, store: dist.TCPStore, rank: int) -> None:
        self.store, self.number = store, itertools.count()
        inner = dist.PrefixStore("tensors", store)
        self.group = dist.ProcessGroupGloo(inner, rank, 2, timedelta(minutes=1))

    def send(self, *parts: object) -> None:
        self.store.set(f"message-{next(self.number)}", json.dumps(parts))

    def receive(self) -> list:
        return json.loads(self.store.get(f"message-{next(self.number)}"))

    def broadcast(self, tensor: Tensor) -> Tensor:
        self.group.broadcast(tensor, 0).wait()
        return tensor


def push_to_vllm(link: Link, tensors: Iterable[tuple[str, Tensor]], shapes: list[tuple]) -> None:
    link.send("tensors", shapes)
    for _, tensor in tensors:
        link.broadcast(tensor.contiguous())
    print(*link.receive())


def push_to_sglang(link: Link, tensors: Iterable[tuple[str, Tensor]]) -> None:
    def flush() -> None:
        link.send("bucket", [(name, tensor.shape) for name, tensor in bucket])
        link.broadcast(torch.cat([tensor.flatten() for _, tensor in bucket]))
        print(*link.receive())

    bucket: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        if bucket and sum(t.nbytes for _, t in bucket) + tensor.nbytes > BUCKET_BYTES:
            flush()
            bucket.clear()
        bucket.append((name, tensor))
    flush()


def engine(port: str) -> None:
    """What stands in for vLLM or SGLang: it loads what it receives, and tells what it holds."""
    link, model = Link(dist.TCPStore("127.0.0.1", int(port)), rank=1), network().bfloat16()
    while (message := link.receive()) != ["stop"]:
        kind, shapes = message
        empty = [torch.empty(shape, dtype=torch.bfloat16) for _, shape in shapes]
        if kind == "tensors":
            values = [link.broadcast(tensor) for tensor in empty]
        else:
            flat = link.broadcast(torch.cat([tensor.flatten() for tensor in empty]))
            parts = flat.split([tensor.numel() for tensor in empty])
            values = [part.view_as(tensor) for part, tensor in zip(parts, empty, strict=True)]
        loaded = {name: value for (name, _), value in zip(shapes, values, strict=True)}
        # In vLLM and SGLang: model.load_weights(zip(names, values)).
        assert model.load_state_dict(loaded, strict=False).unexpected_keys == []
        link.send(f"{len(loaded)} in {kind}", digest(model.state_dict()))


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = fully_shard(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ema = ShardedEMA(model, HalfLife(steps=5))

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    is_first = dist.get_rank() == 0
    if is_first:
        command = [sys.executable, __file__, "engine", str(store.port)]
        receiver, link = subprocess.Popen(command), Link(store, rank=0)
    layout = [(name, [*t.shape]) for name, t in ema.gather_tensors()]  # the same at every push
    for step in range(1, 41):
        torch.manual_seed(2 * step + dist.get_rank())
        x = torch.randn(32, 8)
        (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if step % 20 == 0:
            tensors = ema.gather_tensors(dtype=torch.bfloat16)  # every rank calls it
            if not is_first:
                assert list(tensors) == []  # and exhausts it
            elif step == 20:
                push_to_vllm(link, tensors, layout)
            else:
                push_to_sglang(link, tensors)
            average = ema.gather_state_dict(dtype=torch.bfloat16)
            if is_first:
                print(f"step {step}: the average is {digest(average)}")
    if is_first:
        link.send("stop")
        assert receiver.wait() == 0
    dist.destroy_process_group()


if __name__ == "__main__":
    engine(sys.argv[2]) if sys.argv[1:2] == ["engine"] else main()
