#!/bin/sh
# Joins this container to a Ray cluster as a node that takes no work, then becomes the command given.
# A Ray driver such as `pando workers` needs a node beside it; the cluster's address is in RAY_HEAD as HOST:PORT.
set -eu
: "${RAY_HEAD:?set RAY_HEAD to HOST:PORT of the Ray head}"
ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0 --object-store-memory=78643200 \
    --dashboard-agent-listen-port=52365 --disable-usage-stats
exec "$@"
