#!/usr/bin/env bash
# A SLURM of one node on this machine, without systemd, as root; for tests.
#   one_host.sh start FOLDER     afterwards: export SLURM_CONF=FOLDER/slurm.conf
#   one_host.sh stop FOLDER
set -euo pipefail

stop() {
    for name in slurmd slurmctld munged; do
        if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
}

configure() {
    cat >"$folder/slurm.conf" <<CONF
ClusterName=onehost
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# No cgroups, no accounting, no MPI: nothing that needs more than two daemons.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=5
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
# Two processors, whatever the machine has: two tasks fit.
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
}

start() {
    mkdir -p "$folder"/{state,spool}
    chmod 711 "$folder"
    configure
    (umask 077 && head --bytes 128 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld -f "$folder/slurm.conf"
    slurmd -N localhost -f "$folder/slurm.conf"
    for _ in $(seq 30); do
        if SLURM_CONF="$folder/slurm.conf" sinfo --noheader --format=%t 2>/dev/null | grep -qE '^(idle|mix)'; then return; fi
        sleep 1
    done
    echo "SLURM did not start, see $folder/*.log" >&2
    return 1
}

case "${1:-}" in
start | stop)
    mkdir -p "$2"
    folder=$(cd "$2" && pwd)
    "$1"
    ;;
*)
    echo "usage: $0 start|stop FOLDER" >&2
    exit 2
    ;;
esac
