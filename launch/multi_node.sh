#!/usr/bin/env bash
# Start a training script on one of several nodes; run it on each of them, in any order:
#
#     NODES=2 HEAD=node-0 bash launch/multi_node.sh TRAIN.py ARGUMENTS...
#
# To be changed by the user, as variables:
#   NODES   number of nodes (2)
#   HEAD    name or address of the node that the others find; resolvable from all (required)
#   PORT    a free port on it (29500)
#   GPUS    processes on this node, one a GPU (all GPUs; 2 where there is none)
#   RUN     any name, the same on all nodes, another for each run at one HEAD and PORT (dist_ema)
#   TORCHRUN  where torchrun is (.venv/bin/torchrun, or torchrun)
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME  the network between the nodes, if it is not found
#
# Checkpoints of dist_ema are written by all ranks: give a directory that all nodes see.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${HEAD:?set HEAD to the name or address of one node, the same on all of them}"
TORCHRUN=${TORCHRUN:-$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)}
GPUS=${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
[ "$GPUS" -gt 0 ] || GPUS=2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

exec "$TORCHRUN" \
    --nnodes "${NODES:-2}" \
    --nproc_per_node "$GPUS" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD:${PORT:-29500}" \
    --rdzv_id "${RUN:-dist_ema}" \
    "$@"
