#!/usr/bin/env bash
# Check Lethe on one GPU of 80 GB: speed, memory and evaluation on a random model of 7B shape, in at most 8 minutes.
# Without a GPU, the same with a tiny model, in half a minute.
#
#   gpu-check.sh [WHEELS [FOLDER]]
#
# WHEELS: the folder that gpu-wheels.sh filled; without it, nothing is installed. FOLDER: a new folder on a local disk with
# 60 GiB free, for weights, runs and gpu-check.json; without it, a temporary one that is removed.
# The last line that is printed is the table as JSON. LETHE_GPU_SECONDS: the limit of the whole check, 480.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
WHEELS=${1:-}
PYTHON=${PYTHON:-python3}
TEMPORARY=$(mktemp -d)
trap 'rm -rf "$TEMPORARY"' EXIT
FOLDER=${2:-$TEMPORARY/check}

if [ -n "$WHEELS" ]; then
  echo "gpu-check: installing the wheels in $WHEELS"
  "$PYTHON" -m pip install --quiet --no-index --no-deps --disable-pip-version-check --target "$TEMPORARY/site" "$WHEELS"/*.whl
  export PYTHONPATH=$TEMPORARY/site${PYTHONPATH:+:$PYTHONPATH}  # before what the machine has of these packages
fi
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# expandable segments: batches of other sizes leave no gaps that cannot be used again
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
"$PYTHON" -c "import datasets" 2>/dev/null || export PYTHONPATH=$PYTHONPATH:$REPOSITORY/scripts/gpu
"$PYTHON" "$REPOSITORY/benchmarks/gpu.py" "$FOLDER" --seconds "$((${LETHE_GPU_SECONDS:-480} - SECONDS))"
