#!/usr/bin/env bash
# docs: docs/study.md#sweeps
# Sweeps of scripts x tasks x seeds; `bash benchmark.sh --help` prints the usage below.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'EOF'
usage: bash benchmark.sh [sweep|quick|speed] [NAME=VALUE ...]

sweep  every script on every task with every seed, as many at once as there are cores (default)
quick  the same with one seed and few env steps, to see that all of it runs
speed  each script against CoMLRL and TRL, alternating (benchmark_speed.py; both go to .venv-peers/)

NAME=VALUE, as arguments or environment variables:
  SCRIPTS    "collm_cc collm_dc mc_baseline"
  TASKS      "tldr arxiv coding strbuild housebuild"; options go behind: "strbuild:feedback=score"
  SEEDS      "1 2 3"; quick: "1"
  ARGS       further flags of the scripts, e.g. "--num-agents 1"; other flags, other runs
  JOBS       runs at once; the number of cores. Above 1 each has one thread
  PYTHON     the interpreter; python
  QUICK_STEPS  env steps of a quick run; 512
  SPEED_ARGS   flags of benchmark_speed.py, e.g. "--repeats 5"

A run is runs/{task}__{script}__{seed}[__{flags}], its output the same with .log. Starting a sweep
again skips what has finished, resumes what has a checkpoint and starts the rest anew. A run that
fails is reported with the end of its log and does not stop the others; the sweep then ends with
exit code 1. At its end plot.py writes a row for each finished run to results/runs.csv, and tables
and learning curves beside it.
EOF
}

cores() { nproc 2>/dev/null || sysctl -n hw.ncpu; }

# A row of runs.csv whose folder is not here is history and skips nothing
# (a name with commas, from the options of a task, stands in quotes there).
finished() { [[ -d runs/$1 ]] && grep -q "^\"\?$1\"\?," results/runs.csv 2>/dev/null; }

one() { # SCRIPT TASK SEED: one run, skipped, resumed or new; returns 1 if it fails
  local script=$1 task=$2 seed=$3 name log command
  name=${task}__${script}__$seed
  [[ -z $ARGS ]] || name+=__$(sed -E 's/[^A-Za-z0-9.]+/-/g; s/^-|-$//g' <<<"$ARGS")
  log=runs/$name.log
  if finished "$name"; then
    echo "skip    $name"
    return
  fi
  # shellcheck disable=SC2206 # ARGS are several words
  command=("$PYTHON" "$script.py" --task "$task" --seed "$seed" --run-name "$name" $ARGS)
  if compgen -G "runs/$name/checkpoint_*.pt" >/dev/null; then
    command+=(--resume "runs/$name")
  else # nothing to go on with
    rm -rf "runs/$name" "$log"
  fi
  echo "start   ${command[*]}"
  echo "+ $(git describe --always --dirty 2>/dev/null || echo unknown) ${command[*]}" >>"$log"
  if ! "${command[@]}" >>"$log" 2>&1; then
    printf 'FAILED  %s, end of %s:\n' "$name" "$log"
    tr '\r' '\n' <"$log" | tail -n 15 | sed 's/^/        /'
    return 1
  fi
  echo "done    $name"
}

sweep() {
  mkdir -p runs results
  "$PYTHON" plot.py csv # so that what is skipped is what the folders say
  if ((JOBS > 1)); then
    export OMP_NUM_THREADS=1 # threads that wait for each other's cores are ten times slower
  fi
  local failed=0
  # Seeds outermost: a sweep that is stopped early has whole seeds of everything
  for seed in $SEEDS; do for task in $TASKS; do for script in $SCRIPTS; do
    echo "$script $task $seed"
  done; done; done | xargs -P "$JOBS" -L 1 bash "$PWD/benchmark.sh" one || failed=1
  "$PYTHON" plot.py || failed=1
  ((!failed)) || echo "some runs failed, see above" >&2
  return $failed
}

speed() {
  local peers=.venv-peers path='import sysconfig; print(sysconfig.get_path("purelib"))'
  if [[ ! -e $peers/ready ]]; then
    "$PYTHON" -m venv "$peers"
    # Its own packages first, then ours: the peers run on the torch and transformers of the scripts
    "$PYTHON" -c "$path" >"$("$peers/bin/python" -c "$path")/ours.pth"
    "$peers/bin/pip" install -q comlrl==1.4.3 trl==1.16.0
    touch "$peers/ready"
  fi
  # shellcheck disable=SC2086 # SPEED_ARGS are several words
  "$PYTHON" benchmark_speed.py --comlrl "$peers/bin/python" --trl "$peers/bin/python" $SPEED_ARGS
}

action=sweep
words=()
for word in "$@"; do
  case $word in
    -h | --help) usage && exit ;;
    [A-Z]*=*) export "${word%%=*}=${word#*=}" ;;
    sweep | quick | speed | one) action=$word ;;
    *) if [[ $action == one ]]; then words+=("$word"); else usage >&2 && exit 2; fi ;;
  esac
done
if [[ $action == quick ]]; then
  SEEDS=${SEEDS:-1}
  ARGS="--total-env-steps ${QUICK_STEPS:-512} ${ARGS:-}"
fi
export SCRIPTS=${SCRIPTS:-collm_cc collm_dc mc_baseline}
export TASKS=${TASKS:-tldr arxiv coding strbuild housebuild}
export SEEDS=${SEEDS:-1 2 3} ARGS=${ARGS:-} JOBS=${JOBS:-$(cores)} PYTHON=${PYTHON:-python}
export SPEED_ARGS=${SPEED_ARGS:-}
case $action in
  one) one "${words[@]}" ;;
  speed) speed ;;
  *) sweep ;;
esac
