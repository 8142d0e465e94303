#!/bin/sh
# What a container of the solvus image runs, and any other process that is to be a node of a cluster:
#
#   entrypoint.sh head [RAY START OPTIONS]             the head node
#   entrypoint.sh worker HOST:PORT [RAY START OPTIONS] a worker node that joins the head
#   entrypoint.sh solvus ...                           the command line
#
# head and worker refuse to start without token authentication. Environment:
#   RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (a readable, non-empty file)
#   RAY_PORT            the head's port, 6379; never 10002-19999, where Ray's workers listen
#   RAY_DASHBOARD_HOST  where the dashboard and the job interface listen, 127.0.0.1
#   RAY_NODE_HOST       name or address under which the other nodes reach this one; found by Ray when left out
#   RAY_WAIT_S          how long a worker waits for the head, 300 seconds
#   SOLVUS_DRY_RUN=1    print the command line instead of becoming it
set -eu

usage=64 # EX_USAGE

fail() {
    echo "entrypoint: $1" >&2
    exit "$usage"
}

# Become the command, so that signals reach it. Quoted, a dry run can be pasted into a shell.
become() {
    if [ "${SOLVUS_DRY_RUN:-}" = 1 ]; then
        line=
        for word in "$@"; do
            case $word in
                '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
            esac
            line="$line${line:+ }$word"
        done
        printf '%s\n' "$line"
        exit 0
    fi
    exec "$@"
}

need_token() {
    [ "${RAY_AUTH_MODE:-}" = token ] ||
        fail "RAY_AUTH_MODE is '${RAY_AUTH_MODE:-}'; a Ray node runs any code it is sent, so it must be 'token'."
    if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
        token=$RAY_AUTH_TOKEN
    elif [ -n "${RAY_AUTH_TOKEN_PATH:-}" ]; then
        [ -r "$RAY_AUTH_TOKEN_PATH" ] || fail "RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH cannot be read."
        token=$(cat "$RAY_AUTH_TOKEN_PATH")
    else
        fail "no token. Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; make one with: openssl rand -hex 32"
    fi
    case $token in
        *REPLACE* | *replace* | *change*me*) fail "the token is still the placeholder. Make one with: openssl rand -hex 32" ;;
    esac
    [ "${#token}" -ge 32 ] || fail "the token has ${#token} characters, 32 is the least. Make one with: openssl rand -hex 32"
    unset token
}

# Options that would undo a check made here come from the environment only.
check_options() {
    for option in "$@"; do
        case $option in
            --port | --port=* | --address | --address=* | --head | --dashboard-host | --dashboard-host=* | \
                --node-ip-address | --node-ip-address=*)
                fail "$option is set from the environment: RAY_PORT, RAY_DASHBOARD_HOST, RAY_NODE_HOST." ;;
        esac
    done
}

node_ip() {
    [ -n "${RAY_NODE_HOST:-}" ] || return 0
    case $RAY_NODE_HOST in
        *[!0-9.]*) ip=$(getent ahostsv4 "$RAY_NODE_HOST" | awk 'NR == 1 { print $1 }') ;;
        *) ip=$RAY_NODE_HOST ;;
    esac
    [ -n "$ip" ] || fail "RAY_NODE_HOST=$RAY_NODE_HOST has no address."
    printf %s "--node-ip-address=$ip"
}

await_head() {
    [ "${SOLVUS_DRY_RUN:-}" != 1 ] || return 0
    trap 'exit 143' TERM
    trap 'exit 130' INT
    until ray health-check --address "$1" >/dev/null 2>&1; do
        waited=$((${waited:-0} + 1))
        if [ "$waited" -gt "${RAY_WAIT_S:-300}" ]; then
            echo "entrypoint: no head answered at $1 with this token within ${RAY_WAIT_S:-300} s." >&2
            exit 1
        fi
        sleep 1
    done
    trap - TERM INT
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}"

role=${1:-}
[ "$#" -eq 0 ] || shift
case $role in
    head)
        need_token
        check_options "$@"
        port=${RAY_PORT:-6379}
        case $port in
            '' | *[!0-9]*) fail "RAY_PORT must be a number, got '$port'." ;;
        esac
        if [ "$port" -ge 10002 ] && [ "$port" -le 19999 ]; then
            fail "RAY_PORT=$port lies in 10002-19999, where Ray's workers listen. Take 6379."
        fi
        ulimit -n 65536 2>/dev/null || true
        ip=$(node_ip)
        become ray start --head --block --disable-usage-stats "--port=$port" \
            "--dashboard-host=${RAY_DASHBOARD_HOST:-127.0.0.1}" --dashboard-port=8265 ${ip:+"$ip"} "$@"
        ;;
    worker)
        need_token
        address=${1:-}
        [ "$#" -eq 0 ] || shift
        case $address in
            ?*:?*) ;;
            *) fail "worker needs the head's HOST:PORT, got '$address'." ;;
        esac
        check_options "$@"
        ulimit -n 65536 2>/dev/null || true
        ip=$(node_ip)
        await_head "$address"
        become ray start "--address=$address" --block --disable-usage-stats ${ip:+"$ip"} "$@"
        ;;
    solvus) become solvus "$@" ;;
    *) fail "usage: entrypoint.sh head | worker HOST:PORT | solvus ...; got '$role'." ;;
esac
