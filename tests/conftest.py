"""For all tests: one thread for tensors this small, before anything imports torch; no MLflow runs.

More threads gain nothing here, and where other programs run they wait for each other. Tests of
tracking name a store of their own.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_TRACKING_URI"] = "off"

from tests.s3 import bucket, faulty, module_bucket, s3_server  # noqa: F401 (fixtures)
