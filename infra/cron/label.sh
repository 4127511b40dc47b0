#!/bin/sh
# Label one date's input: label.sh /etc/batchq/tickets.env [DATE]      DATE: yesterday in UTC unless it is given
# The settings' name is the job's, here job=tickets; example.env says what is in them. Ends as batchq does.
set -eu
job=$(basename "$1" .env)
date=$(date -u -d "${2:-yesterday}" +%F)
set -a # batchq is to see all of the settings
. "$1"
set +a
input=$(date -u -d "$date" +"$BATCHQ_INPUT")
output=$(date -u -d "$date" +"$BATCHQ_OUTPUT")
# Quoted: to Hydra a comma, a brace and more mean something else. BATCHQ_OPTIONS is meant to be split.
# shellcheck disable=SC2086
exec "$BATCHQ_PYTHON" -m batchq "job=$job" "input.path=\"$input\"" "output.path=\"$output\"" ${BATCHQ_OPTIONS:-}
