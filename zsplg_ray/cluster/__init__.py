"""The only room that knows Ray and MLflow: it spreads the other rooms' work over a cluster."""

import os

for _what in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY"):
    # Ray Data reads this when it is imported. Where it finds a cluster busy it asks the autoscaler
    # for more, and names GPUs but no custom resources: any node with a GPU would do, those for
    # training too. Actors without a place ask for themselves, and name both (see session.Plan).
    os.environ.setdefault(f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{_what}_UTIL_THRESHOLD", "1e9")
