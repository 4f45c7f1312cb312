#!/bin/sh
# A command on a Ray cluster: Ray takes a driver only from one of its nodes, so this container first becomes one, with
# no processor and no GPU to give.  RAY_HEAD is the head's HOST:PORT, RAY_NODE_OPTIONS what else `ray start` is told.
# It is tried twice: on a busy machine a node may need more than the 30 s that Ray gives it, and less the second time.
set -eu
join() { ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0 --disable-usage-stats ${RAY_NODE_OPTIONS:-} >/dev/null; }
join || join
exec "$@"
