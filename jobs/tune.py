"""Entry point for `ray job submit -- python jobs/tune.py labels --run ... --truth ...`, or `train`.

The same settings as `zsplg tune labels` and `zsplg tune train`; the cluster is the one that the job
runs on.
"""

import sys

from zsplg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
