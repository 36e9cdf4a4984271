#!/usr/bin/env bash
# What README.md beside this says of one GPU, made anew in parts that end within ten minutes; logs go to OUT.
#   bash results/gpu.sh tests OUT        tests/test_cuda.py
#   bash results/gpu.sh bench OUT        bench.py step and samplers
#   bash results/gpu.sh runs OUT DATA    four runs of 100 epochs, side by side, on images of 32 px (a
#                                        folder or zip), then retrieval.py; saved after eight minutes, and the
#                                        same command goes on
# Environment: PYTHON (python3) has the packages; EPOCHS (100); FLAGS for each run, such as "--step graph".
set -u
part=${1:-} out=$(realpath "${2:-gpu}") data=$(realpath "${3:-.}") python=${PYTHON:-python3}
cd "$(dirname "$0")/.." && mkdir -p "$out" || exit
export OMP_NUM_THREADS=1  # the runs choose side by side

train() {  # train SAMPLER [FLAG ...]
  local folder=$out/runs/$1 resume=""
  if [ -e "$folder/checkpoint.pt" ]; then resume=--resume; fi
  timeout --signal=TERM 480 "$python" train.py --dataset folder --data-dir "$data" --image-size 32 \
    --source-size 32 --epochs "${EPOCHS:-100}" --log-every 200 --step compile --sampler "$@" ${FLAGS:-} \
    --out-dir "$folder" $resume >>"$out/$1.log" 2>&1
}

case $part in
  tests) timeout 540 "$python" -m pytest -q tests/test_cuda.py 2>&1 | tee "$out/tests.log" ;;
  bench)
    timeout 400 "$python" bench.py step --out "$out/step.json" 2>&1 | tee "$out/step.log"
    timeout 140 "$python" bench.py samplers --out "$out/samplers.json" 2>&1 | tee "$out/samplers.log" ;;
  runs)
    decode="import data, sys; data.load('folder', *sys.argv[1:], source_size=32)"
    for split in train val; do  # once, not in four runs
      "$python" -c "$decode" $split "$data" || exit
    done
    train random &
    train osgd --embeddings free --k 1500 --q 150 &
    train spectral --k 40 &
    train refined --k 40 &
    wait
    tail -qn 1 "$out"/*.log
    [ "$(ls "$out"/runs/*/result.json 2>/dev/null | wc -l)" -lt 4 ] ||
      "$python" retrieval.py "$out"/runs/* --recalibrate --curve --out "$out" --export "$out/runs.json.gz" ;;
  *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
