"""Entry point for Ray's own job submission, with the settings of `zsplg tune labels` or `train`:

    ray job submit --working-dir . -- python jobs/tune.py labels --run ... --truth ...

The cluster is the one that the job runs on; its nodes have what zsplg_ray needs. `zsplg submit`
does the same from any folder, checks the settings first, and gives a job that is stopped time to
write down what it has (RAY_JOB_STOP_WAIT_TIME_S among its env_vars, else 3 seconds).
"""

import sys

from zsplg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
