"""What a run of `label` will take, before it starts."""
