#!/usr/bin/env bash
# Run a training script with torchrun:  launch/torchrun.sh RANKS_PER_HOST script.py [arguments]
#
# To change: for several hosts start this on each of them with HOSTS=2, HOST_INDEX=0 or 1, and
# MASTER_ADDR set to the first one's address; MASTER_PORT (29500) must be free there.
set -euo pipefail
ranks=$1; shift
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "$ranks" \
    --nnodes "${HOSTS:-1}" --node-rank "${HOST_INDEX:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" "$@"
