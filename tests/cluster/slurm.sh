#!/usr/bin/env bash
# A Slurm of two nodes on this machine, for trials: several slurmd on loopback, no accounting server.
#
#     tests/cluster/slurm.sh start FOLDER     as root, in a container; FOLDER holds its state and logs
#     export SLURM_CONF=FOLDER/slurm.conf     then sinfo, sbatch, srun, scancel find it
#     tests/cluster/slurm.sh stop FOLDER
#
# Installs Debian's slurm-wlm and munge where they are missing. `sacct -c` reads ended jobs.
set -euo pipefail
action=$1 folder=$(realpath -m "$2")

start() {
  command -v slurmctld munged >/dev/null || {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurm-wlm munge
  }
  mkdir -p "$folder"/{state,n1,n2} /run/munge /etc/munge /var/log/munge
  [ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
  chown -R munge: /run/munge /etc/munge /var/log/munge
  chmod 600 /etc/munge/munge.key
  chmod 755 /run/munge
  pgrep -x munged >/dev/null || runuser -u munge -- munged
  getent hosts n2 >/dev/null || echo "127.0.0.1 n1 n2" >>/etc/hosts # where ranks look for each other
  cat >"$folder/slurm.conf" <<END
ClusterName=trial
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/%n
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/ended.txt
SchedulerParameters=sched_min_interval=0,bf_interval=5
KillWait=10
AuthInfo=cred_expire=5
OverTimeLimit=0
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld
  for node in n1 n2; do slurmd -N "$node"; done
  for _ in $(seq 60); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && sinfo && return
    sleep 0.5
  done
  tail -n 20 "$folder"/*.log >&2
  exit 1
}

stop() {
  for node in n1 n2 slurmctld; do
    [ -s "$folder/$node.pid" ] && kill "$(cat "$folder/$node.pid")" || true
  done
}

"$action"
