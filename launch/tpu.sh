#!/usr/bin/env bash
# Trainings on Cloud TPU slices, over queued resources: `launch/tpu.sh help` says how.
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/tpu.sh COMMAND NAME [options] [-- flags of python -m ltx2_jax.train]

  up       ask for the slice, wait for it, put this commit and its packages on every host
  train    start the training on every host; it goes on when this terminal closes
  tail     the log of a host, as it grows (--host=3; default: host 0)
  status   the slice, and how far the training is
  stacks   where every host is at this moment: its Python stacks
  stop     stop together and save; returns when it is saved
  down     give the slice back; its disks go with it
  run      all of it until the training is done: a slice that was preempted is asked for again, a
           training that lost a host is started again, and both go on from the newest checkpoint

options
  --zone=ZONE        such as us-east5-a (or the environment variable ZONE)
  --project=PROJECT  default: that of gcloud
  --type=TYPE        accelerator type, such as v5p-128 (up, run)
  --runtime=VERSION  of the hosts' system; default: the one for TYPE (up, run)
  --spot             cheaper, and may be preempted (up, run)
  --slices=N         so many slices of TYPE, as one training (up, run)
  --host=N           whose log (tail)
  --keep             do not give the slice back when the training is done (run)
  --dry-run          print the commands in place of running them

example
  launch/tpu.sh run my-run --type=v5p-128 --zone=us-east5-a --spot -- \
      --config=configs/ltx2_19b.py --config.workdir=gs://my-bucket/my-run --config.data.path=gs://...

A workdir in a bucket outlives the slice. Exit codes of a training: 0 done, 2 a mistake to fix,
3 diverged, 42 a host was lost, 143 stopped and saved; `run` starts again after 42 and what is above
127, and ends with any other code.
TEXT
}

say() { echo "tpu.sh: $*" >&2; }
fail() {
    say "error: $*"
    exit 2
}

# ------------------------------------------------------------------------------------- arguments

readonly FOLDER=ltx2_jax_run # on the hosts, in the home folder
POLL=${LTX2_POLL_SECONDS:-20}
zone=${ZONE:-} project="" type="" runtime="" spot="" slices=1 host=0 keep="" dry=""
flags=()

command=${1:-help}
case $command in
    up | train | tail | status | stacks | stop | down | run) ;;
    help | --help | -h)
        usage
        exit 0
        ;;
    *) fail "unknown command '$command': up, train, tail, status, stacks, stop, down or run" ;;
esac
shift
name=${1:-}
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME '$name': a name of small letters, digits and dashes comes after $command"
shift
while (($#)); do
    case $1 in
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --spot) spot=yes ;;
        --slices=*) slices=${1#*=} ;;
        --host=*) host=${1#*=} ;;
        --keep) keep=yes ;;
        --dry-run) dry=yes ;;
        --)
            shift
            flags=("$@")
            break
            ;;
        *) fail "unknown option '$1'; flags of the training come after --" ;;
    esac
    shift
done
[[ -n $zone ]] || fail "--zone=ZONE is missing, such as --zone=us-east5-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a whole number above 0"
[[ $host =~ ^[0-9]+$ ]] || fail "--host=$host is not the number of a host"
case $command in
    up | run) [[ -n $type ]] || fail "--type=TYPE is missing, such as --type=v5p-128" ;;
esac
case $command in
    train | run) ((${#flags[@]})) || fail "the flags of the training come after --, such as -- --config=configs/ltx2_19b.py" ;;
    *) ((!${#flags[@]})) || fail "$command takes no flags of the training" ;;
esac
# tpu7x is sold over GKE alone: launch/jobset.py.
if [[ -n $type && -z $runtime ]]; then
    case $type in
        v4-*) runtime=tpu-ubuntu2204-base ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) fail "--type=$type: no runtime is known for it; give --runtime=VERSION" ;;
    esac
fi
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")

# ---------------------------------------------------------------------------------------- gcloud

gc() {
    if [[ -n $dry ]]; then
        printf '%q ' gcloud "$@"
        echo
    else
        gcloud "$@"
    fi
}

queue() { gc compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

state() { gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo NONE; }

# The nodes of the request: one a slice.
nodes() {
    if ((slices == 1)); then
        echo "$name"
    else
        seq -f "$name-%.0f" 0 $((slices - 1))
    fi
}

# How many slices a request has that was made before.
count_slices() {
    [[ -z $dry ]] || return 0
    local count
    count=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        --format='value(tpu.nodeSpec[0].multisliceParams.nodeCount)' 2>/dev/null || true)
    slices=${count:-1}
}

# on WORKER NODE COMMAND: runs it on one host of a slice, or on all.
on() { gc compute tpus tpu-vm ssh "$2" "${where[@]}" --worker="$1" --command="$3"; }

everywhere() {
    local node
    for node in $(nodes); do on all "$node" "$1"; done
}

# -------------------------------------------------------------------------------------- commands

ask() {
    local options=(--accelerator-type="$type" --runtime-version="$runtime")
    if ((slices == 1)); then
        options+=(--node-id="$name")
    else
        options+=(--node-count="$slices" --node-prefix="$name")
    fi
    [[ -z $spot ]] || options+=(--spot)
    queue create "${options[@]}"
}

wait_for_slice() {
    [[ -z $dry ]] || return 0
    local now before=""
    while true; do
        now=$(state)
        [[ $now == "$before" ]] || say "$name is $now"
        before=$now
        case $now in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED | NONE) return 1 ;;
        esac
        sleep "$POLL"
    done
}

install() {
    local source folder=. node
    source=$(dirname "${BASH_SOURCE[0]}")/..
    if [[ -z $dry ]]; then
        git -C "$source" diff --quiet HEAD -- || say "changes that are not committed stay here: the hosts get the last commit"
        folder=$(mktemp -d)
        git -C "$source" archive --format=tar.gz --output="$folder/ltx2_jax.tar.gz" HEAD
    fi
    for node in $(nodes); do
        gc compute tpus tpu-vm scp "$folder/ltx2_jax.tar.gz" "$node:ltx2_jax.tar.gz" "${where[@]}" --worker=all
    done
    [[ -n $dry ]] || rm -r "$folder"
    # The system's own Python may be older than the oldest that JAX supports.
    everywhere "set -e
        rm -rf $FOLDER/src && mkdir -p $FOLDER/src && tar -xzf ltx2_jax.tar.gz -C $FOLDER/src
        cd $FOLDER
        python=\$(command -v python3.12 || command -v python3.11 || true)
        if [ -z \"\$python\" ]; then
            sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv
            python=python3.11
        fi
        [ -d venv ] || \$python -m venv venv
        venv/bin/pip install --quiet -e 'src[tpu,gcs]'"
}

up() {
    local now=NONE
    [[ -n $dry ]] || now=$(state)
    case $now in
        FAILED | SUSPENDING | SUSPENDED) down ;&
        NONE) ask ;;
    esac
    wait_for_slice || fail "$name was not given out: it is $(state)"
    install
}

train() {
    local quoted flag workdir=""
    quoted=$(printf '%q ' "${flags[@]}")
    for flag in "${flags[@]}"; do [[ $flag != --config.workdir=* ]] || workdir=${flag#*=}; done
    [[ -n $workdir ]] || say "no --config.workdir=... is given: a bucket (gs://...) outlives the slice, a host's disk does not"
    # The training leads a session of its own, so that it outlives the connection; what it ends with
    # is left in a file. JAX finds the other hosts by itself.
    everywhere "cd $FOLDER
        if [ -f pid ] && [ ! -f exit ] && kill -0 \$(cat pid) 2>/dev/null; then
            echo 'a training runs here already' >&2; exit 2
        fi
        rm -f exit pid
        printf '%s' $(printf '%q' "$workdir") > workdir
        cat > job.sh <<'JOB'
cd src
../venv/bin/python -m ltx2_jax.train $quoted &
echo \$! > ../pid
wait \$!
echo \$? > ../exit.part && mv ../exit.part ../exit
JOB
        nohup setsid bash job.sh >> log 2>&1 < /dev/null &"
    [[ -n $dry ]] || say "$name trains; launch/tpu.sh tail $name --zone=$zone shows how"
}

# Exit codes of all hosts, "running" for one that has none yet.
codes() { everywhere "cat $FOLDER/exit 2>/dev/null || { kill -0 \$(cat $FOLDER/pid) 2>/dev/null && echo running; } || cat $FOLDER/exit 2>/dev/null || echo gone" 2>/dev/null; }

# The code that all hosts together ended with; "lost" if the slice went.
outcome() {
    local found patience=0
    while true; do
        sleep "$POLL"
        [[ $(state) == ACTIVE ]] || { echo lost; return; }
        found=$(codes) || continue # the slice may be going just now
        if ! grep -q running <<<"$found"; then
            # Mistakes and a run that diverged come before what the other hosts made of them.
            for code in 2 3 130; do
                if grep -qx "$code" <<<"$found"; then echo "$code"; return; fi
            done
            if [[ $(sort -u <<<"$found") == 0 ]]; then echo 0; return; fi
            # A host that was ended does not know why; one that ended by itself does.
            found=$(grep -vxE '0|137|gone' <<<"$found" || echo 137)
            head -n 1 <<<"$found"
            return
        elif grep -qv running <<<"$found" && ((++patience > 10)); then
            say "some hosts ended and others go on: they are ended"
            everywhere "kill -9 \$(cat $FOLDER/pid) 2>/dev/null || true"
        fi
    done
}

run() {
    local code
    while true; do
        set +e # a slice may go at any moment, also before the training runs on it
        (
            set -e
            up
            train
        )
        code=$?
        set -e
        [[ -z $dry ]] || return "$code"
        if ((code)); then
            case $(state) in
                SUSPENDING | SUSPENDED) say "$name was preempted; it is asked for again" ;;
                *) return "$code" ;;
            esac
            continue
        fi
        code=$(outcome)
        case $code in
            0)
                say "$name is done"
                [[ -n $keep ]] || down
                return 0
                ;;
            lost) say "$name was preempted; it is asked for again" ;;
            42 | 1[3-9]? | 12[89] | 2??) say "the training ended with $code and is started again" ;;
            *)
                say "the training ended with $code; see launch/tpu.sh tail $name"
                return "$code"
                ;;
        esac
    done
}

stop() {
    on 0 "$(nodes | head -n 1)" "cd $FOLDER
        kill -TERM \$(cat pid) || exit 1
        while [ ! -f exit ]; do sleep 1; done
        tail -n 3 log"
}

status() {
    queue describe --format='value(state.state)'
    on 0 "$(nodes | head -n 1)" "cd $FOLDER/src
        [ -s ../workdir ] || { echo 'the training was not given a --config.workdir' >&2; exit 2; }
        ../venv/bin/python -m ltx2_jax.train --status \"\$(cat ../workdir)\""
}

stacks() {
    # Of all hosts at one moment; the training answers the signal in its log.
    everywhere "cd $FOLDER; wc -l < log > seen; kill -USR1 \$(cat pid)"
    [[ -n $dry ]] || sleep 2
    everywhere "cd $FOLDER; echo \"== \$(hostname)\"; tail -n +\$((\$(cat seen) + 1)) log"
}

follow() {
    on "$host" "$(nodes | head -n 1)" "tail -n 50 -f $FOLDER/log"
}

down() { queue delete --force --quiet; }

[[ -n $dry ]] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
case $command in
    up | run) ;;
    *) count_slices ;;
esac
case $command in
    tail) follow ;;
    *) "$command" ;;
esac
