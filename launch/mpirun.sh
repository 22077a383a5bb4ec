#!/usr/bin/env bash
# Run a training script with mpirun:  launch/mpirun.sh RANKS script.py [arguments]
#
# To change: for several hosts set HOSTS=host1:4,host2:4 and, where a host has several networks,
# MPIRUN_FLAGS="--mca btl_tcp_if_include 10.0.0.0/24". With GPUs: one rank a GPU. gloo and nccl meet at
# MASTER_ADDR, the first host, and MASTER_PORT.
set -euo pipefail
ranks=$1; shift
flags=(-np "$ranks" -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
[ "$(id -u)" -ne 0 ] || flags+=(--allow-run-as-root)
# On one host any number of ranks may run; on several, --oversubscribe would fill the first.
if [ -n "${HOSTS:-}" ]; then
    flags+=(--host "$HOSTS" -x MASTER_ADDR="${MASTER_ADDR:-${HOSTS%%[:,]*}}" -x MASTER_PORT="${MASTER_PORT:-29500}")
else
    flags+=(--oversubscribe)
fi
# shellcheck disable=SC2086  # several flags are meant to split
exec mpirun "${flags[@]}" ${MPIRUN_FLAGS:-} "${PYTHON:-python}" "$@"
