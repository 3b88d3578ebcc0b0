#!/usr/bin/env bash
# Train VGG16 on CIFAR-10 on a GPU for 16 epochs with the four methods that matter in the study of
# robustness, three seeds each, in under 10 minutes. OUT/robustness.jsonl gets one line for each finished run; the same
# command continues the study.
#   DATA=data/cifar10 benchmarks/gpu_robustness.sh OUT
# On a CPU, to try the script:
#   DEVICE=cpu PRECISION=fp32 SCALE=0.005 JOBS=1 SMALL='train_dataset.subset=256 eval_dataset.subset=64' benchmarks/gpu_robustness.sh OUT
set -euo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu_robustness.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
data=${DATA:-data/cifar10}
timeout "${SECONDS_AT_MOST:-540}" "$python" -m composer_sba.study robustness --networks vgg16 --datasets cifar10 --results "$out" \
  --methods baseline gaussian_half gaussian_half_longer sba_robust --seeds 3 --jobs "${JOBS:-4}" --device "${DEVICE:-gpu}" \
  --epochs-scale "${SCALE:-0.08}" --set precision="${PRECISION:-amp_bf16}" eval_interval=5ep eval_last_epochs=1 \
  train_dataset.in_memory=true eval_dataset.in_memory=true train_dataset.local="$data" eval_dataset.local="$data" ${SMALL:-}
