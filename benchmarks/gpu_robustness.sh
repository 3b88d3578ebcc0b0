#!/usr/bin/env bash
# Train ResNet20 on CIFAR-10 on a GPU with the four methods that decide the study of robustness, three seeds each, in
# under 10 minutes. OUT/robustness.jsonl gets one line for each finished run; the same command continues the study.
#   DATA=data/cifar10 benchmarks/gpu_robustness.sh OUT
# On a CPU, to try the script:
#   DEVICE=cpu PRECISION=fp32 EPOCHS=1 JOBS=1 SMALL='train_dataset.subset=512 eval_dataset.subset=64' benchmarks/gpu_robustness.sh OUT
set -euo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu_robustness.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
data=${DATA:-data/cifar10}
timeout "${SECONDS_AT_MOST:-540}" "$python" -m composer_sba.study robustness --networks resnet8 --results "$out" \
  --methods baseline gaussian_half gaussian_half_longer sba_robust --seeds 3 --jobs "${JOBS:-4}" --device "${DEVICE:-gpu}" \
  --set model.depth=20 precision="${PRECISION:-amp_bf16}" max_duration="${EPOCHS:-24}ep" eval_interval="${EPOCHS:-24}ep" \
  eval_last_epochs=1 global_train_batch_size=512 optimizer.lr=0.4 \
  train_dataset.local="$data" eval_dataset.local="$data" ${SMALL:-}
