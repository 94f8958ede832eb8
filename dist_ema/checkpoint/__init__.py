"""The sharded checkpoint: each rank writes the boxes that it owns, any set of boxes is read back.

The files of a directory `run/ema-001000`:

    manifest.json                       written last: averages, counters, boxes, checksums
    <safetensors files of each rank>    torch's own sharded layout

Modules, from the bottom: `manifest` (the records), `parsing` (from JSON, distrusting it), `blocks`
(checksummed reading), `shards` and `writer` (a rank's file), `reader`, `planners` (torch's planners
over boxes), `consolidated` (a whole checkpoint read as a sharded one), `matching` (saved against
wanted), `background` (saving in a thread), `verify`, `stateful` (for `dcp.save`) and `api`.
"""

from dist_ema.checkpoint.manifest import CheckpointError

__all__ = ["CheckpointError"]
