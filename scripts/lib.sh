# shellcheck shell=bash
# Helpers for the scripts beside this file. Source it, do not run it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # used by those who source this
CACHE=$ROOT/.cache
PG_CONFIG_DEBIAN=/usr/lib/postgresql/15/bin/pg_config
# shellcheck disable=SC2034
# Unpacked by `scripts/setup pg18`. Its place does not depend on the version of Python.
PG_CONFIG_18=$CACHE/pg18/postgres/bin/pg_config
PG_CONFIG=${PG_CONFIG:-$PG_CONFIG_DEBIAN}
export PG_CONFIG
# pgrx builds against this one, without a `cargo pgrx init` and whatever the user's own pgrx folder says.
export PGRX_PG_CONFIG_PATH=$PG_CONFIG
unset RUSTFLAGS # pgrx breaks when it is set, even to nothing
unset RUST_BACKTRACE # or the server's errors have a backtrace for a detail
CLUSTER='' DATABASE='' MODEL_PID=''

say() { printf '\n== %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# As root, or through sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root, and there is no sudo: $*"
    fi
}

# Postgres refuses to run as root: then its programs run as the user `postgres`.
as_pg() {
    if [ "$(id -u)" = 0 ]; then
        (cd / && runuser -u postgres -- "$@")
    else
        "$@"
    fi
}

# Debian packages that are not installed yet, installed.
need_packages() {
    local missing=() name
    if ! command -v dpkg-query >/dev/null; then
        echo "not a Debian: make sure that you have what these packages hold: $*" >&2
        return
    fi
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
    done
    [ ${#missing[@]} = 0 ] && return
    say "installing Debian packages: ${missing[*]}"
    as_root apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}" </dev/null
}

# A TCP port of the loopback that is free now.
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Is this process alive, and one whose command line holds that word? (Process ids are used again.)
is_running() { [ -n "${1:-}" ] && tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -qF -- "$2"; }

# start_model MODEL PORT THREADS LOG: a model server in the background. Sets MODEL_PID.
start_model() {
    local tries=0
    : >"$4"
    setsid "$ROOT/scripts/model" serve "$1" "$2" "$3" </dev/null >>"$4" 2>&1 &
    MODEL_PID=$!
    until grep -q '^listening on ' "$4"; do
        tries=$((tries + 1))
        if ! kill -0 "$MODEL_PID" 2>/dev/null || [ "$tries" -gt 600 ]; then
            tail -n 20 "$4" >&2
            stop_model "$MODEL_PID"
            die "the model server did not start (what it said: $4)"
        fi
        sleep 0.1
    done
}

# stop_model PID: and wait until it is gone.
stop_model() {
    is_running "$1" serve || return 0
    kill "$1" 2>/dev/null || return 0
    for _ in $(seq 100); do
        is_running "$1" serve || return 0
        sleep 0.1
    done
    kill -9 "$1" 2>/dev/null || true
}

# The folder of psql, initdb and pg_ctl.
bin() { "$PG_CONFIG" --bindir; }

# start_cluster DATABASE [CONF]: a throwaway cluster with the extension preloaded, on a socket of its own; CONF are further
# lines of its configuration. Sets CLUSTER, its folder.
start_cluster() {
    DATABASE=$1
    CLUSTER=$(mktemp -d /tmp/pg_llm_batch.XXXXXX) # short, as socket paths must be, and in reach of the user postgres
    [ "$(id -u)" != 0 ] || chown postgres: "$CLUSTER"
    as_pg "$(bin)/initdb" -D "$CLUSTER/data" -U postgres --auth=trust --encoding=UTF8 --locale=C.UTF-8 --no-sync >/dev/null
    as_pg tee -a "$CLUSTER/data/postgresql.conf" >/dev/null <<CONF
shared_preload_libraries = 'pg_llm_batch'
listen_addresses = ''
unix_socket_directories = '$CLUSTER'
${2:-}
CONF
    if ! as_pg "$(bin)/pg_ctl" -D "$CLUSTER/data" -l "$CLUSTER/postgres.log" -w start >/dev/null; then
        tail -n 20 "$CLUSTER/postgres.log" >&2
        die "the cluster did not start"
    fi
    as_pg "$(bin)/createdb" -h "$CLUSTER" -U postgres "$DATABASE"
}

# stop_cluster FOLDER
stop_cluster() {
    [[ ${1:-} = /tmp/pg_llm_batch.* && -d $1 ]] || return 0
    local owner stop=("$(bin)/pg_ctl" -D "$1/data" -m fast stop)
    owner=$(stat -c %U "$1")
    if [ "$owner" = "$(id -un)" ]; then
        "${stop[@]}" >/dev/null 2>&1 || true
        rm -rf "$1"
    else
        (cd / && as_root runuser -u "$owner" -- "${stop[@]}") >/dev/null 2>&1 || true
        as_root rm -rf "$1"
    fi
}

# psql on that cluster.
sql() { "$(bin)/psql" -X -q -v ON_ERROR_STOP=1 -P pager=off -P footer=off -h "$CLUSTER" -U postgres -d "$DATABASE" "$@"; }
