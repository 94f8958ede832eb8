"""The sharded checkpoint: each rank writes the boxes that it owns, any set of boxes is read back.

The files of a directory `run/ema-001000`:

    manifest.json                       written last: averages, counters, boxes, checksums
    <safetensors files of each rank>    torch's own sharded layout

Modules, from the bottom: `manifest` (the records), `parsing` (from JSON, every number checked),
`blocks` (checksummed reading), `regions` (boxes read from any set of saved boxes), `writer` (a
save), `consolidated` (plain safetensors read as a checkpoint), `matching` (saved against wanted
tensors), `background` (saving on a thread), `verify`, `stateful` (for `dcp.save`) and `api`.
"""

from dist_ema.checkpoint.manifest import CheckpointError

__all__ = ["CheckpointError"]
