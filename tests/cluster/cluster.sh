#!/bin/bash
# A real SLURM cluster of virtual nodes on one machine, from Debian's packages, for tests. Nodes come in
# pairs, n1 and n2, n3 and n4, ...: partitions pN, cancelN and urgentN have the Nth pair. A job in urgentN
# preempts those in pN (requeued, after a grace) and in cancelN (killed at once; in cancel6 after a grace).
# What happens to a job there, to a node even, disturbs no job of another pair: all runs at once.
#
#   cluster.sh install        apt packages (needs root; nothing else does)
#   cluster.sh start DIR      starts munged, slurmctld and a slurmd for each node in DIR, until all idle
#   cluster.sh node DIR N     starts the slurmd of one node again
#   cluster.sh stop DIR       cancels jobs, stops every process of this cluster, by PID
#
# Clients need SLURM_CONF=DIR/slurm.conf. Nothing under /etc or /var is read or written at run time, and
# every listening socket is on 127.0.0.1. Tested on Debian 12 with slurm-wlm 22.05.8, as root and not.
set -euo pipefail
PAIRS=6 CPUS=32 GPUS=2
NODES=$((2 * PAIRS))
POLICY=${POLICY:-/usr/sbin/policy-rc.d}
PATH=$PATH:/usr/sbin:/sbin # munged, slurmctld and slurmd live there

die() { echo "cluster.sh: $*" >&2; exit 1; }

# In a container whose PID 1 does not reap, a daemon that has ended stays visible to kill -0 for ever.
alive() { [ -r "/proc/$1/stat" ] && [[ $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) != Z* ]]; }
# Guard against a reused PID: the process must be the program we think it is.
is_prog() { alive "$1" && [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ]; }

install_packages() {
  local p missing=()
  command -v apt-get >/dev/null || die "needs Debian's package manager"
  for p in slurmctld slurmd slurm-client munge; do
    [ "$(dpkg-query -Wf '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
  done
  [ ${#missing[@]} = 0 ] && return
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || die "needs root to install ${missing[*]}"
    exec sudo -n bash "$0" install
  fi
  # Keep the packages' init scripts from starting daemons; many container images have this already.
  if [ ! -e "$POLICY" ]; then
    trap 'rm -f "$POLICY"' EXIT # also where apt-get fails
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

free_ports() { # so many distinct free ports, so that two clusters can share a machine
  python3 - "$1" <<'PY'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PY
}

write_conf() {
  local d=$1 me ports i
  me=$(id -un)
  read -ra ports <<<"$(free_ports $((NODES + 1)))"
  cat >"$d/slurm.conf" <<CONF
ClusterName=tiny
# The literal name localhost is accepted on any machine, whatever its hostname is.
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${ports[0]}
# Without these two options both daemons (and srun) listen on 0.0.0.0.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# Same user for both: no chown of state directories, and a slurmd that is not root is possible.
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# socket=: our munged. cred_expire: also the pause before a requeued job may start again (default 120; less than 5 counts as 120).
AuthInfo=socket=$d/munge/sock,cred_expire=5
StateSaveLocation=$d/ctld
SlurmdSpoolDir=$d/spool.%n
SlurmctldPidFile=$d/run/slurmctld.pid
SlurmdPidFile=$d/run/slurmd.%n.pid
SlurmctldLogFile=$d/log/slurmctld.log
SlurmdLogFile=$d/log/slurmd.%n.log
# pgid needs no cgroup and still kills the orphans of a dead task. linuxproc follows parent links, so a
# rank whose parent died would outlive its job; cgroup behaves like pgid and works where cgroups do.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
# cons_tres is what understands --gpus-per-node.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# SLURM's defaults start a waiting job after up to 60 s; these make it about 1 s.
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# At a preemption also send the job's own --signal, at once.
SlurmctldParameters=preempt_send_user_signal
# Seconds between SIGTERM and SIGKILL, and until a silent node counts as down (defaults 30, 300).
KillWait=25
SlurmdTimeout=20
MinJobAge=3600
JobRequeue=1
ReturnToService=2
# Believe CPUs= and RealMemory= below, so that each virtual node may claim all of this machine and more.
SlurmdParameters=config_overrides
GresTypes=gpu
$(for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.0.1 Port=${ports[i]} CPUs=$CPUS RealMemory=4000 Gres=gpu:$GPUS State=UNKNOWN"
  done)
$(for ((i = 1; i <= PAIRS; i++)); do
    nodes="Nodes=n[$((2 * i - 1))-$((2 * i))] MaxTime=60 State=UP"
    # In the second pair whole runs queue up: side by side they would take too much memory.
    echo "PartitionName=p$i $nodes PriorityTier=1 GraceTime=120" \
      "$([ $i != 1 ] || echo Default=YES) $([ $i != 2 ] || echo MaxCPUsPerNode=2)"
    echo "PartitionName=cancel$i $nodes PriorityTier=1 PreemptMode=CANCEL $([ $i != 6 ] || echo GraceTime=60)"
    echo "PartitionName=urgent$i $nodes PriorityTier=10 PreemptMode=OFF"
  done)
CONF
  # slurmd loads a cgroup plugin even when nothing uses cgroups, and the default (autodetect) makes it
  # exit where /sys/fs/cgroup is not mounted.
  echo 'CgroupPlugin=cgroup/v1' >"$d/cgroup.conf"
  # A gpu without File= counts as 0; File= must be a character device, and each is one GPU. Links to
  # /dev/null qualify, and their trailing digit is the CUDA index.
  for ((i = 0; i < GPUS; i++)); do ln -sf /dev/null "$d/dev/gpu$i"; done
  printf 'AutoDetect=off\nNodeName=n[1-%d] Name=gpu File=%s\n' "$NODES" "$d/dev/gpu[0-$((GPUS - 1))]" >"$d/gres.conf"
}

start() {
  local d=$1 i f
  # The unix sockets in here (munge's, one for each job step) must stay under 108 characters.
  [ ${#d} -le 60 ] || die "path too long for unix sockets: $d"
  mkdir -p "$d"/{munge,ctld,run,log,dev}
  for ((i = 1; i <= NODES; i++)); do mkdir -p "$d/spool.n$i"; done
  chmod 755 "$d" "$d/munge" # munged insists that all can reach its socket
  (umask 077; head -c 128 /dev/urandom >"$d/munge/key")
  write_conf "$d"
  export SLURM_CONF=$d/slurm.conf
  # All of them go to the background by themselves and close the caller's pipes.
  munged --key-file="$d/munge/key" --socket="$d/munge/sock" --pid-file="$d/run/munged.pid" \
    --log-file="$d/log/munged.log" --seed-file="$d/munge/seed"
  slurmctld
  for ((i = 1; i <= NODES; i++)); do slurmd -N "n$i"; done
  # Daemons return 0 before their last checks, and a client of a dead controller retries for long.
  for ((i = 0; i < 600; i++)); do
    [ "$(timeout 10 sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" != "$NODES" ] || return 0
    sleep 0.2
  done
  for f in "$d"/log/*.log; do
    echo "== $f"
    tail -n 12 "$f"
  done >&2
  stop "$d"
  die "nodes did not come up"
}

stop_one() { # PIDFILE, named for its program: slurmd.n1.pid
  [ -e "$1" ] || return 0
  local p e i
  p=$(<"$1")
  e=$(basename "$1")
  e=${e%%.*}
  is_prog "$p" "$e" || return 0
  kill "$p" 2>/dev/null || return 0
  for ((i = 0; i < 100; i++)); do
    is_prog "$p" "$e" || return 0
    sleep 0.1
  done
  kill -9 "$p"
}

stop() {
  local d=$1 p f i e
  export SLURM_CONF=$d/slurm.conf
  if timeout 20 scontrol ping 2>/dev/null | grep -q UP; then
    timeout 10 scancel --user="$(id -un)" || true
    for ((i = 0; i < 150; i++)); do
      [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
      sleep 0.2
    done
  fi
  for f in "$d"/run/slurmd.*.pid "$d"/run/slurmctld.pid; do stop_one "$f"; done
  stop_one "$d/run/munged.pid" # last: the others authenticate their goodbyes with it
  # What a job may have left: slurmstepd, or a process that carries our SLURM_CONF and a job's number.
  for p in /proc/[0-9]*; do
    p=${p#/proc/}
    [ "$p" != $$ ] || continue
    e=$(tr '\0' '\n' 2>/dev/null <"/proc/$p/environ") || continue
    grep -qxF "SLURM_CONF=$d/slurm.conf" <<<"$e" || continue
    if grep -q '^SLURM_JOB_ID=' <<<"$e" || [[ $(tr '\0' ' ' <"/proc/$p/cmdline") == slurmstepd* ]]; then
      echo "left over: $p" >&2
      kill -9 "$p" || true
    fi
  done
}

case ${1:-} in
  install) install_packages ;;
  start) start "$2" ;;
  node) SLURM_CONF=$2/slurm.conf slurmd -N "$3" ;;
  stop) stop "$2" ;;
  *)
    sed -n '2,/^set/s/^# \?//p' "$0"
    exit 2
    ;;
esac
