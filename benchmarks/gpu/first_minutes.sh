#!/bin/sh
# Measure one GPU in nine minutes: OUT=folder sh benchmarks/gpu/first_minutes.sh; again to go on.
set -eu
cd "$(dirname "$0")/../.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
OUT="${OUT:-gpu}"
python3 -m benchmarks.gpu run --out "$OUT" "$@"
python3 -m benchmarks.gpu report "$OUT" --out "$OUT"
