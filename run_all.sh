#!/usr/bin/env bash
# Sets up .venv and makes every number and figure; ends in results/report.html.
#   bash run_all.sh [OPTION ...] [STAGE ...]     the stages named, or all but test
#
# setup      .venv with the packages of requirements.txt
# test       the tests
# synthetic  the paper's theory on free embeddings     results/synthetic/
# train      data set x sampler x objective x seed     runs/
# retrieval  the trained runs evaluated and compared   results/quick/, with --full results/DATASET/
# bench      the samplers' table                       results/samplers.json
# report     all of it on one page                     results/report.html, results/report.md
#
# --full      the paper's twelve runs (the default where there are a CUDA GPU and one of their data sets)
# --quick     the same on generated images, small: 15 minutes on two cores (the default elsewhere)
# --own-size  with --full: views of the images' own size, 32 or 64 pixels, instead of 224
# --dry-run   list the commands and their time, estimated from half a minute of measuring; run nothing
# --jobs N    N training runs at a time, dealt to the GPUs in turn (default: one a GPU; on the CPU 1)
#
# A finished step is skipped while its command and its code stay the same; an interrupted run goes on where it was.
# Environment: DATA_DIR (default data) holds the data sets; DATASETS, SAMPLERS, OBJECTIVES and SEEDS narrow or widen the
# training runs, TRAIN_FLAGS is added to each; PYTHON makes .venv, or RUN_PYTHON has the packages and is used instead.
set -euo pipefail
unset CDPATH
fail() { echo "run_all.sh: error: $1" >&2; exit 2; }

if [ -n "${DATA_DIR:-}" ]; then  # as the caller sees it
  DATA_DIR=$(cd "$DATA_DIR" 2>/dev/null && pwd) || fail "DATA_DIR is no folder; make it, or leave it out for data/"
fi
if [ -n "${RUN_PYTHON:-}" ]; then  # a path from where the caller is, too
  RUN_PYTHON=$(command -v "$RUN_PYTHON") || fail "RUN_PYTHON is no program; name a Python that has the packages, or leave it out for .venv"
  case $RUN_PYTHON in /*) ;; */*) RUN_PYTHON=$PWD/$RUN_PYTHON ;; esac
fi
cd "$(dirname "$0")"
DATA_DIR=${DATA_DIR:-data}
python=${RUN_PYTHON:-.venv/bin/python}
STEPS=runs/.steps  # a stamp a step: when it finished, its command, a checksum of each file it was made by and of each it made

# ---------------------------------------------------------------------------------------------- the command line
full=auto size="" dry="" driver="" jobs="" stages=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' run_all.sh; exit ;;
    --full) full=yes ;;
    --quick) full="" ;;
    --own-size) size=own ;;
    --dry-run) dry=yes ;;
    --jobs) jobs=${2:-}; case $jobs in "" | 0* | *[!0-9]* | ????*) fail "--jobs ${jobs:-without a number}: give a number from 1 to 999, as in --jobs 4" ;; esac; shift ;;
    setup | test | synthetic | train | retrieval | bench | report) stages+=("$1") ;;
    -*) fail "$1 is no option; options: --full --quick --own-size --dry-run --jobs N --help" ;;
    *) fail "$1 is no stage; stages: setup test synthetic train retrieval bench report" ;;
  esac
  shift
done
if [ ${#stages[@]} -eq 0 ]; then stages=(setup synthetic train retrieval bench report); fi

gpus=()  # the names of those that may be used
if there=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null); then driver=yes gpus=($there); fi  # fails without a driver
case ${driver:-no}-${CUDA_VISIBLE_DEVICES-unset} in no-* | yes-unset) ;; yes--1) gpus=() ;; *) gpus=(${CUDA_VISIBLE_DEVICES//,/ }) ;; esac
if [ "$full" = auto ] && [ ${#gpus[@]} -gt 0 ]; then
  for name in cifar-100-python tiny-imagenet-200; do if compgen -G "$DATA_DIR/$name*" >/dev/null; then full=yes; fi; done
fi
if [ "$full" = yes ]; then
  DATASETS=${DATASETS:-cifar100 tinyimagenet} SAMPLERS=${SAMPLERS:-random osgd spectral} OBJECTIVES=${OBJECTIVES:-simclr sogclr} quick=""
else
  if [ -n "${DATASETS:-}" ]; then fail "DATASETS is given and the runs are quick ones, on generated images; add --full, or leave it out"; fi
  if [ -n "$size" ]; then fail "--own-size is of the paper's runs; add --full, or leave it out"; fi
  DATASETS=deadleaves SAMPLERS=${SAMPLERS:-random osgd spectral refined} OBJECTIVES=${OBJECTIVES:-simclr} quick=--quick
fi
if [ -z "$jobs" ]; then jobs=$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1)); fi

# ---------------------------------------------------------------------------------------------- steps
failed=() pids=() names=() keys=() made=() begun=() slots=1 planned=""

stamp() { { echo "$2"; echo "$3"; } >"$STEPS/.$1.tmp"; sync "$STEPS/.$1.tmp" 2>/dev/null || :; mv "$STEPS/.$1.tmp" "$STEPS/$1"; }  # stamp NAME STATE KEY

locked() {  # locked FILE: held by a training process that outlived its script
  "$python" -c 'import fcntl, sys
try: fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit(9)' "$1" 2>/dev/null
  [ $? -eq 9 ]
}

sums() { cksum $1 2>/dev/null | sed 's/^/made /' || :; }

# step NAME OUTPUTS FILES COMMAND ...: runs `python COMMAND ...` unless OUTPUTS are as it made them, and neither it nor FILES changed.
step() {
  local name=$1 outputs=$2 files=$3 act=run why key state old lost folder away="" slot n word words=()
  shift 3
  key=$(echo "python $*"; cksum $files 2>/dev/null || :)
  state=$(sed -n 1p "$STEPS/$name" 2>/dev/null || :)
  old=$(sed '1d; /^made /d' "$STEPS/$name" 2>/dev/null || :)
  lost=$(for word in $outputs; do [ -e "$word" ] && grep -qxF "$(sums "$word")" "$STEPS/$name" 2>/dev/null || echo "$word"; done)
  if [ -z "$state" ]; then why="first time"
  elif [ "$(sed -n 2p "$STEPS/$name")" != "python $*" ]; then why="its command changed"
  elif [ "$old" != "$key" ]; then
    why="$({ diff <(echo "$old") <(echo "$key") || :; } | sed -n 's/^[<>] [0-9]* [0-9]* //p' | sort -u | paste -sd ' ' -) changed"
  elif [ "$state" = begun ]; then why="begun and not finished"
  elif [ -n "$lost" ]; then why="gone or not as it was made: $(paste -sd ' ' - <<<"$lost")"
  elif [ -n "$dry" ] && [ "$1" = retrieval.py ] && grep -v "^skip" <<<"$planned" | cut -f2 | grep -qxF "$(printf '%s\n' "${@#runs/}")"; then
    why="its runs change"
  else act=skip why=$state; fi
  folder=${outputs%/*}
  case $outputs in runs/*)  # a training run: hours that are gone on with or kept, never lost
    if [ $act = run ] && [ -e "$folder/checkpoint.pt" ]; then
      if [ "$old" = "$key" ]; then act=resume; set -- "$@" --resume
      elif [ -z "$dry" ] && locked "$folder/.lock"; then
        failed+=("$name"); echo "== FAILED $name: another process is training in $folder; let it end, or end it" >&2; return
      else
        n=1; while [ -e "$folder.old-$n" ]; do n=$((n + 1)); done
        away=$folder.old-$n why="$why; the run that was there goes to $folder.old-$n"
      fi
    fi ;;
  esac
  for word; do if [ "$word" = DATA_DIR ]; then word=$DATA_DIR; fi; words+=("$word"); done  # a moved data set is the same step
  if [ -n "$dry" ]; then planned+=$(printf '%s\t' "$act" "$name" "$why" "$(cut -d ' ' -f 4 <<<"$state ")"; printf '%q ' "${words[@]}")$'\n'; return; fi
  if [ $act != skip ]; then await; fi
  echo "== $act $name: $why"
  if [ $act = skip ]; then return; fi
  if [ -n "$away" ]; then mv "$folder" "$away"; fi
  mkdir -p "$STEPS"
  stamp "$name" begun "$key"
  keys[slot]=$key made[slot]=$outputs
  start "$name" "${words[@]}"
}

await() {  # sets slot to one that is free or, after waiting, becomes so
  slot=0
  while [ -n "${pids[slot]:-}" ]; do
    if kill -0 "${pids[slot]}" 2>/dev/null; then slot=$(((slot + 1) % slots)); [ $slot -gt 0 ] || sleep 0.3; else reap $slot; fi
  done
}

start() {  # start NAME COMMAND ...: in the slot
  local name=$1 log=$STEPS/$1.log gpu=""
  shift
  if [ ${#gpus[@]} -gt 0 ]; then gpu=${gpus[slot % ${#gpus[@]}]}; fi
  rm -f "$log"
  if [ $slots -gt 1 ]; then echo "   its output: $log"; fi
  # In the background, so that a signal to this script is acted on at once.
  ( if [ -n "$gpu" ]; then export CUDA_VISIBLE_DEVICES=$gpu; fi
    if [ $slots -gt 1 ]; then exec >"$log" 2>&1; fi
    exec "$python" "$@" ) &
  pids[slot]=$! names[slot]=$name begun[slot]=$(date +%s)
  if [ $slots -eq 1 ]; then reap 0; fi
}

reap() {  # reap SLOT: waits for its command; stamps it finished, or names it failed
  local code=0 name=${names[$1]}
  wait "${pids[$1]}" || code=$?
  pids[$1]=""
  if [ $code -eq 0 ]; then
    stamp "$name" "finished $(date +%Y-%m-%dT%H:%M:%S%z) in $(($(date +%s) - begun[$1])) s" "${keys[$1]}"$'\n'"$(sums "${made[$1]}")"
  elif [ $code -eq 130 ]; then stop 130
  else
    failed+=("$name")
    echo "== FAILED $name (exit code $code)$(if [ -s "$STEPS/$name.log" ]; then echo ": $(tail -n 1 "$STEPS/$name.log")"; fi)" >&2
  fi
}

stop() {  # stop CODE: ends what is under way; a training run saves first
  trap - INT TERM  # a second Ctrl-C ends all at once
  local pid
  for pid in $(jobs -p); do kill "$pid" 2>/dev/null || :; done
  wait
  echo "run_all.sh: interrupted; the same command goes on from here" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

# ---------------------------------------------------------------------------------------------- stages
# .venv/complete is written last and holds what was asked for, so that a half-made .venv is never used.
packages() { [ -n "${RUN_PYTHON:-}" ] || { [ -x $python ] && cmp -s requirements.txt .venv/complete && { [ -z "$driver" ] || [ ! -e .venv/cpu-only ]; }; }; }

setup() {
  local why="first time"
  if packages; then echo "== skip setup: the packages are there"; return; fi
  if [ -e .venv/complete ]; then if cmp -s requirements.txt .venv/complete; then why="there is a GPU now"; else why="requirements.txt changed"; fi
  elif [ -e .venv ]; then why="begun and not finished"; fi
  if [ -n "$dry" ]; then echo "== run setup: $why; so there are no estimates"; return; fi
  local base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "$base is not Python 3.10 or newer; install one, or name it: PYTHON=python3.12 bash run_all.sh"
  echo "== run setup: $why (some minutes)"
  if [ -e .venv ] && [ ! -e .venv/made-by-run_all.sh ]; then
    fail ".venv is not of this script; move it away, or use it: RUN_PYTHON=.venv/bin/python bash run_all.sh"
  fi
  rm -rf .venv; mkdir .venv; touch .venv/made-by-run_all.sh
  "$base" -m venv .venv || fail "$base cannot make a .venv; on Debian and Ubuntu: apt-get install python3-venv"
  # Without a GPU the CPU builds are several GB smaller; only an index that has both of the pair can give them.
  if [ -z "$driver" ]; then
    if $python -m pip install -q "torch==2.14.1+cpu" "torchvision==0.29.1+cpu" 2>/dev/null; then touch .venv/cpu-only; elif [ $? -eq 130 ]; then exit 130; fi
  fi
  $python -m pip install -q -r requirements.txt || { [ $? -ne 130 ] || exit 130; fail "pip could not install the packages of requirements.txt, for the reason above; the same command tries again"; }
  cp requirements.txt .venv/complete
}

always() {  # always NAME COMMAND ...: runs it whether or not anything changed
  local name=$1
  shift
  if [ -n "$dry" ]; then planned+=$(printf 'run\t%s\tanew each time\t\t' "$name"; printf '%q ' "$@")$'\n'; return; fi
  echo "== run $name: anew each time"
  "$python" "$@" &  # in the background, so that a signal to this script is acted on at once
  wait $! || failed+=("$name")
}

tests() {  # in two processes, a core each: those that wait for processes of their own, and the others
  local apart="test_train.py test_data.py test_run_all.py test_bench.py" beside="" code=0
  if [ -z "$dry" ]; then
    mkdir -p "$STEPS"
    OMP_NUM_THREADS=1 "$python" -m pytest -q $apart >"$STEPS/test.log" 2>&1 &
    beside=$!
  fi
  OMP_NUM_THREADS=1 always test -m pytest -q $(printf -- '--ignore=%s ' $apart)
  if [ -n "$beside" ]; then
    wait $beside || code=$?
    cat "$STEPS/test.log"
    [ $code -eq 0 ] || failed+=("test ($apart)")
  fi
}

synthetic() {
  local name  # toy first: a picture in the first minute
  for name in toy optima convergence subsets histograms temperature scaling; do
    step "synthetic-$name" "results/synthetic/$name.json results/synthetic/$name.png" "synthetic.py theory.py samplers.py model.py figures.py cli.py" \
      synthetic.py $quick --experiment "$name" --out results/synthetic
  done
}

runs() {  # runs DATASET: a line a training run, its name and its flags
  local objective sampler seed name
  for seed in ${SEEDS:-0}; do for objective in $OBJECTIVES; do for sampler in $SAMPLERS; do
    name=$1-$sampler-$objective
    if [ -n "$quick" ]; then name=quick-$sampler-$objective name=${name%-simclr}; fi
    if [ "$seed" != 0 ]; then name+=-seed$seed; fi
    case $size-$1 in
      own-cifar100) echo "$name-32px --image-size 32" ;;
      own-tinyimagenet) echo "$name-64px --image-size 64" ;;
      *) echo "$name" ;;
    esac | sed "s/\$/ --dataset $1 --sampler $sampler --objective $objective --seed $seed/"
  done; done; done
}

train() {
  local dataset name flags
  slots=$jobs
  # Not retrieval.py, of which train.py uses the metrics: it looks on, and must not cost anybody a night's training.
  for dataset in $DATASETS; do
    while read -r name flags; do
      step "$name" "runs/$name/result.json" "train.py samplers.py model.py lars.py data.py augment.py deadleaves.py cli.py" \
        train.py $flags ${TRAIN_FLAGS:-} --data-dir DATA_DIR --out-dir "runs/$name" </dev/null
    done < <(runs "$dataset")
  done
  while [ $slots -gt 1 ]; do slots=$((slots - 1)); if [ -n "${pids[slots]:-}" ]; then reap $slots; fi; done
  if [ -n "${pids[0]:-}" ]; then reap 0; fi
}

retrieval() {
  local dataset name flags there files corruptions
  for dataset in $DATASETS; do
    there=() files="" corruptions=built-in
    case $dataset in cifar100) flags=CIFAR-100-C ;; *) flags=Tiny-ImageNet-C ;; esac
    case $dataset-$(ls -d "$DATA_DIR/$flags" 2>/dev/null) in
      cifar100-?* | tinyimagenet-?*) corruptions=official ;;
      cifar100- | tinyimagenet-) echo "$flags is not in $DATA_DIR: corruptions of our own stand in for it" >&2 ;;
    esac
    while read -r name flags; do
      if [ -e "runs/$name/result.json" ] || [ -n "$dry" ]; then there+=("runs/$name") files+=" runs/$name/result.json"; fi
    done < <(runs "$dataset")
    if [ ${#there[@]} -eq 0 ]; then
      failed+=("retrieval-$dataset${size:+-own}")
      echo "== FAILED ${failed[${#failed[@]} - 1]}: no run has finished; first: bash run_all.sh ${quick:---full} ${size:+--own-size }train" >&2; continue
    fi
    name=results/quick; if [ -z "$quick" ]; then name=results/$dataset${size:+-own}; fi
    step "retrieval-$dataset${size:+-own}" "$name/retrieval.json $name/curve.png $name/neighbours.png" "retrieval.py compare.py corruptions.py probe.py figures.py model.py data.py augment.py deadleaves.py cli.py$files" \
      retrieval.py "${there[@]}" --curve --recalibrate --corruptions $corruptions --data-dir DATA_DIR --out "$name"
  done
}

bench() { step bench results/samplers.json "bench.py samplers.py rivals.py model.py lars.py data.py deadleaves.py augment.py train.py retrieval.py cli.py" \
  bench.py samplers --pairs 10000 --out results/samplers.json; }

report() { always report report.py; }

setup
for stage in "${stages[@]}"; do
  case $stage in setup) ;; test) tests ;; *) $stage ;; esac
done
if [ -n "$planned" ]; then
  if packages; then "$python" plan.py --jobs "$jobs" <<<"$planned"; else cut -f1-3,5 <<<"$planned"; fi
fi
if [ ${#failed[@]} -gt 0 ]; then echo "run_all.sh: failed: ${failed[*]}; the others are done" >&2; exit 1; fi
