#!/usr/bin/env bash
# Run a training script with mpirun:  launch/mpirun.sh RANKS script.py [arguments]
#
# To change: for several hosts set HOSTS=host1:4,host2:4 and, where a host has several networks,
# MPIRUN_FLAGS="--mca btl_tcp_if_include 10.0.0.0/24". With GPUs: one rank a GPU.
set -euo pipefail
ranks=$1; shift
flags=(-np "$ranks" --oversubscribe -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
[ "$(id -u)" -ne 0 ] || flags+=(--allow-run-as-root)
[ -z "${HOSTS:-}" ] || flags+=(--host "$HOSTS")
# shellcheck disable=SC2086  # several flags are meant to split
exec mpirun "${flags[@]}" ${MPIRUN_FLAGS:-} "${PYTHON:-python}" "$@"
