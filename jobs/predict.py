"""Entry point for `ray job submit -- python jobs/predict.py --model ... --images ... --out ...`.

The same settings as `zsplg predict`; the cluster is the one that the job runs on.
"""

import sys

from zsplg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
