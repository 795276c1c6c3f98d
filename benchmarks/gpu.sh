#!/usr/bin/env bash
# On a machine with a GPU, torch, triton and nvcc: build the extension, run the GPU tests, then the benchmarks.
#   benchmarks/gpu.sh [build] [tests] [benchmarks]      all three without arguments
# No network is needed. Without a GPU it rehearses: the same steps, with what needs one left out.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PARTS=" ${*:-build tests benchmarks} "
have() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
wanted() { [[ $PARTS == *" $1 "* ]]; }

export PYTHONPATH="$PWD/kernels:$PWD/engine${PYTHONPATH:+:$PYTHONPATH}"
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  gpu=1
  build=cuda
else
  gpu=0
  build=cpu
  echo "no GPU here: a rehearsal"
fi

if wanted build; then
  echo "== build ($build)"
  ERASEDIFF_BUILD=$build "$PYTHON" setup.py build_ext --inplace
  "$PYTHON" -m erasediff_kernels.info
fi

if wanted tests; then
  echo "== tests"
  workers=()
  have xdist && workers=(-n 8)
  if ! have pytest; then
    echo "pytest is not installed: skipped"
  elif [ "$gpu" = 1 ]; then
    "$PYTHON" -m pytest -q "${workers[@]}" tests/kernels -k "cuda- or cuda_graph"
    if have diffusers; then
      "$PYTHON" -m pytest -q tests/unit/methods/test_step_on_gpu.py
      if have deepspeed && have accelerate; then
        "$PYTHON" -m pytest -q tests/distributed -m gpu
      fi
    fi
  else
    "$PYTHON" -m pytest -q tests/kernels/test_gradient_gram.py tests/kernels/test_constrained_adamw.py -k compiled
  fi
fi

if wanted benchmarks; then
  echo "== benchmarks"
  if [ "$gpu" = 1 ]; then
    arguments=(--rounds 50)
  else
    arguments=(--rounds 3 --case small:float32)
  fi
  # The UNet's shapes come from diffusers; equal tensors stand in for it where that is not installed.
  have diffusers || arguments+=(--case equal:float32 --case equal:bfloat16 --case small:float32)
  if have pytest_benchmark; then
    "$PYTHON" benchmarks/kernels/run.py "${arguments[@]}"
  else
    "$PYTHON" benchmarks/kernels/step.py "${arguments[@]}"
  fi
  if [ "$gpu" = 1 ] && have diffusers && have deepspeed; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    "$PYTHON" benchmarks/sharded/run.py --device cuda --bf16 --ranks "$gpus" --samples 32
  fi
fi
