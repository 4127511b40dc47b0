#!/bin/sh
# label.sh for cron: one at a time, with a log and the last exit code of each date beside it:
#     nightly.sh /etc/batchq/tickets.env [DATE]      writes tickets-2026-11-21.log and .code into $BATCHQ_LOGS
# Run it as often as you like: a date goes on from where it stopped, and once it is complete that takes seconds. What 4, 5
# and 6 mean isn't mended by another try, so none is made until the .code file is removed. 75: another one is still at it.
set -eu
job=$(basename "$1" .env)
date=$(date -u -d "${2:-yesterday}" +%F)
. "$1"
log=$BATCHQ_LOGS/$job-$date
case $(cat "$log.code" 2>/dev/null) in 4 | 5 | 6) exit 0 ;; esac

exec 9>"$BATCHQ_LOGS/$job.lock"
flock --nonblock 9 || exit 75
code=0
"$(dirname "$0")/label.sh" "$1" "$date" >>"$log.log" 2>&1 9>&- || code=$?
echo "$(date -u +%FT%TZ) exit code $code" >>"$log.log"
echo "$code" >"$log.code"
exit "$code"
