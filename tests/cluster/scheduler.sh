#!/usr/bin/env bash
# Stands in for the commands of LSF, PBS and SGE: linked under their names, it runs jobs in the background.
#
# STAND_IN: folder of its state. Each submission's words are a line of STAND_IN/submissions.
set -euo pipefail

kind=$(<"$STAND_IN/kind")

submit() {
    echo "$*" >>"$STAND_IN/submissions"
    number=$(wc -l <"$STAND_IN/submissions")
    script=${*: -1}
    (
        code=0
        "$script" >"$STAND_IN/$number.log" 2>&1 </dev/null || code=$?
        echo "$code" >"$STAND_IN/$number.code"
    ) >/dev/null 2>&1 &
    case $kind in
    lsf) echo "Job <$number> is submitted to default queue <normal>." ;;
    pbs) echo "$number.server" ;;
    sge) echo "$number" ;;
    esac
}

number=$(printf %s "${*: -1}" | tr -cd 0-9)
code=$(cat "$STAND_IN/$number.code" 2>/dev/null || true)
case $(basename "$0") in
bsub | qsub) submit "$@" ;;
bjobs)
    [ -n "$code" ] || echo RUN
    [ -z "$code" ] || { [ "$code" = 0 ] && echo DONE || echo EXIT; }
    ;;
qstat)
    [ "$kind" = pbs ] || { [ -z "$code" ] && exit 0 || exit 1; }
    [ -n "$code" ] && printf '    job_state = F\n    Exit_status = %s\n' "$code" || echo '    job_state = R'
    ;;
qacct)
    [ -n "$code" ] || exit 1
    printf 'exit_status  %s\n' "$code"
    ;;
esac
