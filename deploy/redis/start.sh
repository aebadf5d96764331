#!/bin/sh
# Starts Redis with its password from REDIS_PASSWORD, kept off the command line. Further arguments go to redis-server.
# REDIS_CONF names the configuration file, REDIS_AUTH_FILE where the password line is written (a private folder).
# With ROUTER_PASSWORD and the rest of what users.sh reads, each part of the fleet is a user of its own, and REDIS_PASSWORD
# is good for health checks alone. REDIS_ACL_FILE, if set, is what users.sh printed elsewhere.
# REDIS_TLS_FOLDER, if set, has tls.crt, tls.key and ca.crt: the port then takes TLS only, with client certificates of
# that CA where REDIS_TLS_CLIENTS is yes.
set -eu
: "${REDIS_PASSWORD:?set REDIS_PASSWORD}"
case "$REDIS_PASSWORD" in
    *[!A-Za-z0-9._~-]*)
        echo "start.sh: REDIS_PASSWORD may hold letters, digits and . _ ~ - only: it becomes part of a URL" >&2
        exit 1
        ;;
esac
auth_file="${REDIS_AUTH_FILE:-/tmp/auth.conf}"
umask 077
if [ -n "${ROUTER_PASSWORD:-}" ]; then
    REDIS_ACL_FILE="$auth_file.users"
    DEFAULT_PASSWORD="$REDIS_PASSWORD" sh "$(dirname "$0")/users.sh" > "$REDIS_ACL_FILE"
fi
{
    cat "${REDIS_CONF:-/etc/pando-redis/redis.conf}"
    if [ -n "${REDIS_ACL_FILE:-}" ]; then echo "aclfile $REDIS_ACL_FILE"; else echo "requirepass $REDIS_PASSWORD"; fi
    if [ -n "${REDIS_TLS_FOLDER:-}" ]; then
        echo "port 0"
        echo "tls-port ${REDIS_PORT:-6379}"
        echo "tls-cert-file $REDIS_TLS_FOLDER/tls.crt"
        echo "tls-key-file $REDIS_TLS_FOLDER/tls.key"
        echo "tls-ca-cert-file $REDIS_TLS_FOLDER/ca.crt"
        echo "tls-auth-clients ${REDIS_TLS_CLIENTS:-optional}"
    fi
} > "$auth_file"
exec redis-server "$auth_file" "$@"
