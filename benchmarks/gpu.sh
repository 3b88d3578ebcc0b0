#!/usr/bin/env bash
# Measure training steps on a GPU in under 8 minutes, and first compare the kernels with the operators that they replace.
# Each command writes its report into OUT before the next one starts.
#   benchmarks/gpu.sh OUT
# On a CPU, to try the script:  DEVICE=cpu DTYPE=fp32 ROUNDS=1 SMALL='--batch 4' benchmarks/gpu.sh OUT
set -euo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"

"$python" benchmarks/kernels.py | tee "$out/kernels.txt" || true  # a line says why
step() { # NAME ARGUMENTS
  echo "$1"
  timeout 150 "$python" -m composer_sba.study step --device "${DEVICE:-gpu}" --dtype "${DTYPE:-bf16}" \
    --rounds "${ROUNDS:-20}" --out "$out/$1" "${@:2}" ${SMALL:-} 2>&1 | tail -n 12 || echo "$1: stopped"
}
step head-vgg16 --networks vgg16 --datasets cifar10 --cuts head --fold 4 --basis identity --kinds plain unarmed sba --batch 128
step head-resnet44 --networks resnet44 --datasets cifar10 --cuts head --fold 4 --basis identity --kinds plain unarmed sba --batch 128
step head-resnet50 --networks resnet50 --datasets imagenet --cuts head --fold 4 --basis identity --kinds plain unarmed sba --batch 64
step input-resnet44 --networks resnet44 --datasets cifar10 --cuts input --fold 1 --basis identity --kinds plain sba twice --batch 512
step input-resnet50 --networks resnet50 --datasets imagenet --cuts input --fold 1 --basis identity --kinds plain sba twice --batch 32
if [ "${DEVICE:-gpu}" = gpu ]; then timeout 60 "$python" benchmarks/hugging_face_step.py --batch 32 | tee "$out/hugging-face.txt"; fi
