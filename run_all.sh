#!/usr/bin/env bash
# Sets up .venv and runs everything.
#   bash run_all.sh            setup, then the paper's runs where there are a CUDA GPU and the data, else the quick ones
#   bash run_all.sh test       setup, then the tests
#   bash run_all.sh STAGE ...  stages by name: setup test train report paper
# A finished run is skipped, an interrupted one goes on where it was. DATA_DIR (default: data) holds the data sets.
set -euo pipefail
DATA_DIR=${DATA_DIR:+$(cd "$DATA_DIR" && pwd)}  # as the caller sees it
cd "$(dirname "$0")"
DATA_DIR=${DATA_DIR:-data}
QUICK="random osgd spectral refined"
python=.venv/bin/python

setup() {
  # .venv/complete is written last and holds what was asked for, so that a half-made .venv is never used.
  if [ -x $python ] && cmp -s requirements.txt .venv/complete; then return; fi
  local base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    { echo "run_all.sh: error: $base is not Python 3.10 or newer; install one, or name it: PYTHON=python3.12 bash run_all.sh" >&2; exit 2; }
  echo "setting up .venv (some minutes the first time)"
  rm -rf .venv
  "$base" -m venv .venv || { echo "run_all.sh: error: $base cannot make a .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
  # Without a GPU the CPU builds are several GB smaller; only an index that has both of the pair can give them.
  if ! command -v nvidia-smi >/dev/null; then
    $python -m pip install -q "torch==2.14.1+cpu" "torchvision==0.29.1+cpu" 2>/dev/null || { [ $? -ne 130 ] || exit 130; }
  fi
  $python -m pip install -q -r requirements.txt
  cp requirements.txt .venv/complete
}

tests() { $python -m pytest -q; }

run() {  # run NAME FLAG ...: one training run, from its checkpoint if it has one
  local out=runs/$1; shift
  local resume=()
  if [ -e "$out/checkpoint.pt" ]; then resume=(--resume); fi
  echo "== $out"
  $python train.py --data-dir "$DATA_DIR" --out-dir "$out" "$@" ${resume[@]+"${resume[@]}"}
}

train() { for sampler in $QUICK; do run "quick-$sampler" --sampler "$sampler"; done; }

report() {
  local runs=(); for sampler in $QUICK; do runs+=("runs/quick-$sampler"); done
  $python retrieval.py "${runs[@]}" --out results/quick.png
}

data_sets() {  # the paper's data sets that lie in DATA_DIR
  if [ -e "$DATA_DIR/cifar-100-python" ]; then echo cifar100; fi
  if compgen -G "$DATA_DIR/tiny-imagenet-200*" >/dev/null; then echo tinyimagenet; fi
}

paper() {
  local sets; sets=$(data_sets)
  for dataset in ${sets:-cifar100 tinyimagenet}; do
    for objective in simclr sogclr; do
      for sampler in random osgd spectral refined; do
        run "$dataset-$sampler-$objective" --dataset "$dataset" --sampler "$sampler" --objective "$objective"
      done
      $python retrieval.py runs/"$dataset"-*-"$objective" --out "results/$dataset-$objective.png"
    done
  done
}

stages=("$@")
if [ $# -eq 0 ]; then
  if command -v nvidia-smi >/dev/null && [ -n "$(data_sets)" ]; then stages=(paper); else stages=(train report); fi
fi
for stage in "${stages[@]}"; do
  case $stage in
    setup) setup ;;
    test) setup; tests ;;
    train | report | paper) setup; $stage ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' run_all.sh ;;
    *) echo "run_all.sh: error: $stage is no stage; stages: setup test train report paper" >&2; exit 2 ;;
  esac
done
