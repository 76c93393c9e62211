#!/usr/bin/env bash
# Fill a folder with the wheels that gpu-check.sh needs, for Python 3.12 on Linux x86_64; at most 50 MB.
#
#   gpu-wheels.sh FOLDER
#
# The machine with the GPU has PyTorch, accelerate, peft and what these need. Here is the rest: Lethe itself, a transformers
# that Lethe supports, lm_eval with what it imports, torchao for 8-bit AdamW. The package datasets is not here: it needs
# pyarrow and pandas, 60 MB. scripts/gpu/datasets.py stands in for it.
set -euo pipefail

MOST=50000000
PACKAGES=(
  transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0 peft==0.21.2 accelerate==1.15.0
  httpx2 httpcore2 truststore h11 anyio idna certifi typer shellingham annotated-doc click regex
  lm_eval==0.4.13 dill sacrebleu portalocker tabulate colorama lxml more_itertools requests urllib3 charset-normalizer
  jaxtyping wadler-lindig docstring_parser rich pygments markdown-it-py mdurl
  torchao
)

[ $# = 1 ] || { sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; exit 2; }
FOLDER=$(mkdir -p "$1" && cd "$1" && pwd)
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
PLATFORMS=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)

SOURCE=$(mktemp -d)  # pip would leave its build folder in the repository
trap 'rm -rf "$SOURCE"' EXIT
cp -r "$REPOSITORY"/{lethe,pyproject.toml,README.md,LICENSE} "$SOURCE"
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$FOLDER" "$SOURCE"
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${PLATFORMS[@]}" --dest "$FOLDER" "${PACKAGES[@]}"
size=$(cat "$FOLDER"/*.whl | wc -c)
echo "gpu-wheels: $(ls "$FOLDER"/*.whl | wc -l) wheels, $((size / 1000000)) MB in $FOLDER"
if [ "$size" -gt "$MOST" ]; then
  echo "gpu-wheels: more than $((MOST / 1000000)) MB; leave out the largest that the machine has: $(ls -S "$FOLDER" | head -1)" >&2
  exit 1
fi
