#!/usr/bin/env bash
# Run a training script with horovodrun:  launch/horovodrun.sh RANKS script.py [arguments]
#
# Needs launch/install_horovod.sh. To change: for several hosts, reached by ssh, set
# HOSTS=host1:4,host2:4; HOROVODRUN_FLAGS="--gloo" takes Gloo in place of MPI.
set -euo pipefail
ranks=$1; shift
flags=(-np "$ranks")
[ -z "${HOSTS:-}" ] || flags+=(-H "$HOSTS")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2086  # several flags are meant to split
exec horovodrun "${flags[@]}" ${HOROVODRUN_FLAGS:-} "${PYTHON:-python}" "$@"
