#!/usr/bin/env bash
# One start of a job: preflight on all nodes, training (or the evaluation VERB), and what follows from how it
# ended. Runs in the batch shell on the first node, from the snapshot that job.sh took.
#
#   finished              exit 0
#   asked to stop (USR1 before the time limit, TERM of a preemption): checkpoint, requeue
#   `stop` file of a user: checkpoint, exit 0
#   failed                requeue; MAX_FAILURES times in a row without a new checkpoint: exit 1
#   node lost             SLURM requeues by itself
set -euo pipefail
job=$1
shift
MAX_FAILURES=${MAX_FAILURES:-3}
STOP_SECONDS=${STOP_SECONDS:-240} # after a stop request; a job that still runs then is requeued without saving
ANSWER_SECONDS=${ANSWER_SECONDS:-300} # how long to keep asking SLURM, which may be restarting

# shellcheck source=slurm/launch.sh
source "$job/code/slurm/launch.sh"

await() { # COMMAND…: as it stands, but signals are handled meanwhile
    "$@" &
    local pid=$! status=0
    while kill -0 "$pid" 2>/dev/null; do
        status=0
        wait "$pid" || status=$?
    done
    return "$status"
}

# This task only: one task of an array has the number of the whole array.
this_job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

back_to_queue() { # a job that was cancelled meanwhile is not running any more, and requeueing would bring it back
    local answer end=$((SECONDS + ANSWER_SECONDS))
    until answer=$(squeue --noheader --jobs="$this_job" --Format=State,Requeue) &&
        { [[ $answer =~ ^RUNNING\ +1 ]] || return 1; } && scontrol requeue "$this_job"; do
        ((SECONDS < end)) || return 1
        sleep 5
    done
}

requeue() { # REASON
    trap '' TERM USR1 # requeueing ends this shell
    if back_to_queue; then say "requeued: $1"; else say "not requeued: $1" && exit 1; fi
    if [[ -s $state/excluded ]]; then
        scontrol update JobId="$this_job" ExcNodeList="$(sort -u "$state/excluded" | paste -sd,)"
    fi
    exit 0
}

ask_to_stop() { # SIGNAL
    asked=$1
    say "$1: asking all ranks to save and stop"
    if [[ -n $run_dir ]]; then
        # An empty file fits on a full disk. Its date, 1970, tells the next start that it is not a user's.
        { mkdir -p "$run_dir" && touch -d @0 "$run_dir/stop"; } || say "$run_dir/stop could not be written"
    fi
    { sleep "$STOP_SECONDS" && back_to_queue; } &
}

newest_step() { # of the checkpoints, 0 if there is none; of fine-tuning, the sum over its seeds
    local total=0 step folder path
    for folder in "$run_dir" "$run_dir"/seed-*; do
        step=0
        for path in "$folder"/checkpoints/step-*; do # a user may have renamed some
            if [[ -d $path && $path =~ /step-([0-9]+)$ ]]; then step=$((10#${BASH_REMATCH[1]})); fi
        done
        total=$((total + step))
    done
    echo "$total"
}

failed() { # WHAT; a stop that could not save counts as well, or a full disk would requeue the job for ever
    local step count failures
    step=$(newest_step)
    count=$(readlink "$state/failures") || count="0 0" # failures in a row, and the newest step at the last of them
    failures=$((step > ${count#* } ? 1 : ${count% *} + 1))
    # A link holds its text even if the disk is full. If it cannot be written either, every start counts as a failure.
    ln -sfn "$failures $step" "$state/failures" || failures=$((restarts + 1))
    if ((failures >= MAX_FAILURES)); then
        say "giving up: $1; $failures starts in a row without a new checkpoint (newest: step $step)"
        exit 1
    fi
    requeue "$1, $failures of $MAX_FAILURES without a new checkpoint (newest: step $step)"
}

interrupted() { # WHAT: a failure before training, which does not count if the job was asked to stop meanwhile
    [[ -z $asked ]] || requeue "$1, after $asked asked to stop"
    failed "$1"
}

replace() { # SETTING…: adds settings; each takes the place of an earlier one of the same key
    local new old kept
    for new in "$@"; do
        kept=()
        for old in "${settings[@]}"; do [[ ${old%%=*} == "${new%%=*}" ]] || kept+=("$old"); done
        settings=("${kept[@]}" "$new")
    done
}

asked=
run_dir=
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

# Each task of an array has its own directory, and its own line of the file SWEEP or its number as its seed.
verb=${VERB:-pretrain}
task=${SLURM_ARRAY_TASK_ID:-}
seed=$task
state=$job/${task:+task-$task}
mkdir -p "$state"
settings=("$@")
if [[ -n $task && -f $job/code/sweep ]]; then
    seed=
    mapfile -t -s $((task - 1)) -n 1 line <"$job/code/sweep"
    read -ra line <<<"${line[0]:?SWEEP has no line $task}"
    replace "${line[@]}"
fi
fits=()
[[ $verb != pretrain ]] || fits=(--nodes "$SLURM_NNODES" --ranks-per-node "$ranks")
run_dir=$(srun --nodes=1 --ntasks=1 "${srun_options[@]}" "${container[@]}" \
    python -m trainer config "$config" "${settings[@]}" "${fits[@]}" --get run.dir) || {
    ((restarts)) && failed "the configuration is refused"
    say "the configuration is refused: not started" && exit 1
}
if [[ $verb == pretrain ]]; then
    run_dir=$run_dir${task:+-$task}
    work=(pretrain "$config")
    replace "run.dir=$run_dir" ${seed:+"run.seed=$seed"}
else # an evaluation has its own directory in that of the run, with the same files
    work=("$verb" "$run_dir" ${seed:+--seed "$seed"})
    [[ $verb != *:* ]] || work=(evaluate "$run_dir" "$verb") # of the user, whose settings may have no seed
    work+=(--name "$NAME${task:+-$task}")
    run_dir=$run_dir/$NAME${task:+-$task}
fi

say "start $restarts of job $SLURM_JOB_ID: $SLURM_NNODES nodes ($SLURM_JOB_NODELIST) x $ranks ranks, $run_dir"
say "code and configuration of $(date -r "$job/code" '+%F %T'), in $job/code"
if [[ $(stat -c %Y "$run_dir/stop" 2>/dev/null) == 0 ]]; then rm "$run_dir/stop"; fi # of an earlier start
rm -f "$run_dir/stopped.json" "$state/bad-nodes"

if declare -F stage >/dev/null; then
    export -f stage
    await srun --kill-on-bad-exit=1 bash -c stage || interrupted "staging the data failed"
fi
if [[ ${PREFLIGHT:-1} == 1 ]]; then
    if ! await launch doctor "$config" "${settings[@]}" --bad-nodes "$state/bad-nodes"; then
        bad=$(paste -sd, "$state/bad-nodes" 2>/dev/null) || bad=
        if [[ ${EXCLUDE_BAD_NODES:-0} == 1 ]]; then cat "$state/bad-nodes" >>"$state/excluded" 2>/dev/null || true; fi
        interrupted "the preflight found what is wrong${bad:+, on $bad}"
    fi
fi
[[ -z $asked ]] || requeue "asked to stop by $asked before training"
# Training deletes this file when it begins. Until then there is nothing to save, and a stop is no failure.
not_begun='{"reason": "not begun"}'
{ mkdir -p "$run_dir" && echo "$not_begun" >"$run_dir/stopped.json"; } || interrupted "$run_dir could not be written"
status=0
await launch "${work[@]}" "${settings[@]}" || status=$?

if ((status == 0)) && [[ -f $run_dir/results.json ]]; then # which may be of an earlier start
    rm -f "$run_dir/stopped.json"
    say "finished: $run_dir"
elif [[ -f $run_dir/stopped.json && $(<"$run_dir/stopped.json") == "$not_begun" ]]; then
    rm -f "$run_dir/stopped.json"
    interrupted "training failed with exit code $status"
elif [[ -f $run_dir/stopped.json ]]; then
    reason=$(sed -n 's/.*"reason": "\(.*\)".*/\1/p' "$run_dir/stopped.json")
    if [[ -z $asked && $reason == "asked by file" ]]; then
        say "stopped by the file $run_dir/stop; the same sbatch goes on from step $(newest_step)"
    else
        requeue "stopped in good order at step $(newest_step) (${asked:-$reason})"
    fi
else
    failed "training failed with exit code $status${asked:+ after $asked asked it to stop}"
fi
