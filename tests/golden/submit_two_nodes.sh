#!/bin/bash
# bert-squad on SLURM, written by: spantune submit jobs/bert_squad.toml
#
#   spantune status RUN                  how far it is; RUN is /scratch/me/the runs/bert-squad/20261125-120000
#   spantune logs RUN -f                 what it says
#   spantune cancel RUN                  saves and ends it
#   spantune submit JOB --run-dir RUN    goes on where it was saved
#
# The job ends with the run's exit code: 0 done, 64 job file, 65 data or model refused, 69 asset
# missing, 71 a rank died, 73 run folder in use, 74 reading or writing failed, 75 interrupted and
# saved, 76 loss no longer a number, 78 an [expect] gate missed, 70 a mistake in spantune. The run
# has succeeded if and only if its folder holds result.json. More in jobs/SLURM.md.
#SBATCH --job-name=bert-squad
#SBATCH --partition=gpu,gpu-long
#SBATCH --qos=normal
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00
#SBATCH --signal=B:USR2@300
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output='/scratch/me/the runs/bert-squad/20261125-120000/slurm-%j.out'

run='/scratch/me/the runs/bert-squad/20261125-120000'
job=$SLURM_JOB_ID
spantune=(apptainer exec --nv --bind=/scratch:/scratch /images/qa.sif python3 -u /opt/spantune/runner/main.py)
cd "$run" || exit 74
echo "$(date '+%F %T') job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"

# --- signals
# USR2 means: save, to be requeued. It comes to this shell alone (B:), 300 s before the end of
# the time, and at a preemption with GraceTime and preempt_send_user_signal. srun passes it to
# all ranks, again and again: one that is still loading its libraries does not listen yet.
# TERM means: save and end. It comes from scancel, scontrol requeue, a preemption, and at the end of
# the time, to this shell and to all ranks. To requeue ourselves then would bring a cancelled job
# back to life; only one that was preempted by CANCEL is to go on. SLURM's state does not tell which
# (it is COMPLETING until this script has ended), but slurmstepd does: before the TERM comes, it
# writes a line into our output. Where SLURM requeues by itself, it has counted that by then.
output='/scratch/me/the runs/bert-squad/20261125-120000'/slurm-$job.out
preemptions() { grep -c "JOB $SLURM_JOB_ID ON .* DUE TO PREEMPTION" "$output" 2>/dev/null; }
earlier=$(preemptions)
step='' warned='' ended='' gone=''
warn() {
  warned=1
  [ -z "$step" ] || (while sleep 2 && kill -USR2 "$step"; do :; done) 2>/dev/null &
}
# shellcheck disable=SC2329 # it is called, by the trap
end() {
  ended=1
  if [ "$(preemptions)" != "$earlier" ] &&
    scontrol show job "$job" | grep -q " Restarts=${SLURM_RESTART_COUNT:-0} "; then
    gone=1
  fi
}
trap warn USR1 USR2
trap end TERM
say_how_to_go_on() {
  printf '%s spantune submit %q --run-dir %q\n' "$1" "$run/job.toml" "$run" | tee -a log.txt >&2
}

# --- environment
# A rank has as many threads as cores; who it is, it reads from SLURM's own variables.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
# The job's own variables are those of the run; this shell and its commands do without them.
run_with_variables() {
  export NCCL_SOCKET_IFNAME=ib0
  export HF_HOME=/scratch/me/hf
  exec "$@"
}

# --- where the ranks meet: on the first node, which runs this script and rank 0, at a port by the
# job's number, or the next that nobody listens at
MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT MASTER_ADDR="${MASTER_ADDR:-$SLURMD_NODENAME}"

# --- the run: one task is one rank
# Ranks ignore the signals until they are ready for them (trap ''), so that none dies of one. Those
# that are left a minute after the first has ended are killed (--wait); not at once, because all
# ranks together end with the run's code. They get all variables (--export), whichever of them
# SBATCH_EXPORT has let into this script.
run_with_variables srun --export=ALL --kill-on-bad-exit=0 --wait=60 --cpus-per-task=8 \
  bash -c 'trap "" USR1 USR2 TERM; exec "$@"' rank \
  "${spantune[@]}" rank "$run/job.toml" --run-dir "$run" &
step=$!
[ -z "$warned" ] || warn
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # each trapped signal ends a wait early
wait "$step"
code=$?

if [ "$code" = 0 ] && [ ! -e "$run/result.json" ]; then
  echo "all ranks have ended well, but there is no result.json: this is no success" >&2
  code=70
fi

if [ "$code" = 75 ] && [ -z "$ended" ]; then
  say_how_to_go_on 'saved; to go on:'
fi
if [ "$code" != 0 ] && [ -n "$gone" ]; then say_how_to_go_on 'preempted; go on with:'; fi
exit "$code"
