#!/usr/bin/env bash
# What has to be seen on a real accelerator, in under ten minutes on one GPU, as one report file.
#
#   tools/accelerator_check.sh report.md
#   SIZE=small JAX_PLATFORMS=cpu tools/accelerator_check.sh report.md    # try it on a CPU
#   PATIENCE=10 …                                   # ten times the time limits, on a busy machine
#
# Sections: what is there; tests that matter on an accelerator; implementations of attention against
# float64 and timed; training and sampling against PyTorch; the gain of ensembles; plans against the
# memory and time that were needed; an exported file. A section that fails or runs out of its time
# does not stop the others; their limits are 580 s together. The exit status is the number of sections that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec </dev/null
report=$(realpath -m "${1:-accelerator_check.md}")
size=${SIZE:-full} patience=${PATIENCE:-1}
case $size in small | full) ;; *) echo "SIZE=$size: small or full" >&2 && exit 2 ;; esac
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

# section TITLE SECONDS COMMAND...: its output, its time and its status go to the report.
section() {
  local title=$1 limit=$(($2 * patience)) start=$SECONDS status
  shift 2
  echo "$title" >&2
  timeout --kill-after=10 "$limit" "$@" >"$scratch/out" 2>"$scratch/err"
  status=$?
  {
    printf '## %s\n\n' "$title"
    cat "$scratch/out"
    if [ "$status" -ne 0 ]; then
      [ "$status" -eq 124 ] && echo "It was stopped after its $limit s."
      printf '\n```text\n'
      tail -n 15 "$scratch/err"
      printf '```\n'
    fi
    printf '\n%s: status %d, %d s\n\n' "$title" "$status" $((SECONDS - start))
  } >>"$report"
  [ "$status" -eq 0 ] || failed=$((failed + 1))
}

# What is computed otherwise there: products and attention in every precision, random numbers,
# compiled walks, the training step. TF32 is off, because the tests' tolerances are of float32.
tests() {
  local chosen=(tests/process/test_paths.py tests/sampling/test_solvers.py tests/models/test_models.py tests/training/test_training.py)
  [ "$size" = small ] && chosen=(tests/process/test_paths.py)
  set -o pipefail
  # conftest.py prefers a CPU, and programs that are compiled quickly, where these are not set.
  JAX_PLATFORMS=${JAX_PLATFORMS:-} XLA_FLAGS=--xla_backend_optimization_level=3 JAX_DEFAULT_MATMUL_PRECISION=highest \
    python -m pytest -q --maxfail=20 -p no:cacheprovider -k "not devices and not mesh" "${chosen[@]}" | tail -n 30
}

against_torch() {
  python -c 'import torch' 2>/dev/null || { echo "PyTorch is not installed: pip install 'diffjax[parity]'"; return 0; }
  if [ "$size" = small ]; then
    python -m experiments.benchmark --configs=digits --batch_size=8 --steps=1 --num_samples=4 --rounds=2 --against=torch
  else
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m experiments.benchmark --configs=cifar10:model=DiT-S/2,cifar10:model=unet \
      --batch_size=128 --steps=5 --num_samples=64 --rounds=3 --against=torch.compile
  fi
}

export -f tests against_torch
export size
check=(python tools/accelerator_check.py "--size=$size")

printf '# Accelerator check\n\n%s, %s, size %s\n\n' "$(date -u +%FT%RZ)" "$(git rev-parse --short HEAD 2>/dev/null || echo 'no revision')" "$size" >"$report" || exit 2
section "What is there" 30 python -m experiments.doctor
section "Attention" 80 "${check[@]}" attention
section "Ensembles" 100 "${check[@]}" ensembles
section "Plans" 90 "${check[@]}" plans
section "An exported file" 70 "${check[@]}" exported
section "Against PyTorch" 110 bash -c against_torch
section "Tests" 100 bash -c tests
echo "$failed of 7 sections failed, after $SECONDS s: $report" | tee -a "$report" >&2
exit "$failed"
