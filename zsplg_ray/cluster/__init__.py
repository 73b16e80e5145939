"""The only room that knows Ray and MLflow: it spreads the other rooms' work over a cluster."""
