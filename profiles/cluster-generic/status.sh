#!/bin/sh
# What became of a job: running, success or failed, as Snakemake wants it.
#
#   status.sh lsf|pbs|sge JOB        JOB is what the submission printed
#
# A job that the scheduler does not know (any more) has failed: it is submitted again and goes on where it stood.
set -u

lsf() {
    number=$(printf %s "$1" | sed 's/[^0-9]*\([0-9]*\).*/\1/') # of "Job <12> is submitted to queue <normal>."
    case $(bjobs -noheader -o stat "$number" 2>/dev/null) in
    DONE) echo success ;;
    PEND | RUN | PSUSP | USUSP | SSUSP | PROV | WAIT) echo running ;;
    *) echo failed ;;
    esac
}

pbs() {
    job=$(qstat -x -f "$1" 2>/dev/null)
    case $(printf '%s\n' "$job" | sed -n 's/ *job_state = //p') in
    F) printf '%s\n' "$job" | grep -q 'Exit_status = 0$' && echo success || echo failed ;;
    '') echo failed ;;
    *) echo running ;;
    esac
}

sge() {
    if qstat -j "$1" >/dev/null 2>&1; then
        echo running
        return
    fi
    # Accounting follows the end of a job by some seconds.
    for _ in 1 2 3 4 5; do
        job=$(qacct -j "$1" 2>/dev/null) && break
        sleep 2
    done
    printf '%s\n' "$job" | grep -Eq '^exit_status +0 *$' && echo success || echo failed
}

case ${1-} in
lsf | pbs | sge) "$1" "$2" ;;
*)
    echo "status.sh: expected lsf, pbs or sge, found ${1-nothing}" >&2
    exit 2
    ;;
esac
