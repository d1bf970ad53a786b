# Sourced by the batch scripts beside it. `run_step COMMAND …` runs COMMAND as one step of the job, to its end; `run_main COMMAND …`
# runs one that starts the job's steps itself.
#
# USR1, which Slurm sends to the batch script before the time limit (#SBATCH --signal=B:USR1@…), is passed on as SIGTERM: training
# saves a checkpoint and ends. Then the job goes back into the queue, and on from there with --resume=auto.

run_step() {
    run_main srun --kill-on-bad-exit=1 "$@"
}

run_main() {
    local main status=0 requeue=
    "$@" &
    main=$!
    # Not `kill "$main"`: srun answers SIGTERM by killing its tasks at once.
    trap 'requeue=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
    wait "$main" || status=$?
    if [ -n "$requeue" ]; then
        wait "$main" || true  # the signal ended the first wait; the step is still saving
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
