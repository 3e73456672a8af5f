#!/usr/bin/env bash
# hydra-submitit-launcher: the process of a job that failed ends with exit code 0.
# One would guess that a job whose function raised has a failing exit code: it is what Slurm writes into its books
# (sacct: COMPLETED 0:0), what `afterok` dependencies and mails of failures go by. Hydra hands the exception to the
# process that submitted, in a pickled result. Hurt is whoever submits a sweep and looks at sacct, or detaches from it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/pip install --quiet hydra-core==1.3.2 hydra-submitit-launcher==1.2.0 submitit==1.5.4
mkdir conf
echo 'x: 1' >conf/config.yaml
cat >app.py <<'END'
import hydra


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    raise ValueError("the job fails")


main()
END
env/bin/pip list 2>/dev/null | grep -E "^(hydra|submitit)"
code=0
env/bin/python app.py -m hydra/launcher=submitit_local x=1,2 hydra.sweep.dir=out >said 2>&1 || code=$?
echo "the process that submitted ended with $code"
logs=$(grep -l "Job completed successfully" out/.submitit/*/*_log.out | wc -l)
echo "$logs of 2 jobs say 'Job completed successfully'"
[ "$code" -ne 0 ] && [ "$logs" = 2 ]
