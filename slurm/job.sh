#!/usr/bin/env bash
# Sourced by the scripts that are submitted, such as adco_800ep.sh: copies code and configuration once, then runs the copy.
#
#   sbatch [OPTIONS] slurm/adco_800ep.sh [section.key=value …]   copies when the job first starts
#   slurm/adco_800ep.sh [OPTIONS] [section.key=value …]          copies now, then submits the job
#
# All nodes, restarts and tasks of an array use the copy in runs/slurm/JOB/code. Later edits affect only later jobs.
set -euo pipefail

check_files() {
    local name
    for name in CONFIG ${SWEEP:+SWEEP}; do
        [[ -f ${!name} ]] || { echo "error: $name=${!name}: no such file in $PWD" >&2 && exit 1; }
    done
}

snapshot() { # into runs/slurm/$1; not in a condition, in which bash would go on after an error
    new=runs/slurm/.$1.$$
    check_files
    mkdir -p "$new/configs"
    cp -rp trainer models data kernels slurm "$new"
    cp -p "$(dirname "$CONFIG")"/*.yaml "$new/configs" # all of them, because a file may extend another
    code=$(dirname "$CONFIG")/code # a run's copies of a method or backbone from outside
    if [[ ${CONFIG##*/} == config.yaml && -d $code ]]; then cp -rp "$code" "$new/configs/code"; fi
    if [[ -n ${SWEEP:-} ]]; then cp "$SWEEP" "$new/sweep"; fi
    mkdir -p "runs/slurm/$1"
    mv -T "$new" "runs/slurm/$1/code" 2>/dev/null || rm -rf "$new" # another task of the array has already copied
    [[ -d runs/slurm/$1/code ]]
}

if [[ ${0##*/} != slurm_script ]]; then # SLURM's name of its copy; SLURM_JOB_ID is also set in a shell of salloc
    for name in "${!SLURM_@}"; do [[ $name == SLURM_CONF ]] || unset "$name"; done # sbatch would take them as options
    options=()
    while (($#)) && [[ ! $1 =~ ^[a-z_]+\.[a-z_.]+= ]]; do options+=("$1") && shift; done
    check_files
    id=$(sbatch --parsable --hold "${options[@]}" "slurm/${0##*/}" "$@")
    id=${id%%;*}
    end=cancelled
    trap 'rm -rf "${new:-}"; scancel "$id" || end="still held, end it by scancel $id"
        echo "error: job $id could not be prepared: $end" >&2' EXIT
    snapshot "$id"
    scontrol release "$id"
    trap - EXIT
    echo "Submitted batch job $id, code and configuration as they are now"
    exit
fi

id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
[[ -d runs/slurm/$id/code ]] || snapshot "$id"
exec bash "runs/slurm/$id/code/slurm/${RUN:-run.sh}" "runs/slurm/$id" "$@"
