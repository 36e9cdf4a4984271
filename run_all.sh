#!/usr/bin/env bash
# Sets up .venv, makes every number and figure, and ends in results/report.html.
#   bash run_all.sh [OPTION ...] [STAGE ...]
# Stages; without any named, all but test and examples:
#   setup: .venv; test; synthetic: results/synthetic/; train: runs/; retrieval: results/quick/ or
#   results/DATASET/; bench: results/samplers.json; report: results/report.html; examples: examples/, with tests
#   --full      the paper's twelve runs (the default where there are a CUDA GPU and one of their data sets)
#   --quick     the same on generated images, small: ten minutes on two cores (the default elsewhere)
#   --own-size  with --full: views of the images' own size, 32 or 64 pixels, instead of 224
#   --fresh     move what these stages made to old-DATE/ and start over; else what is there is skipped
#   --jobs N    N commands at a time (default: one a GPU; without a GPU one a core)
#   --dry-run   list the commands, run nothing
# Environment: DATA_DIR (default data) holds the data sets; DATASETS, SAMPLERS, OBJECTIVES and SEEDS narrow or
# widen the training runs, TRAIN_FLAGS is added to each; PYTHON makes .venv, or RUN_PYTHON is used instead.
set -euf -o pipefail  # f: a name that holds * or [ stays as it is
unset CDPATH PIP_TARGET PIP_PREFIX PIP_ROOT  # those of pip would leave .venv empty
export PIP_USER=0 PYTHONUNBUFFERED=1
trap '' PIPE  # whoever reads along may leave
say() { echo "$*" 2>/dev/null || :; }
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
    *) fail "$1: unknown; stages: setup test synthetic train retrieval bench report examples; options: --full \
--quick --own-size --fresh --jobs N --dry-run --help" ;;
  esac
  shift
done
stages=${stages:- synthetic train retrieval bench report }
[[ ${DATA_DIR:-/} = /* ]] || DATA_DIR=$PWD/$DATA_DIR  # from where the caller is
[[ ${RUN_PYTHON:-} != [!/]*/* ]] || RUN_PYTHON=$PWD/$RUN_PYTHON
[ -d "${DATA_DIR:-/}" ] || fail "DATA_DIR=$DATA_DIR is no folder; make it, or leave it out for data/"
cd "$(dirname "$0")"
data=${DATA_DIR:-data} python=${RUN_PYTHON:-.venv/bin/python} gpus=0

# ---------------------------------------------------------------------------------------- setup
call() { "$@" & wait $!; }  # in the background, so that a signal to this script is acted on at once
packages() { [ -n "${RUN_PYTHON:-}" ] || cmp -s requirements.txt .venv/complete; }

setup() {
  local base=${PYTHON:-python3} again="for the reason above; the same command tries again"
  "$base" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || fail "$base is not \
Python 3.10 or newer with venv; apt-get install python3-venv, or name one: PYTHON=python3.12 bash run_all.sh"
  [[ $PWD != *:* ]] || fail "Python makes no .venv in a path with a colon: rename a folder of $PWD"
  [ ! -e .venv ] || [ -e .venv/made-by-run_all.sh ] ||
    fail ".venv is not of this script; move it away, or use it: RUN_PYTHON=.venv/bin/python bash run_all.sh"
  rm -rf .venv && mkdir .venv && touch .venv/made-by-run_all.sh && call "$base" -m venv .venv ||
    fail "no .venv could be made, $again"
  # Without a GPU the CPU builds are several GB smaller; not every index has them.
  nvidia-smi -L >/dev/null 2>&1 || call $python -m pip install torch==2.14.1+cpu torchvision==0.29.1+cpu || :
  call $python -m pip install -r requirements.txt || fail "pip could not install the packages, $again"
  cp requirements.txt .venv/complete  # last: a half-made .venv is never used
}

# ---------------------------------------------------------------------------------------- steps
# Each function lists its steps, a line each: a name, the result (-: none, always run), and the command.
emit() { echo "$1 $2$(printf ' %q' "$python" "${@:3}")"; }

test_() {  # in two processes that take about as long
  local apart="tests/test_train.py tests/test_data.py tests/test_run_all.py tests/test_bench.py"
  emit test-1 - -m pytest -q $apart
  emit test-2 - -m pytest -q test_samplers.py tests $(printf -- '--ignore=%s ' $apart)
}

synthetic_toy() { synthetic_ toy; }
synthetic_() {
  local name more="angle optima convergence subsets histograms"
  if [ -z "$quick" ]; then more+=" temperature scaling"; fi  # small, they can settle nothing
  for name in ${1:-$more}; do
    emit "$name" "results/synthetic/$name.json" synthetic.py ${quick:+--quick} --experiment "$name" --out results/synthetic
  done
}

train() {
  local dataset seed objective sampler name size resume
  for dataset in $datasets; do for seed in ${SEEDS:-0}; do
    case $own$dataset in own-cifar100) size=32 ;; own-tinyimagenet) size=64 ;; *) size="" ;; esac
    for objective in $objectives; do for sampler in $samplers; do
      name=${quick:-$own$dataset}-$sampler-$objective resume=""
      if [ -n "$quick" ]; then name=${name%-simclr}; fi
      if [ "$seed" != 0 ]; then name+=-seed$seed; fi
      if [ -e "runs/$name/checkpoint.pt" ] && [ -z "$fresh" ]; then resume=--resume; fi
      emit "$name" "runs/$name/result.json" train.py --dataset "$dataset" --sampler "$sampler" \
        --objective "$objective" --seed "$seed" ${size:+--image-size $size} ${TRAIN_FLAGS:-} \
        --data-dir "$data" --out-dir "runs/$name" $resume
    done; done
  done; done
}

retrieval() {  # of all runs that have ended
  local dataset name corrupted
  for dataset in $datasets; do
    name=${quick:-$own$dataset}
    case $dataset in cifar100) corrupted=CIFAR-100-C ;; *) corrupted=Tiny-ImageNet-C ;; esac
    if [ -z "$quick" ] && [ -e "$data/$corrupted" ]; then corrupted=official; else corrupted=built-in; fi
    echo "$(emit "retrieval-$name" "results/$name/retrieval.json" retrieval.py --curve --recalibrate \
      --histograms --corruptions $corrupted --data-dir "$data" --out "results/$name")" \
      "\$(dirname runs/$name-*/result.json)"
  done
}

bench() { emit bench results/samplers.json bench.py samplers --pairs 10000 --out results/samplers.json; }
report() { emit report - report.py; }

examples() {
  local script
  for script in $(find examples -name '*.py' | sort); do
    case $script in */test_*) emit "$(basename "$script")" - -m pytest -q "$script" ;;
      *) emit "$(basename "$script")" - "$script" ;; esac
  done
}

steps() {  # steps FUNCTION ...: the lines of those whose stage is asked for
  local stage
  for stage; do if [[ $stages == *" ${stage%%_*} "* ]]; then $stage; fi; done
}

# ---------------------------------------------------------------------------------------- running
failed="" pids=() names=()  # pids, names: of what runs, by slot

made() {  # made NAME RESULT: it is there, no quick one where a full one is asked for, and newer than its runs
  [ -s "$2" ] && [ -z "$fresh" ] && { [ -n "$quick" ] || ! grep -q -e --quick "$2"; } || return 1
  [[ $1 != retrieval* ]] || [ -z "$(find runs -maxdepth 2 -name result.json -newer "$2")" ]
}

run() {  # run FUNCTION ...: their steps, as many at a time as there are slots
  local name result command slot=0
  while read -r name result command; do
    todo=${todo#* }
    if made "$name" "$result"; then say "== skip $name: $result is there"; continue; fi
    if [ -n "$dry" ]; then say "$command"; continue; fi
    while kill -0 "${pids[slot]:-}" 2>/dev/null; do slot=$(((slot + 1) % slots)); sleep 0.1; done
    finish $slot
    say "== minute $((SECONDS / 60)): $name${names[*]:+ beside ${names[*]}}; to come: ${todo:-nothing}"
    (
      if [ "$gpus" -gt 1 ]; then export CUDA_VISIBLE_DEVICES=${visible[slot % gpus]}; fi
      set +f
      eval "exec $command"
    ) >"runs/.logs/$name.log" 2>&1 &
    pids[slot]=$! names[slot]=$name
  done < <(steps "$@")
  for slot in "${!pids[@]}"; do finish "$slot"; done
}

finish() {  # finish SLOT: waits for what runs there, if anything does
  local name=${names[$1]:-} log=runs/.logs/${names[$1]:-}.log
  if [ -z "$name" ]; then return; fi
  if wait "${pids[$1]}"; then
    say "   $name: $(tail -n 1 "$log")"
  else
    failed+=" $name"
    say "== FAILED $name; $log ends in:"$'\n'"$(tail -n 20 "$log")" >&2
  fi
  unset "pids[$1]" "names[$1]"
}

stop() {  # stop CODE: ends what is under way; a training run saves first
  trap - INT TERM HUP  # a second Ctrl-C ends all at once
  kill $(jobs -p) 2>/dev/null || :
  wait
  say "run_all.sh: interrupted; the same command${fresh:+ without --fresh} goes on from here" >&2
  exit "$1"
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

if ! packages; then
  say "== setup: .venv with the packages of requirements.txt, some minutes"
  if [ -z "$dry" ]; then setup; fi
fi
if packages; then  # PyTorch's own answer
  ask="import torch; print(torch.cuda.is_available() * torch.cuda.device_count())"
  gpus=$("$python" -c "$ask" 2>/dev/null) || fail "$python cannot import torch: give it requirements.txt"
fi
slots=${jobs:-$((gpus > 0 ? gpus : $(OMP_NUM_THREADS="" nproc)))}
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}"
if [ "$gpus" -eq 0 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
if [ $mode = auto ] && [ "$gpus" -gt 0 ] &&
  find "$data/" -maxdepth 1 2>/dev/null | grep -q -e /cifar-100-python -e /tiny-imagenet-200; then mode=full; fi
if [ $mode = full ]; then
  quick="" datasets=${DATASETS:-cifar100 tinyimagenet} objectives=${OBJECTIVES:-simclr sogclr}
  samplers=${SAMPLERS:-random osgd spectral} cost="20 hours of one GPU at an assumed 60 TFLOP/s (4.4e18"
  if [ -n "$own" ]; then cost="1.3 hours of one GPU at an assumed 60 TFLOP/s (2.7e17"; fi
  say "== The paper's runs at full scale: all twelve take about $cost operations); --quick takes ten minutes"
else
  [ -z "${DATASETS:-}$own" ] || fail "DATASETS and --own-size are of the paper's runs: add --full"
  quick=quick datasets=deadleaves objectives=${OBJECTIVES:-simclr}
  samplers=${SAMPLERS:-random osgd spectral refined}
fi

all="test_ synthetic_toy train retrieval synthetic_ bench report examples"
todo=$(steps $all | while read -r name _; do echo -n "$name "; done)
if [ -z "$dry" ]; then
  mkdir -p runs/.logs
  if [ -n "$fresh" ]; then
    steps $all | while read -r name old _; do
      if [ "$name" != bench ]; then old=${old%/*}; fi  # with all that is beside it
      if [ -e "$old" ]; then mkdir -p "$fresh/${old%/*}" && mv "$old" "$fresh/$old"; fi
    done
  fi
fi
slots=2 OMP_NUM_THREADS=1 run test_
run synthetic_toy train  # a picture in the first minute, then what takes longest
run retrieval synthetic_
run bench                # alone: it measures time
run report
slots=1 run examples
if [ -n "$failed" ]; then say "run_all.sh: failed:$failed; the others are done" >&2; exit 1; fi
