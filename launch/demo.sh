#!/usr/bin/env bash
# The main job: 4 ranks train on real data, dense and with DGC; then the final model becomes a file.
# Environment: RANKS=4 EPOCHS=5 RETRAIN_EPOCHS=4 DATA=folder of IDX files, OUT=out.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
ranks=${RANKS:-4} epochs=${EPOCHS:-5} out=${OUT:-out}
data=(); [ -z "${DATA:-}" ] || data=(--data "$DATA")
for arm in dense dgc; do
    launch/mpirun.sh "$ranks" -m launch.train --compression "$arm" --epochs "$epochs" \
        --out "$out/$arm" "${data[@]}"
done
echo
"${PYTHON:-python}" -m launch.report "$out/dense" "$out/dgc" --out "$out"
echo
"${PYTHON:-python}" -m launch.finish "$out/dgc/model.safetensors" "$out/dgc/model.dgc" \
    --epochs "${RETRAIN_EPOCHS:-4}" "${data[@]}"
