#!/usr/bin/env bash
# Sets up .venv, makes every number and figure, and ends in results/report.html.
#   bash run_all.sh [OPTION ...] [STAGE ...]
# Stages, in order; without any named, all but test and examples:
#   setup: .venv; test; synthetic: results/synthetic/; train: runs/; bench: results/samplers.json; retrieval:
#   results/quick/ or results/DATASET/; report: results/report.html; examples: all in examples/, its tests too
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
    --jobs) [[ ${2:-} =~ ^[1-9][0-9]{0,2}$ ]] || fail "--jobs ${2:-}: give 1 to 999"; jobs=$2; shift ;;
    setup | test | synthetic | train | bench | retrieval | report | examples) stages+=" $1 " ;;
    -*) fail "$1 is no option; options: --full --quick --own-size --fresh --jobs N --dry-run --help" ;;
    *) fail "$1 is no stage; stages: setup test synthetic train bench retrieval report examples" ;;
  esac
  shift
done
stages=${stages:- synthetic train bench retrieval report }
[[ ${DATA_DIR:-/} = /* ]] || DATA_DIR=$PWD/$DATA_DIR  # from where the caller is
[ -d "${DATA_DIR:-/}" ] || fail "DATA_DIR=$DATA_DIR is no folder; make it, or leave it out for data/"
[[ ${RUN_PYTHON:-} != [!/]*/* ]] || RUN_PYTHON=$PWD/$RUN_PYTHON
command -v "${RUN_PYTHON:-bash}" >/dev/null || fail "RUN_PYTHON=$RUN_PYTHON is no program; or leave it out"
cd "$(dirname "$0")"
data=${DATA_DIR:-data} python=${RUN_PYTHON:-.venv/bin/python}

# ---------------------------------------------------------------------------------------- the machine
driver() { nvidia-smi -L 2>/dev/null | grep '^GPU [0-9]' || :; }  # a line a GPU, whatever else it says
call() { "$@" & wait $!; }  # in the background, so that a signal to this script is acted on at once

packages() {  # whether they are there, and built for this machine
  [ -n "${RUN_PYTHON:-}" ] ||
    { cmp -s requirements.txt .venv/complete && { [ ! -e .venv/cpu-only ] || [ -z "$(driver)" ]; }; }
}

setup() {
  local base=${PYTHON:-python3} why="for the reason above; the same command tries again"
  say "== setup: .venv with the packages of requirements.txt, some minutes"
  if [ -n "$dry" ]; then return; fi
  "$base" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || fail "$base is not \
Python 3.10 or newer with venv; apt-get install python3-venv, or name one: PYTHON=python3.12 bash run_all.sh"
  [[ $PWD != *:* ]] || fail "Python makes no .venv in a path with a colon: rename a folder of $PWD"
  [ ! -e .venv ] || [ -e .venv/made-by-run_all.sh ] ||
    fail ".venv is not of this script; move it away, or use it: RUN_PYTHON=.venv/bin/python bash run_all.sh"
  rm -rf .venv && mkdir .venv && touch .venv/made-by-run_all.sh && call "$base" -m venv .venv ||
    fail "no .venv could be made, $why"
  # Without a GPU the CPU builds are several GB smaller; not every index has both of the pair.
  if [ -z "$(driver)" ]; then
    call $python -m pip install torch==2.14.1+cpu torchvision==0.29.1+cpu 2>/dev/null &&
      touch .venv/cpu-only || :
  fi
  call $python -m pip install -r requirements.txt || fail "pip could not install the packages, $why"
  cp requirements.txt .venv/complete  # last: a half-made .venv is never used
}

settle() {  # what depends on whether there is a GPU
  local sets="" cost="20 hours of one GPU at an assumed 60 TFLOP/s (4.4e18 operations)"
  local ask="import torch; print(torch.cuda.is_available() * torch.cuda.device_count())"
  if packages; then
    gpus=$("$python" -c "$ask" 2>/dev/null) || fail "$python cannot import torch: give it requirements.txt"
  elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then gpus=0; else gpus=$(driver | wc -l); fi  # until it can say
  slots=${jobs:-$((gpus > 0 ? gpus : $(OMP_NUM_THREADS="" nproc)))}
  IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}"
  if [ $mode = auto ] && [ "$gpus" -gt 0 ]; then
    sets=$(find "$data/" -maxdepth 1 -name 'cifar-100-python*' -o -name 'tiny-imagenet-200*' 2>/dev/null || :)
  fi
  if [ $mode = full ] || [ -n "$sets" ]; then
    quick="" set_name="" datasets=${DATASETS:-cifar100 tinyimagenet} objectives=${OBJECTIVES:-simclr sogclr}
    samplers=${SAMPLERS:-random osgd spectral}
    if [ -n "$own" ]; then cost="1.3 hours of one GPU at an assumed 60 TFLOP/s (2.7e17 operations)"; fi
    say "== The paper's runs at full scale: all twelve take about $cost; --quick takes ten minutes"
  else
    [ -z "${DATASETS:-}" ] || fail "DATASETS is given and the runs are quick; add --full, or leave it out"
    [ -z "$own" ] || fail "--own-size is of the paper's runs; add --full, or leave it out"
    quick=--quick set_name=quick datasets=deadleaves objectives=${OBJECTIVES:-simclr}
    samplers=${SAMPLERS:-random osgd spectral refined}
  fi
}

# ---------------------------------------------------------------------------------------- stages
# Each lists its steps, a line each: a name, the result (-: none, always run), and the command for the shell.
emit() { echo "$1 $2$(printf ' %q' "$python" "${@:3}")"; }

test_() {  # in two processes that take about as long
  local apart="tests/test_train.py tests/test_data.py tests/test_run_all.py tests/test_bench.py"
  emit test-1 - -m pytest -q $apart
  emit test-2 - -m pytest -q test_samplers.py tests $(printf -- '--ignore=%s ' $apart)
}

synthetic() {  # toy first: a picture in the first minute
  local name large=""
  if [ -z "$quick" ]; then large="temperature scaling"; fi  # small, they can settle nothing
  for name in toy angle optima convergence subsets histograms $large; do
    emit "$name" "results/synthetic/$name.json" synthetic.py $quick --experiment $name --out results/synthetic
  done
}

train() {
  local dataset seed objective sampler name size resume
  for dataset in $datasets; do
    case $own$dataset in own-cifar100) size=32 ;; own-tinyimagenet) size=64 ;; *) size="" ;; esac
    for seed in ${SEEDS:-0}; do for objective in $objectives; do for sampler in $samplers; do
      name=${set_name:-$own$dataset}-$sampler-$objective resume=""
      if [ -n "$quick" ]; then name=${name%-simclr}; fi
      if [ "$seed" != 0 ]; then name+=-seed$seed; fi
      if [ -e "runs/$name/checkpoint.pt" ] && [ -z "$fresh" ]; then resume=--resume; fi
      emit "$name" "runs/$name/result.json" train.py --dataset "$dataset" --sampler "$sampler" \
        --objective "$objective" --seed "$seed" ${size:+--image-size $size} ${TRAIN_FLAGS:-} \
        --data-dir "$data" --out-dir "runs/$name" $resume
    done; done; done
  done
}

bench() { emit bench results/samplers.json bench.py samplers --pairs 10000 --out results/samplers.json; }

retrieval() {  # of all runs that have ended
  local dataset name corrupted
  for dataset in $datasets; do
    name=${set_name:-$own$dataset}
    case $dataset in cifar100) corrupted=CIFAR-100-C ;; *) corrupted=Tiny-ImageNet-C ;; esac
    if [ -z "$quick" ] && [ -e "$data/$corrupted" ]; then corrupted=official; else corrupted=built-in; fi
    echo "$(emit "retrieval-$name" "results/$name/retrieval.json" retrieval.py --curve --recalibrate \
      --corruptions $corrupted --data-dir "$data" --out "results/$name")" \
      "\$(dirname runs/$name-*/result.json)"
  done
}

report() { emit report - report.py; }

examples() {
  local script
  for script in $(find examples -name '*.py' ! -name 'test_*' | sort); do
    emit "$(basename "$script")" - "$script"
  done
  emit examples-test - -m pytest -q examples
}

# ---------------------------------------------------------------------------------------- running
failed=() pids=() names=()  # pids, names: of what runs, by slot

steps() {  # steps STAGE ...: the lines of those that are asked for
  local stage
  for stage; do if [[ $stages == *" ${stage%_} "* ]]; then $stage; fi; done
}

put_away() {  # put_away NAME RESULT: with all that is beside it
  local old=$2
  if [ "$1" != bench ]; then old=${old%/*}; fi
  if [ ! -e "$old" ]; then return; fi
  [ ! -e "$old/.lock" ] || flock -n "$old/.lock" true || fail "a process is training in $old; end it first"
  mkdir -p "$fresh/${old%/*}" && mv "$old" "$fresh/$old"
}

made() {  # made NAME RESULT: it is there, no quick one where a full one is asked for, and newer than its runs
  [ -s "$2" ] && [ -z "$fresh" ] && { [ -n "$quick" ] || ! grep -q -e --quick "$2"; } || return 1
  [[ $1 != retrieval* ]] || [ -z "$(find runs -maxdepth 2 -name result.json -newer "$2")" ]
}

run() {  # run STAGE ...: their steps, as many at a time as there are slots
  local lines line name result command prefix slot=0
  mapfile -t lines < <(steps "$@")
  for line in "${lines[@]}"; do
    read -r name result command <<<"$line"
    todo=("${todo[@]:1}")
    if made "$name" "$result"; then say "== skip $name: $result is there"; continue; fi
    if [ -n "$dry" ]; then say "$command"; continue; fi
    while kill -0 "${pids[slot]:-}" 2>/dev/null; do slot=$(((slot + 1) % slots)); sleep 0.1; done
    finish $slot
    say "== minute $((SECONDS / 60)): $name${names[*]:+ beside ${names[*]}}; to come: ${todo[*]:-nothing}"
    case $name in test-*) prefix="" ;; *) prefix="$name: " ;; esac
    (
      if [ "$gpus" -gt 1 ]; then export CUDA_VISIBLE_DEVICES=${visible[slot % gpus]}; fi
      set +f
      eval "exec $command"
    ) > >(trap '' INT TERM HUP; tee "runs/.logs/$name.log" | sed -u "s/^/$prefix/") 2>&1 &
    pids[slot]=$! names[slot]=$name
  done
  finish "${!pids[@]}"
}

finish() {  # finish SLOT ...: waits for what runs there
  local slot
  for slot; do
    if [ -n "${pids[slot]:-}" ] && ! wait "${pids[slot]}"; then
      failed+=("${names[slot]}")
      say "== FAILED ${names[slot]}; its output: runs/.logs/${names[slot]}.log" >&2
    fi
    unset "pids[slot]" "names[slot]"
  done
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

settle
if ! packages; then setup; settle; fi
if [ "$gpus" -eq 0 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
all="test_ synthetic train bench retrieval report examples"
mapfile -t todo < <(steps $all | cut -d " " -f 1)
if [ -z "$dry" ]; then
  mkdir -p runs/.logs
  if [[ $stages == *" examples "* ]] && [ -z "${RUN_PYTHON:-}" ]; then
    call $python -m pip install -r requirements-examples.txt || fail "no packages for the examples; see above"
  fi
  if [ -n "$fresh" ]; then
    while read -r name result _; do put_away "$name" "$result"; done < <(steps $all)
  fi
fi
slots=2 OMP_NUM_THREADS=1 run test_
run synthetic train bench
run retrieval
run report
run examples
if [ ${#failed[@]} -gt 0 ]; then say "run_all.sh: failed: ${failed[*]}; the others are done" >&2; exit 1; fi
