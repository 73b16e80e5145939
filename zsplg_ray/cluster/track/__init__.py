"""MLflow: runs of every verb, their links, studies with nested trials, models."""
