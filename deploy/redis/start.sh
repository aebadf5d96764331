#!/bin/sh
# Starts Redis with its password from REDIS_PASSWORD, kept off the command line. Further arguments go to redis-server.
# REDIS_CONF names the configuration file, REDIS_AUTH_FILE where the password line is written (a private folder).
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
{ cat "${REDIS_CONF:-/etc/pando-redis/redis.conf}"; echo "requirepass $REDIS_PASSWORD"; } > "$auth_file"
exec redis-server "$auth_file" "$@"
