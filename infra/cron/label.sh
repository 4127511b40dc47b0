#!/bin/sh
# Label one date's input: label.sh /etc/batchq/tickets.env [DATE]      DATE: yesterday in UTC unless it is given
# The settings' name is the job's, here job=tickets, whose paths have {date}; example.env says what is in them. Ends as
# batchq does.
set -eu
job=$(basename "$1" .env)
date=$(date -u -d "${2:-yesterday}" +%F)
set -a # batchq is to see all of the settings
. "$1"
set +a
# shellcheck disable=SC2086 # BATCHQ_OPTIONS is meant to be split
exec "$BATCHQ_PYTHON" -m batchq "job=$job" "input.date=$date" ${BATCHQ_OPTIONS:-}
