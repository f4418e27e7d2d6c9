#!/usr/bin/env bash
# docs: docs/study.md#sweeps
# Sweeps of scripts x tasks x seeds; `bash benchmark.sh --help` prints the usage below.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'EOF'
usage: bash benchmark.sh [sweep|quick|study|speed] [NAME=VALUE ...]

sweep  every script on every task with every seed, as many at once as there are cores (default)
quick  the same with one seed and few env steps, to see that all of it runs
study  the runs that study.py lists, with seeds 1 to 10
speed  each script against CoMLRL and TRL, alternating (benchmark_speed.py; both go to .venv-peers/)

NAME=VALUE, as arguments or environment variables:
  SCRIPTS    "collm_cc collm_dc mc_baseline"
  TASKS      "tldr arxiv coding strbuild housebuild"; options go behind: "strbuild:feedback=score"
  SEEDS      "1 2 3"; quick: "1"; study: "1 2 3 4 5 6 7 8 9 10"
  ARGS       further flags of the scripts, e.g. "--num-agents 1"; other flags, other runs
  JOBS       runs at once; the number of cores. Above 1 each has one thread
  PYTHON     the interpreter; python
  QUICK_STEPS  env steps of a quick run; 512
  PART         parts of the study: "main horizon information control"
  STEPS        env steps of its runs, to see that all of it runs; by default each has its own
  SPEED_ARGS   flags of benchmark_speed.py, e.g. "--repeats 5"

A run is runs/{task}__{script}__{seed}[__{flags}], its output the same with .log. Started again, a
sweep or a study skips what has finished, resumes what has a checkpoint and starts the rest anew. A
run that fails is reported with the end of its log and does not stop the others; the sweep then ends
with exit code 1. At its end plot.py writes a row for each finished run to results/runs.csv, and
tables and figures beside it. A study does so after each seed, and then deletes the checkpoints of
its finished runs, which would fill a disk; their agents stay. A study, which may take several
machines, also skips what has a row in results/runs.csv; delete that file to play all of it anew.
EOF
}

cores() { nproc 2>/dev/null || sysctl -n hw.ncpu; }

# A row of runs.csv whose folder is not here is of another machine: it counts in a study alone
# (a name with commas, from the options of a task, stands in quotes there).
finished() {
  [[ -d runs/$1 || -n ${IN_STUDY:-} ]] && grep -q "^\"\?$1\"\?," results/runs.csv 2>/dev/null
}

one() { # SCRIPT TASK SEED [FLAG ...]: one run, skipped, resumed or new; returns 1 if it fails
  local script=$1 task=$2 seed=$3 flags="${*:4} $ARGS" name log program command
  name=${task}__${script}__$seed
  [[ -z ${flags// /} ]] || name+=__$(sed -E 's/[^A-Za-z0-9.]+/-/g; s/^-|-$//g' <<<"$flags")
  log=runs/$name.log
  mkdir -p runs
  exec 9>>"$log" # held, and locked, as long as the run goes on
  if command -v flock >/dev/null && ! flock -n 9; then
    echo "busy    $name"
    return
  fi
  if finished "$name"; then
    echo "skip    $name"
    return
  fi
  program=("$script.py")
  [[ $task != climbing* ]] || program=(climbing.py "$script") # a task of its own, for any script
  # shellcheck disable=SC2206 # flags are several words
  command=("$PYTHON" "${program[@]}" --task "$task" --seed "$seed" --run-name "$name" $flags)
  if compgen -G "runs/$name/checkpoint_*.pt" >/dev/null; then
    command+=(--resume "runs/$name")
  else # nothing to go on with
    rm -rf "runs/$name"
    : >"$log"
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

begin() {
  mkdir -p runs results
  "$PYTHON" plot.py csv # so that what is skipped is what the folders say
  if ((JOBS > 1)); then
    export OMP_NUM_THREADS=1 # threads that wait for each other's cores are ten times slower
  fi
}

play() { # lines of SCRIPT TASK SEED [FLAG ...] from stdin, JOBS at once; returns 1 if one fails
  xargs -P "$JOBS" -L 1 bash "$PWD/benchmark.sh" one
}

end() { # FAILED
  local failed=$1
  "$PYTHON" plot.py || failed=1
  ((!failed)) || echo "some runs failed, see above" >&2
  return "$failed"
}

sweep() {
  local failed=0
  begin
  # Seeds outermost: a sweep that is stopped early has whole seeds of everything
  for seed in $SEEDS; do for task in $TASKS; do for script in $SCRIPTS; do
    echo "$script $task $seed"
  done; done; done | play || failed=1
  end $failed
}

study() {
  local failed=0 lines seed run
  export IN_STUDY=1
  begin
  # shellcheck disable=SC2086 # PART and STEPS may be several words, or none
  lines=$("$PYTHON" study.py $PART ${STEPS:+--steps $STEPS})
  for seed in $SEEDS; do
    sed -E "s/^([^ ]+ [^ ]+)/\\1 $seed/" <<<"$lines" | play || failed=1
    "$PYTHON" plot.py csv || failed=1
    for run in runs/*__"$seed"__*total-env-steps-*-eval-every-*; do
      ! finished "${run#runs/}" || rm -f "$run"/checkpoint_*.pt
    done
  done
  end $failed
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
    sweep | quick | study | speed | one) action=$word ;;
    *) if [[ $action == one ]]; then words+=("$word"); else usage >&2 && exit 2; fi ;;
  esac
done
if [[ $action == quick ]]; then
  SEEDS=${SEEDS:-1}
  ARGS="--total-env-steps ${QUICK_STEPS:-512} ${ARGS:-}"
fi
if [[ $action == study ]]; then
  SEEDS=${SEEDS:-1 2 3 4 5 6 7 8 9 10}
fi
export SCRIPTS=${SCRIPTS:-collm_cc collm_dc mc_baseline}
export TASKS=${TASKS:-tldr arxiv coding strbuild housebuild}
export SEEDS=${SEEDS:-1 2 3} ARGS=${ARGS:-} JOBS=${JOBS:-$(cores)} PYTHON=${PYTHON:-python}
export SPEED_ARGS=${SPEED_ARGS:-} PART=${PART:-} STEPS=${STEPS:-}
case $action in
  one) one "${words[@]}" ;;
  speed) speed ;;
  study) study ;;
  *) sweep ;;
esac
