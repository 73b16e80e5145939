"""Entry point for `ray job submit -- python jobs/label.py --images ... --classes ... --out ...`.

The same settings as `zsplg label`; the cluster is the one that the job runs on.
"""

import sys

from zsplg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
