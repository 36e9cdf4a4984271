#!/usr/bin/env bash
# bash run_all.sh [OPTION ...] [STAGE ...]: makes every number and figure, and results/report.html of them.
# Stages: setup (.venv) test synthetic train retrieval bench report examples; without any, all but test and
# examples.  Results: results/synthetic/, runs/, results/quick/ or results/DATASET/, results/samplers.json.
#   --full      the paper's twelve runs and four with our spectral batches, on embeddings taken as its authors
#               did (the default where there are a CUDA GPU and one of the data sets)
#   --quick     the same on generated images, small: 7 minutes on two cores (the default elsewhere)
#   --own-size  with --full: views of the images' own size, 32 or 64 pixels, instead of 224
#   --fresh     move what these stages made to old-DATE/ and start over; else what is there is skipped
#   --jobs N    N commands at a time (default: one a GPU; without a GPU one a core)
#   --dry-run   list the commands, run nothing
# Environment: DATA_DIR (or data, beside this) holds the data sets; DATASETS, SAMPLERS, OBJECTIVES and SEEDS
# narrow or widen the training runs, TRAIN_FLAGS is added to each; PYTHON makes .venv, RUN_PYTHON replaces it.
set -u
unset CDPATH PIP_TARGET PIP_PREFIX PIP_ROOT  # those of pip would leave .venv empty
export PIP_USER=0 PYTHONUNBUFFERED=1
fail() { echo "run_all.sh: error: $1" >&2; exit 2; }
mode=auto own="" dry="" fresh="" jobs="" stages=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    --full | --quick) mode=${1#--} ;;
    --own-size) own=own- ;;
    --fresh) fresh=old-$(date +%Y%m%d-%H%M%S) ;;
    --dry-run) dry=yes ;;
    --jobs) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--jobs ${2:-}: give 1 or more"; jobs=$2; shift ;;
    setup | test | synthetic | train | retrieval | bench | report | examples) stages+=" $1 " ;;
    *) fail "$1 is no stage and no option; see bash run_all.sh --help" ;;
  esac
  shift
done
[[ ${SEEDS:-} =~ ^[0-9\ ]*$ ]] || fail "SEEDS=$SEEDS: give whole numbers, such as SEEDS=\"0 1 2\""
stages=${stages:- synthetic train retrieval bench report }
data=data  # these three as the caller sees them
[ -z "${DATA_DIR:-}" ] || data=$(cd "$DATA_DIR" 2>/dev/null && pwd) ||
  fail "DATA_DIR=$DATA_DIR is no folder; make it, or leave it out for data/"
[[ ${PYTHON:-} != [!/]*/* ]] || PYTHON=$PWD/$PYTHON
[[ ${RUN_PYTHON:-} != [!/]*/* ]] || RUN_PYTHON=$PWD/$RUN_PYTHON
cd "$(dirname "$0")" || exit
base=${PYTHON:-python3} python=${RUN_PYTHON:-.venv/bin/python} anew=""
gpu=$(nvidia-smi -L 2>/dev/null | grep "^GPU ")  # it may answer with other words
if [ -n "$gpu" ] && [ ! -e .venv/gpu ] && compgen -G ".venv/lib/*/*/torch-*+cpu*" >/dev/null; then
  anew=--force-reinstall  # to pip the CPU's PyTorch would do
fi

setup() {
  [[ $PWD != *:* ]] || fail "Python makes no .venv in a path with a colon: rename a folder of $PWD"
  echo "== setup: packages into .venv, some minutes${anew:+; anew, as there is a GPU now}"
  [ ! -e .venv ] || [ -e .venv/by-run_all.sh ] || fail ".venv is not of this script; move it away"
  rm -f .venv/complete .venv/bin/python .venv/bin/python3  # it may be of another Python
  "$base" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null &&
    mkdir -p .venv && touch .venv/by-run_all.sh && "$base" -m venv .venv || fail \
    "$base is not Python 3.10 or newer with venv; install python3-venv, or name one: PYTHON=python3.12"
  [ -n "$gpu" ] ||  # the CPU builds are several GB smaller; not every index has them
    $python -m pip install -q torch==2.14.1+cpu torchvision==0.29.1+cpu 2>/dev/null
  $python -m pip install -q $anew -r requirements.txt ||
    fail "no packages, as told above; the same tries again"
  if [ -n "$gpu" ]; then touch .venv/gpu; fi
  cp requirements.txt .venv/complete  # last: a half-made .venv is never used
}

test_() {  # in two processes that take about as long
  apart="tests/test_train.py tests/test_data.py tests/test_run_all.py tests/test_bench.py"
  step test-1 - -m pytest -q $apart
  step test-2 - -m pytest -q test_samplers.py tests $(printf -- '--ignore=%s ' $apart)
}

synthetic() {  # synthetic EXPERIMENT ...
  out=results/synthetic
  for x; do step $x $out/$x.json synthetic.py ${quick:+--quick} --experiment $x --out $out; done
}
synthetic_first() { synthetic toy; }
synthetic_rest() { synthetic angle optima convergence subsets histograms $large; }

train() {
  for dataset in $datasets; do
    case $own$dataset in own-cifar100) size=32 ;; own-tinyimagenet) size=64 ;; *) size="" ;; esac
    if [ -z "$quick" ]; then  # else all runs that start together would download and decode
      step "decode-$dataset" - -c "import sys, data; data.load(*sys.argv[1:])" "$dataset" train "$data"
      finish "${!pids[@]}"
    fi
    for seed in ${SEEDS:-0}; do for objective in $objectives; do for sampler in $samplers; do
      name=${quick:-$own$dataset}-$sampler-$objective resume="" taken=""
      case ${quick:-$sampler} in osgd | spectral*) taken="--embeddings list" ;; esac  # as the authors did
      if [ "$seed" != 0 ]; then name+=-$seed; fi
      if [ -e "runs/$name/checkpoint.pt" ] && [ -z "$fresh" ]; then resume=--resume; fi
      step "$name" "runs/$name/result.json" train.py --dataset "$dataset" --sampler "$sampler" \
        --objective "$objective" --seed "$seed" $taken ${size:+--image-size $size} ${TRAIN_FLAGS:-} \
        --data-dir "$data" --out-dir "runs/$name" $resume
    done; done; done
  done
}

retrieval() {  # of all runs that have ended
  for dataset in $datasets; do
    name=${quick:-$own$dataset} corrupted=built-in
    case $dataset in cifar100) official=CIFAR-100-C ;; *) official=Tiny-ImageNet-C ;; esac
    if [ -z "$quick" ] && [ -d "$data/$official" ]; then corrupted=official; fi
    step "retrieval-$name" "results/$name/retrieval.json" retrieval.py --curve --recalibrate --histograms \
      --corruptions $corrupted --data-dir "$data" --out "results/$name" \
      $(dirname "runs/$name"-*/result.json | grep -v -e -seed)  # which are train.py's own default folders
  done
}

bench() { step bench results/samplers.json bench.py samplers --pairs 10000 --out results/samplers.json; }
report() { step report - report.py; }
examples() {
  step examples-packages - -m pip install -q -r requirements-examples.txt
  finish "${!pids[@]}"
  for x in examples/[!ht]*.py; do step "${x##*/}" - "$x"; done
  step test-examples - -m pytest -q examples
}
coming="" failed="" pids=() logs=()  # pids and logs of what runs, by slot

made() {  # made NAME RESULT: it is there, no quick one where a full one is asked for, and newer than its runs
  [ -s "$2" ] && [ -z "$fresh" ] && { [ -n "$quick" ] || ! grep -q -e --quick "$2"; } || return
  [[ $1 != retrieval* ]] || [ -z "$(find runs -maxdepth 2 -name result.json -newer "$2")" ]
}

step() {  # step NAME RESULT WORD ...: python WORD ... once a slot is free, unless RESULT is there (-: none)
  local name=$1 result=$2 old=${2%/*} slot=0 words
  shift 2
  if [ -z "$begun" ]; then  # the first time round
    coming+="$name "
    if [ "$name" = bench ]; then old=$result; fi
    if [ -n "$fresh" ] && [ -z "$dry" ] && [ -e "$old" ]; then
      mkdir -p "$fresh/${old%/*}" && mv "$old" "$fresh/$old" || exit
    fi
    return
  fi
  coming=${coming#* }
  if made "$name" "$result"; then echo "== skip $name: $result is there"; return; fi
  if [ -n "$dry" ]; then printf -v words " %q" "$python" "$@"; echo "${words# }"; return; fi
  while kill -0 "${pids[slot]:-}" 2>/dev/null; do slot=$(((slot + 1) % slots)); sleep 0.1; done
  if [ -n "${pids[slot]:-}" ]; then finish $slot; fi
  echo "== minute $((SECONDS / 60)): $name; to come: ${coming:-nothing}"
  if [ "$gpus" -gt 1 ]; then export CUDA_VISIBLE_DEVICES=${visible[slot % gpus]}; fi
  logs[slot]=runs/.logs/$name.log
  "$python" "$@" >"${logs[slot]}" 2>&1 &
  pids[slot]=$!
}

finish() {  # finish SLOT ...: waits for what runs there, and shows the end of what it said
  for slot; do
    if wait "${pids[slot]}"; then lines=1; else lines=200 failed+=" ${logs[slot]}"; fi
    echo "== ${logs[slot]} ends: $(tail -n $lines "${logs[slot]}")"
    unset "pids[slot]"
  done
}

run() {  # run STAGE ...: those that are asked for, side by side
  for stage; do if [[ $stages == *" ${stage%%_*} "* ]]; then $stage; fi; done
  finish "${!pids[@]}"
}

stop() {  # stop CODE: ends what is under way; a training run saves first
  kill $(jobs -p) 2>/dev/null
  wait
  echo "run_all.sh: interrupted; the same command${fresh:+ without --fresh} goes on from here" >&2
  exit "$1"
}
for signal in HUP INT PIPE TERM; do trap "stop $((128 + $(kill -l $signal)))" $signal; done
if [ -z "$dry${RUN_PYTHON:-}" ] && { [ -n "$anew" ] || ! cmp -s requirements.txt .venv/complete; }; then
  setup
fi
ask="import torch; print(torch.cuda.is_available() * torch.cuda.device_count())"
gpus=$("$python" -c "$ask" 2>/dev/null) || [ -n "$dry" ] || fail "$python cannot import torch"
gpus=${gpus:-0} slots=${jobs:-$((gpus > 0 ? gpus : $(OMP_NUM_THREADS="" nproc)))}
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}"
if [ "$gpus" -eq 0 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
if [ $mode = auto ] && [ "$gpus" -gt 0 ]; then mode=$(ls "$data" 2>/dev/null); fi
if [[ $mode =~ ^full$|cifar-100-python|tiny-imagenet-200 ]]; then
  quick="" datasets=${DATASETS:-cifar100 tinyimagenet} objectives=${OBJECTIVES:-simclr sogclr}
  samplers=${SAMPLERS:-random osgd spectral-released spectral} large="temperature scaling"
  echo "== The paper's twelve runs and four: about 27 hours on an H200, --own-size 10; --quick: 7 minutes"
else
  [ -z "${DATASETS:-}$own" ] || fail "DATASETS and --own-size are of the paper's runs: add --full"
  quick=quick datasets=deadleaves objectives=${OBJECTIVES:-dcl} large=""
  samplers=${SAMPLERS:-random osgd spectral refined}
fi
[ -n "$dry" ] || mkdir -p runs/.logs
for begun in "" yes; do
  slots=2 OMP_NUM_THREADS=1 run test_
  run synthetic_first train  # a picture within the first minute, then what takes longest
  run retrieval synthetic_rest
  run bench  # alone: it measures time
  run report examples
done
if [ -n "$failed" ]; then echo "run_all.sh: failed, as told in$failed; the others are done" >&2; exit 1; fi
