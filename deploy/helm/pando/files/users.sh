#!/bin/sh
# Prints the ACL file of a fleet: users.acl filled in. CLUSTER is the fleet's name; DEFAULT_PASSWORD, ROUTER_PASSWORD and
# WORKER_PASSWORDS, one "id=password" for each worker, are read from the environment, kept off the command line.
# In place of these, WORKER_PASSWORD is the one password of WORKERS workers: worker-0, worker-1 and so on.
set -eu
: "${CLUSTER:?}" "${DEFAULT_PASSWORD:?}" "${ROUTER_PASSWORD:?}"
template="${ACL_TEMPLATE:-$(dirname "$0")/users.acl}"

hash_of() { printf %s "$1" | sha256sum | cut -d ' ' -f 1; }

check() {
    case "$1" in
        *[!A-Za-z0-9._-]*) echo "users.sh: '$1' is no name of a cluster or worker" >&2; exit 1 ;;
    esac
}

check_password() {
    case "$2" in
        "" | *[!A-Za-z0-9._~-]*)
            echo "users.sh: $1 may hold letters, digits and . _ ~ - only: it becomes part of a URL" >&2
            exit 1
            ;;
    esac
}

check "$CLUSTER"
check_password ROUTER_PASSWORD "$ROUTER_PASSWORD"
if [ -z "${WORKER_PASSWORDS:-}" ]; then
    check_password WORKER_PASSWORD "${WORKER_PASSWORD:-}"
    WORKER_PASSWORDS=$(seq 0 "$((${WORKERS:?} - 1))" | sed "s/.*/worker-&=$WORKER_PASSWORD/")
fi
grep -E '^user (default|router) ' "$template" |
    sed "s/CLUSTER/$CLUSTER/g; s/DEFAULT_HASH/$(hash_of "$DEFAULT_PASSWORD")/; s/ROUTER_HASH/$(hash_of "$ROUTER_PASSWORD")/"
for pair in $WORKER_PASSWORDS; do
    check "${pair%%=*}"
    check_password WORKER_PASSWORDS "${pair#*=}"
    grep '^user WORKER ' "$template" |
        sed "s/WORKER_HASH/$(hash_of "${pair#*=}")/; s/CLUSTER/$CLUSTER/g; s/WORKER/${pair%%=*}/g"
done
