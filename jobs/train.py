"""Entry point for `ray job submit -- python jobs/train.py --labeled ... --unlabeled ... --out ...`.

The same settings as `zsplg train`; the cluster is the one that the job runs on.
"""

import sys

from zsplg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
