#!/usr/bin/env bash
# A real Slurm of one machine, for tests: controller, nodes and, if wanted, accounting.
#
#   slurm.sh start FOLDER [accounting]   as root on Debian or Ubuntu; installs what is missing with apt-get
#   slurm.sh stop FOLDER                 stops all of it; the packages stay installed
#
# FOLDER is made and holds configuration, state and logs. /etc/slurm/slurm.conf becomes a link into it (not only
# $SLURM_CONF, which the executor does not hand on to the `srun` in a job); one that is there already is refused,
# unless it is of a cluster made here whose owner, process $OWNER or else the caller, ended without stopping it.
# Ports are free ones, munge and MariaDB its own.
#
# Tried with Slurm 22.05 of Debian 12: proctrack/pgid, task/none and no cgroup plugin, so that it also runs in
# containers; memory is tracked in scheduling and, by jobacct_gather/linux with OverMemoryKill, enforced.
# Two nodes share the machine, each with four cores, as it says, and a GPU that is /dev/null.
set -Eeuo pipefail
trap 'echo "slurm.sh: line $LINENO: \"$BASH_COMMAND\" failed" >&2' ERR

die() {
    echo "slurm.sh: $*" >&2
    exit 1
}

install_packages() {
    [ "$(id -u)" = 0 ] || die "expected to be root, found user $(id -un)"
    command -v apt-get >/dev/null || die "expected Debian or Ubuntu, found no apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@" >"$folder/log/apt.log" 2>&1 ||
        die "apt-get could not install $*: $(tail -n 1 "$folder/log/apt.log")"
}

need() { # COMMAND PACKAGE...
    command -v "$1" >/dev/null || install_packages "${@:2}"
}

free_ports() { # NUMBER: so many ports of 127.0.0.1 that nobody listens on
    python3 -c '
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(one.getsockname()[1] for one in held))' "$1"
}

await() { # WHAT COMMAND...: until the command succeeds, half a minute at most
    local what=$1
    shift
    for _ in $(seq 150); do
        timeout --kill-after=1 10 "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    die "$what did not start; its log is in $folder/log"
}

start_munge() {
    mkdir -p "$services/munge"
    head -c 1024 /dev/urandom >"$services/munge/key"
    chmod 400 "$services/munge/key"
    chown -R munge: "$services/munge"
    runuser -u munge -- /usr/sbin/munged --key-file "$services/munge/key" --socket "$munge" \
        --pid-file "$services/munge/pid" --log-file "$services/munge/log" --seed-file "$services/munge/seed"
}

start_accounting() {
    local port=$1 database=$2
    mkdir -p "$services/mariadb"
    chown mysql: "$services/mariadb"
    mariadb-install-db --no-defaults --user=mysql --datadir="$services/mariadb" \
        --auth-root-authentication-method=normal >"$folder/log/mariadb-install.log" 2>&1
    mariadbd --no-defaults --user=mysql --datadir="$services/mariadb" --socket="$services/mariadb/socket" \
        --bind-address=127.0.0.1 --port="$database" --pid-file="$services/mariadb/pid" \
        --skip-name-resolve --innodb-buffer-pool-size=64M >"$folder/log/mariadb.log" 2>&1 &
    await mariadbd mariadb --no-defaults --socket="$services/mariadb/socket" -u root -e "
        create database slurm; create user slurm@'127.0.0.1'; grant all on slurm.* to slurm@'127.0.0.1'"
    cat >"$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$port
SlurmUser=root
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database
StorageUser=slurm
StorageLoc=slurm
CONF
    chmod 600 "$folder/slurmdbd.conf"
    ln -s "$folder/slurmdbd.conf" /etc/slurm/slurmdbd.conf
    slurmdbd
    await slurmdbd sacctmgr --immediate add cluster loopback
    sacctmgr --immediate add account atlas >/dev/null
    sacctmgr --immediate add user root account=atlas >/dev/null
}

clear_left_behind() { # stops what an interrupted user of this script left, else refuses
    local conf=/etc/slurm/slurm.conf left
    [ -e "$conf" ] || [ -L "$conf" ] || return 0
    left=$(dirname "$(readlink "$conf" || echo "$conf")")
    [ ! -d "$left" ] || [ -f "$left/owner" ] || die "$conf: expected none, found one; is Slurm in use here?"
    [ ! -f "$left/owner" ] || ! kill -0 "$(<"$left/owner")" 2>/dev/null ||
        die "$conf: in use by process $(<"$left/owner"); \"slurm.sh stop $left\" stops it"
    "$0" stop "$left"
}

start() {
    clear_left_behind
    mkdir -p "$folder"/{state,spool1,spool2,log}
    echo "${OWNER:-$PPID}" >"$folder/owner"
    need slurmctld slurm-wlm munge
    [ -z "$accounting" ] || need slurmdbd slurmdbd
    [ -z "$accounting" ] || need mariadbd mariadb-server
    local ports memory storage=accounting_storage/none
    read -ra ports <<<"$(free_ports 5)"
    memory=$(awk '/MemTotal/ {print int($2 / 1024 / 2)}' /proc/meminfo)
    [ -z "$accounting" ] || storage=accounting_storage/slurmdbd
    cat >"$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$munge
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=$storage
AccountingStorageHost=127.0.0.1
AccountingStoragePort=${ports[3]}
AccountingStoragePass=$munge
GresTypes=gpu
MinJobAge=600
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=2
NodeName=1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=4 RealMemory=$memory Gres=gpu:1
NodeName=2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=4 RealMemory=$memory Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    echo "Name=gpu File=/dev/null" >"$folder/gres.conf"
    ln -s "$folder/slurm.conf" "$folder/gres.conf" /etc/slurm/
    start_munge
    [ -z "$accounting" ] || start_accounting "${ports[3]}" "${ports[4]}"
    slurmctld
    slurmd -N 1
    slurmd -N 2
    await "Slurm" bash -c '[ "$(sinfo --noheader --Node --states idle | wc -l)" = 2 ]'
}

stop() {
    local file pid
    for file in "$folder"/slurmd[12].pid "$folder"/{slurmctld,slurmdbd}.pid "$services"/{mariadb,munge}/pid; do
        [ -s "$file" ] || continue
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -9 "$pid" 2>/dev/null || true
    done
    for file in /etc/slurm/{slurm,gres,slurmdbd}.conf; do
        [ "$(readlink "$file")" != "$folder/${file##*/}" ] || rm "$file"
    done
    rm -rf "$services"
}

[ $# -ge 2 ] || die "usage: slurm.sh start FOLDER [accounting] | slurm.sh stop FOLDER"
mkdir -p "$2"
folder=$(cd "$2" && pwd)
accounting=${3:-}
host=$(hostname -s)
# Not below FOLDER, which their users need not be able to enter.
services=/var/lib/sparsity-atlas-$(printf %s "$folder" | md5sum | head -c 8)
munge=$services/munge/socket
case $1 in
start | stop) "$1" ;;
*) die "expected start or stop, found $1" ;;
esac
