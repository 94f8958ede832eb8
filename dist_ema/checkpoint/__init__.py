"""The sharded checkpoint: each rank writes the boxes that it owns, and reads any boxes back.

The files of a directory `run/ema-001000`:

    manifest.json                       written last: averages, counters, boxes, checksums
    <safetensors files of each rank>    torch's own sharded layout

Modules: `manifest` (records and their JSON), `directory` (atomic replacement), `background`
(asynchronous saves), `writer`, `reader` (over `plain` and `dcp_reader`, which describe files that
no save wrote), and `dcp` (for `torch.distributed.checkpoint`).
"""

from dist_ema.core.errors import CheckpointError

__all__ = ["CheckpointError"]
