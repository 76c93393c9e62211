#!/usr/bin/env bash
# A Slurm cluster of one node, this machine, on loopback: for Lethe's tests and for trying sweeps out. Debian, as root.
#
#   slurm-single-node.sh start [--no-accounting]   install what is missing, start what is not running, wait until jobs can run
#   slurm-single-node.sh stop                      cancel every job, stop everything that start has started
#   slurm-single-node.sh status                    one line; exit code 0: jobs can run
#
# start and stop may be repeated. After a daemon has died (kill -9, say) start brings back that one alone; jobs are kept.
# start exits with 3 where the packages cannot be had, or where the machine belongs to a cluster already.
# Partitions: `batch` (the default), whose jobs have 10 s to save when a job in `urgent` needs their place, and are then requeued.
# Accounting (sacct) is slurmdbd with a MariaDB of its own; with --no-accounting, or LETHE_SLURM_ACCOUNTING=no, there is none.
# Everything lies under $LETHE_SLURM_DIR (/var/lib/lethe-slurm): configuration, state, *.log, *.pid; the one thing outside is
# the link /etc/slurm/slurm.conf, which is how sbatch and the others find the cluster.
set -euo pipefail

DIR=${LETHE_SLURM_DIR:-/var/lib/lethe-slurm}
ACCOUNTING=${LETHE_SLURM_ACCOUNTING:-yes}
CONF=/etc/slurm/slurm.conf
HOST=$(hostname -s)
DB_PORT=16819
SECONDS_TO_START=60
DAEMONS="munged mariadbd slurmdbd slurmctld slurmd"  # in the order of their start

die() {
  echo "slurm-single-node: $*" >&2
  exit 1
}

# impossible WORDS...: not on this machine, whatever one does; exit code 3.
impossible() {
  echo "slurm-single-node: $*" >&2
  exit 3
}

# failed DAEMON: says that it did not start, with the last lines of its log.
failed() {
  echo "slurm-single-node: $1 did not start; the end of $DIR/$1.log:" >&2
  tail -n 20 "$DIR/$1.log" >&2 || true
  exit 1
}

# alive DAEMON: the process in its pid file is that daemon, and no zombie.
alive() {
  local pid
  pid=$(cat "$DIR/$1.pid" 2>/dev/null) && [ -n "$pid" ] &&
    grep -qx "Name:.$1" "/proc/$pid/status" 2>/dev/null && grep -q "^State:.[^ZX]" "/proc/$pid/status"
}

# eventually SECONDS COMMAND...: until the command succeeds; fails when it has not by then.
eventually() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.2
  done
}

install_packages() {
  local packages="slurm-wlm munge" missing=""
  [ "$ACCOUNTING" = no ] || packages="$packages slurmdbd mariadb-server"
  for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
  done
  [ -n "$missing" ] || return 0
  command -v apt-get >/dev/null || impossible "$missing missing, and there is no apt-get to install it with"
  # RUNLEVEL=1: Debian's packages do not start their services on installation.
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  # shellcheck disable=SC2086  # a list of packages
  set -- apt-get install -y -qq --no-install-recommends $missing
  "$@" >/dev/null 2>&1 || { apt-get update -qq && "$@" >/dev/null; } || impossible "apt-get cannot install$missing"
}

configure() {
  local cpus memory storage
  cpus=$(nproc)
  [ "$cpus" -ge 2 ] || cpus=2  # two jobs side by side even on one core (config_overrides)
  memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.95)}' /proc/meminfo)
  storage="AccountingStorageType=accounting_storage/none"
  if [ "$ACCOUNTING" != no ]; then
    storage="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass=$DIR/munge/socket"
    [ -f "$DIR/db-password" ] || (umask 077 && head -c 18 /dev/urandom | base64 | tr '+/' 'xy' >"$DIR/db-password")
    (umask 077 && cat >"$DIR/slurmdbd.conf" <<END)
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
SlurmUser=root
LogFile=$DIR/slurmdbd.log
PidFile=$DIR/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DB_PORT
StorageUser=slurm
StoragePass=$(cat "$DIR/db-password")
StorageLoc=slurm_acct_db
END
  fi
  # cred_expire: a requeued job may start again after that many seconds (the default is 120; 5 is the least).
  # AccountingStoragePass is munge's socket. BatchStartTimeout: a job that a node has lost is missed 11 s after its start.
  cat >"$DIR/slurm.conf" <<END
ClusterName=lethe
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
$storage
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
BatchStartTimeout=1
MinJobAge=300
SlurmdTimeout=30
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdPidFile=$DIR/slurmd.pid
SlurmdLogFile=$DIR/slurmd.log
SlurmdSpoolDir=$DIR/spool
StateSaveLocation=$DIR/state
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=batch Nodes=$HOST Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=$HOST MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
  mkdir -p /etc/slurm
  ln -sfn "$DIR/slurm.conf" "$CONF"
}

start_munged() {
  [ -f "$DIR/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/key")
  munged --key-file "$DIR/munge/key" --socket "$DIR/munge/socket" --pid-file "$DIR/munged.pid" \
    --log-file "$DIR/munged.log" --seed-file "$DIR/munge/seed" --force
}

start_mariadbd() {
  if [ ! -d "$DIR/mariadb/mysql" ]; then
    mkdir -p "$DIR/mariadb"
    chown mysql: "$DIR/mariadb"
    mariadb-install-db --no-defaults --user=mysql --datadir="$DIR/mariadb" --skip-test-db >"$DIR/mariadbd.log" 2>&1
  fi
  cat >"$DIR/db-init.sql" <<END
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE OR REPLACE USER slurm@127.0.0.1 IDENTIFIED BY '$(cat "$DIR/db-password")';
GRANT ALL ON slurm_acct_db.* TO slurm@127.0.0.1;
END
  chown mysql: "$DIR/db-init.sql"
  chmod 600 "$DIR/db-init.sql"
  setsid mariadbd --no-defaults --user=mysql --datadir="$DIR/mariadb" --bind-address=127.0.0.1 --port=$DB_PORT \
    --socket="$DIR/mariadb/socket" --pid-file="$DIR/mariadb/pid" --init-file="$DIR/db-init.sql" \
    --skip-name-resolve --innodb-flush-log-at-trx-commit=2 --innodb-lock-wait-timeout=900 \
    >>"$DIR/mariadbd.log" 2>&1 </dev/null &
  echo $! >"$DIR/mariadbd.pid"
}

start_slurmdbd() {
  SLURM_CONF=$DIR/slurm.conf slurmdbd
}

start_slurmctld() {
  slurmctld -f "$DIR/slurm.conf"
}

start_slurmd() {
  slurmd -f "$DIR/slurm.conf"
}

# answers DAEMON: it is alive and does its work.
answers() {
  alive "$1" || return 1
  case $1 in
    munged) munge -S "$DIR/munge/socket" -n ;;
    mariadbd) mariadb --no-defaults -h 127.0.0.1 -P $DB_PORT -u slurm -p"$(cat "$DIR/db-password")" -e "USE slurm_acct_db" ;;
    slurmdbd) sacctmgr -n show cluster ;;
    slurmctld) scontrol ping | grep -q UP ;;
    slurmd) sinfo -h -o %T | grep -qxE 'idle|mixed|allocated' ;;
  esac
}

wanted() {
  for daemon in $DAEMONS; do
    case $daemon in
      mariadbd | slurmdbd) [ "$ACCOUNTING" = no ] || echo "$daemon" ;;
      *) echo "$daemon" ;;
    esac
  done
}

start() {
  local was
  [ "$(id -u)" = 0 ] || die "needs root"
  if [ -e "$CONF" ] && [ "$(readlink "$CONF")" != "$DIR/slurm.conf" ]; then
    impossible "$CONF is there already, and not from here: this machine belongs to a cluster"
  fi
  if alive slurmctld; then
    was=$(grep -q accounting_storage/none "$DIR/slurm.conf" && echo no || echo yes)
    [ "$was" = "$ACCOUNTING" ] || die "is running with accounting: $was; stop it first"
  fi
  install_packages
  mkdir -p "$DIR/munge" "$DIR/spool" "$DIR/state"
  chmod 755 "$DIR" "$DIR/munge"
  alive slurmctld || configure
  for daemon in $(wanted); do
    alive "$daemon" || "start_$daemon" || failed "$daemon"
    eventually $SECONDS_TO_START answers "$daemon" || failed "$daemon"
    # Accounting must know the cluster before slurmctld registers with it.
    [ "$daemon" != slurmdbd ] || sacctmgr -i add cluster lethe >/dev/null 2>&1 || true
  done
  status
}

stop() {
  local pids="" daemon pid
  [ "$(id -u)" = 0 ] || die "needs root"
  if alive slurmctld; then
    squeue -h -o %A | sort -u | xargs -r scancel 2>/dev/null || true
    eventually 15 no_jobs || true
  fi
  if alive slurmd; then  # what a job has left behind
    pids=$(scontrol listpids 2>/dev/null | awk 'NR > 1 && $1 > 0 {print $1}') || true
    # shellcheck disable=SC2086  # a list of process ids
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
  fi
  for daemon in $(echo "$DAEMONS" | tr ' ' '\n' | tac); do
    alive "$daemon" || continue
    pid=$(cat "$DIR/$daemon.pid")
    kill "$pid"
    eventually 20 gone "$daemon" || kill -KILL "$pid" || true
    rm -f "$DIR/$daemon.pid"
  done
  [ "$(readlink "$CONF")" != "$DIR/slurm.conf" ] || rm "$CONF"
  echo "slurm-single-node: stopped"
}

gone() {
  ! alive "$1"
}

no_jobs() {
  [ -z "$(squeue -h)" ]
}

status() {
  local accounting=none
  if ! answers slurmctld >/dev/null 2>&1 || ! answers slurmd >/dev/null 2>&1; then
    echo "slurm-single-node: not running"
    return 1
  fi
  if alive slurmdbd; then
    sacct -n >/dev/null 2>&1 && accounting=slurmdbd || accounting="slurmdbd, which does not answer"
  fi
  echo "slurm-single-node: $HOST $(sinfo -h -p batch -o '%T, %c CPUs, %m MB'); accounting: $accounting; under $DIR"
}

command=${1:-}
[ "${2:-}" != --no-accounting ] || ACCOUNTING=no
[ $# -le 2 ] && [ -z "${2:-}" ] || [ "${2:-}" = --no-accounting ] || command=usage
case $command in
  start | stop | status) "$command" ;;
  *) die "usage: $0 start [--no-accounting] | stop | status" ;;
esac
